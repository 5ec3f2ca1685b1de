# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time whole answers of T5, Mamba and MambaFormer side by side: transformers, CTranslate2, llama.cpp and ours.

    python -m mambaformer.benchmarks.latency --lengths 64 512 2048 8192 --rounds 5 --threads 2

True sizes, random weights, so many new tokens without an early end: the time does not depend on what the weights say.
All take turns within every round, each in a process of its own, so that whatever else the machine does meets them
alike; medians are compared. A turn goes on for `--turn-seconds`, so that short answers are not told by a single one.
Beside them stand the reading speed and GEMM rates of the machine in the same run. A contestant that cannot take part
is named with the reason. Further parts: throughput by batch size, and EMamba on long sources.
Writes `benchmarks/results/latency.json`, `latency.md` and plots.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .decode_step import reading_speed
from .gemm_speeds import gemm_speeds
from .latency_contestants import CONTESTANTS, SIZES
from .latency_pool import Pool
from .latency_process import EngineError
from .latency_report import write_report
from .machine import best_seconds

BATCHES = (1, 4, 16)
BATCH_LENGTH = 64
SCALED = ("emamba-float32", "emamba-int8")
ONE_OF_MANY = {"open_rows": 1}
READINGS = 3  # of memory before a turn, of which the fastest counts

Figures = dict[str, Any]


def device_reading_speed(device: str, repeats: int = 7) -> float:
    """Bytes a second at which the device reads its memory, the best of `repeats`."""
    if device == "cpu":
        return reading_speed(repeats)
    values = torch.ones(2**28, device=device)
    return values.nbytes / best_seconds(lambda: values.sum().item(), repeats)


