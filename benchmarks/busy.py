# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time answers of the embedded default while other processes want the same processors.

    python -m mambaformer.benchmarks.busy --processes 0 1 2 --threads 1 2 --rounds 5

The other processes count, each on a processor of its own as far as there are any. Numbers of threads take turns within
every round, for some seconds each. Writes `benchmarks/results/busy.json` and `busy.md`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoTokenizer

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint

from .machine import command_line, write_table
from .start import QUESTION

COUNT = "while True: sum(range(1000))"
SETTLE = 0.3  # seconds until the system has found places for new processes


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2], help="that are busy meanwhile")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    parser.add_argument("--name", default="busy", help="name of the result files")
    arguments = parser.parse_args()
    folder = str(embedded_checkpoint())
    model = MambaFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    source = AutoTokenizer.from_pretrained(folder)(QUESTION, return_tensors="pt")
    model.generate(**source)
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for count in arguments.processes:
            busy = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
            try:
                time.sleep(SETTLE)
                for threads in arguments.threads:
                    torch.set_num_threads(threads)
                    end = time.perf_counter() + arguments.turn_seconds
                    while (start := time.perf_counter()) < end:
                        model.generate(**source)
                        times.setdefault((count, threads), []).append(1000 * (time.perf_counter() - start))
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    rows: list[list[object]] = []
    for (count, threads), spent in sorted(times.items()):
        slow = statistics.quantiles(spent, n=20)[-1]
        rows.append([count, threads, round(statistics.median(spent), 1), round(slow, 1)])
    result: dict[str, object] = {
        "command": command_line("busy", arguments),
        "columns": ["Busy processes beside it", "Threads", "ms an answer, median", "ms, 19 of 20 answers"],
        "rows": rows,
        "note": f"The embedded default, one question, {arguments.rounds} rounds of {arguments.turn_seconds:g} s for "
        f"each line, taking turns.",
        "arguments": vars(arguments),
        "milliseconds": {" / ".join(map(str, key)): spent for key, spent in times.items()},
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
