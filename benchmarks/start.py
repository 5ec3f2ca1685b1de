# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What the first answer waits for: imports, the model from disk, its tokenizer, and the answer itself.

    python -m mambaformer.benchmarks.start --rounds 5

Each round is a process of its own that does what a user's script does, step after step; the first one, which may have
to read files from the disk, does not count. Memory is the process's peak so far. Writes
`benchmarks/results/start.json` and `start.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from mambaformer import embedded_checkpoint

from .machine import command_line, write_table

QUESTION = "question: What is pulpitis?"
STEPS = {
    "import mambaformer": "import mambaformer",
    "import torch": "import torch; torch.set_num_threads({threads})",
    "import transformers' parts that the model is made of": "mambaformer.MambaFormerForConditionalGeneration",
    "model from disk": "model = mambaformer.MambaFormerForConditionalGeneration.from_pretrained({folder!r}).eval()",
    "tokenizer from disk": "tokenizer = mambaformer.MambaFormerTokenizer.from_pretrained({folder!r})",
    "first answer": "model.generate(**tokenizer({question!r}, return_tensors='pt'))",
    "second answer": "model.generate(**tokenizer({question!r}, return_tensors='pt'))",
}
"""Python statements, in the order in which they are run."""
WATCH = """
import json, resource, sys, time
def note(begin):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [time.perf_counter() - begin, peak]
notes = []
"""


def script(folder: str, threads: int) -> str:
    """The process's code: every step timed."""
    lines = [WATCH]
    for step in STEPS.values():
        body = step.format(folder=folder, threads=threads, question=QUESTION)
        lines += ["begin = time.perf_counter()", body, "notes.append(note(begin))"]
    return "\n".join([*lines, "print(json.dumps(notes))"])


def one_round(code: str) -> tuple[float, list[list[float]]]:
    """Seconds of the whole process, and seconds and peak bytes of every step."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder, default the embedded checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="start", help="name of the result file")
    arguments = parser.parse_args()
    code = script(arguments.model or str(embedded_checkpoint()), arguments.threads)
    rounds = [one_round(code) for _ in range(arguments.rounds + 1)][1:]
    whole = statistics.median(total for total, _ in rounds)
    table: list[list[object]] = []
    for at, name in enumerate(STEPS):
        seconds, peak = zip(*(notes[at] for _, notes in rounds), strict=True)
        table.append([name, round(statistics.median(seconds), 3), round(max(peak) / 2**20)])
    write_table(
        arguments.name,
        {
            "command": command_line("start", arguments),
            "columns": ["Step", "s", "Peak memory so far, MiB"],
            "rows": table,
            "note": f"Medians of {arguments.rounds} processes, one after another, files in the system's cache. The "
            f"whole process, Python's own start included, took {whole:.2f} s.",
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