def median_answer(answers: list[Figures]) -> Figures:
    """The one of median seconds, the faster of two in the middle."""
    return sorted(answers, key=lambda figures: figures["seconds"])[(len(answers) - 1) // 2]


class Run:
    """What one run of the benchmark does and finds."""

    def __init__(self, arguments: argparse.Namespace, pool: Pool):
        self.arguments, self.pool = arguments, pool
        self.started = time.monotonic()
        self.answers: dict[str, dict[int, list[Figures]]] = {name: {} for name in arguments.contestants}
        self.failures: dict[str, str] = {}
        self.speeds: list[Figures] = []
        self.rounds = 0
        self.stopped: str | None = None
        self.throughput: list[Figures] = []
        self.scaling: list[Figures] = []

    def minutes(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self.started) / 60

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"{self.minutes():6.1f} min  {text}", file=sys.stderr, flush=True)

    def prepare(self) -> None:
        """Write all engines' files."""
        for engine in dict.fromkeys(CONTESTANTS[name].engine for name in self.answers):
            self.say(f"preparing {engine}")
            try:
                self.pool.prepare(engine)
            except EngineError as error:
                self.say(f"{engine}: {error}")
        self.pool.written()

    def time_answer(self, name: str, length: int, **request: Any) -> Figures | None:
        """One answer of a contestant, or `None` where it fails, which is kept as a failure from then on."""
        key = f"{name} {length}" + "".join(
            f" {option}={value}" for option, value in request.items() if option != "turn"
        )
        contestant = CONTESTANTS[name]
        if contestant.engine in self.pool.broken:  # at no length
            self.failures.setdefault(name, self.pool.broken[contestant.engine])
            return None
        if key in self.failures:
            return None
        try:
            figures = self.pool.ask(
                contestant.engine,
                length,
                new_tokens=self.arguments.new_tokens,
                **{**contestant.scenario, **request},
            )
            if figures["tokens"] != self.arguments.new_tokens:
                raise EngineError(f"it wrote {figures['tokens']} of {self.arguments.new_tokens} tokens")
            return figures
        except EngineError as error:
            key = name if contestant.engine in self.pool.broken else key
            self.failures[key] = str(error)
            self.say(f"{key} failed: {error}")
            return None

    def time_turn(self, name: str, length: int, **request: Any) -> Figures | None:
        """
        The median answer of a turn, by its seconds, with the turn's peak of memory and the speed of reading memory
        right before it; `None` as `time_answer`.

        Where a turn has room for more than one, its first is left out: others' data were in the processor's caches.
        """
        answers: list[Figures] = []
        reading = device_reading_speed(self.arguments.device, READINGS)
        begun = time.monotonic()
        while not answers or time.monotonic() - begun < self.arguments.turn_seconds:
            figures = self.time_answer(name, length, **request)
            if figures is None:
                return None
            answers.append(figures)
        middle = median_answer(answers[1:] or answers)
        peak = max(x.get("peak_bytes") or 0 for x in answers) or None
        return {**middle, "peak_bytes": peak, "bytes_per_second": reading}

    def measure_speeds(self) -> None:
        """The machine's reading speed and its rates of products now."""
        device = self.arguments.device
        self.speeds.append({"bytes_per_second": device_reading_speed(device), **gemm_speeds(device)})

    def over_budget(self, more: float = 0.0) -> bool:
        """Whether the budget of minutes is spent, or would be after some `more`."""
        budget = self.arguments.budget_minutes
        return budget is not None and self.minutes() + more > budget

    def enough(self, last: float) -> bool:
        """Whether another round as long as the last one, in minutes, would exceed the budget."""
        if not self.rounds or not self.over_budget(last):
            return False
        self.stopped = (
            f"Stopped after {self.rounds} of {self.arguments.rounds} rounds: another one of about {last:.0f} minutes "
            f"would exceed the budget of {self.arguments.budget_minutes:g} minutes."
        )
        self.say(self.stopped)
        return True

    def compare(self) -> None:
        """Whole answers, all contestants in turn at each length, round by round; the first rounds warm up."""
        warm_up, names = self.arguments.warm_up, list(self.answers)
        last = 0.0
        for turn in range(warm_up + self.arguments.rounds):
            warming = turn < warm_up
            if not warming and self.enough(last):
                return
            begun = self.minutes()
            self.measure_speeds()
            for length in self.arguments.lengths:
                if warming and length > self.arguments.longest_warm_up:
                    continue
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    answer = self.time_answer if warming else self.time_turn
                    figures = answer(name, length, turn=turn)
                    if figures is None:
                        continue
                    self.say(f"round {turn - warm_up + 1}, {length} tokens, {name}: {figures['seconds']:.3f} s")
                    if not warming:
                        self.answers[name].setdefault(length, []).append(figures)
            last = self.minutes() - begun
            self.rounds += not warming

    def compare_batches(self) -> None:
        """Our throughput by batch size; and a large batch of which one row asks ET5 beside that row alone."""
        largest = max(self.arguments.batches, default=0)
        cases = [(name, batch, {}) for name in ("emamba-float32", "emamba-int8", "closed", "bursts")
                 for batch in self.arguments.batches]  # fmt: skip
        cases += [("bursts", largest, ONE_OF_MANY)] if largest > 1 else []
        self.throughput = self.series(
            [(name, BATCH_LENGTH, {"batch": batch, **more}) for name, batch, more in cases if name in self.answers]
        )

    def scale(self) -> None:
        """EMamba's answers to longer and longer sources."""
        names = [name for name in SCALED if name in self.answers]
        self.scaling = self.series([(name, length, {}) for length in self.arguments.scaling_lengths for name in names])

    def series(self, cases: list[tuple[str, int, Figures]]) -> list[Figures]:
        """Answers to some cases, taking turns in as many rounds; `name`, `length`, options and `answers` of each."""
        results = [{"name": name, "length": length, **more, "answers": []} for name, length, more in cases]
        for turn in range(self.arguments.warm_up + max(1, self.rounds)):
            if turn > self.arguments.warm_up and self.over_budget():
                break
            for (name, length, more), result in zip(cases, results, strict=True):
                if turn < self.arguments.warm_up and length > self.arguments.longest_warm_up:
                    continue
                answer = self.time_answer if turn < self.arguments.warm_up else self.time_turn
                figures = answer(name, length, turn=turn, **more)
                if figures is not None and turn >= self.arguments.warm_up:
                    result["answers"].append(figures)
                    self.say(f"{name}, {length} tokens {more}: {figures['seconds']:.3f} s")
        return [result for result in results if result["answers"]]


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048, 8192], help="source tokens")
    parser.add_argument("--scaling-lengths", type=int, nargs="*", default=[512, 8192, 65536], help="EMamba alone")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES), help="rows at once, ours")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them")
    parser.add_argument("--turn-seconds", type=float, default=1.5, help="in which an answer is repeated; 0 for one")
    parser.add_argument("--longest-warm-up", type=int, default=2048, help="source tokens in warm-up rounds, at most")
    parser.add_argument("--budget-minutes", type=float, default=None, help="start no round that would exceed these")
    parser.add_argument("--patience-minutes", type=float, default=30, help="for one answer")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of every contestant")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--sizes", default="true", choices=list(SIZES), help="tiny ones try the benchmark out")
    parser.add_argument("--folder", type=Path, default=None, help="keep the contestants' files here, to use again")
    parser.add_argument("--in-process", action="store_true", help="one process for all: memory is not told apart")
    parser.add_argument("--name", default="latency", help="name of the result files")
    arguments = parser.parse_args(given)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {arguments.device!r}, and PyTorch sees no CUDA device: leave it out to use the CPU")
    if min(arguments.lengths + arguments.scaling_lengths + [arguments.new_tokens]) < 2 or arguments.rounds < 1:
        parser.error("lengths and new tokens start at 2, rounds at 1")
    return arguments


def main(given: list[str] | None = None) -> None:
    """Parse arguments, measure, print and write."""
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    setup = {
        "sizes": arguments.sizes,
        "threads": arguments.threads,
        "device": arguments.device,
        "longest": max(arguments.lengths) + arguments.new_tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        pool = Pool(setup, folder, 60 * arguments.patience_minutes, not arguments.in_process)
        run, text = Run(arguments, pool), ""
        try:
            run.prepare()
            for part in (run.compare, run.compare_batches, run.scale):
                part()
                text = write_report(run, load)  # what there is, should a later part be cut short
        except KeyboardInterrupt:
            run.stopped = f"Interrupted in round {run.rounds + 1} or after it."
            text = write_report(run, load) if run.speeds else "Interrupted before the first round."
        finally:
            pool.close()
    print(text)


if __name__ == "__main__":
    main()
