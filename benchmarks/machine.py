# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Where a benchmark's figures go, with the machine, the versions and the date of the run beside them."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from ..trainer.machine import describe_machine
from .report import any_table

RESULTS = Path(__file__).resolve().parent / "results"


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds that `call` takes, the best of `repeats`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def command_line(benchmark: str, arguments: argparse.Namespace) -> str:
    """The command as one would type it again, without the name of a folder."""
    options: list[str] = []
    for name, value in vars(arguments).items():
        if name == "folder" or value is None or value is False or value == []:
            continue
        options.append(f"--{name.replace('_', '-')}")
        if value is not True:
            options += [str(one) for one in (value if isinstance(value, list) else [value])]
    return shlex.join(["python", "-m", f"mambaformer.benchmarks.{benchmark}", *options])


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write `result` with the machine's description to `benchmarks/results/<name>.json`; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **result}, indent=2, ensure_ascii=False) + "\n")
    return path


def write_table(name: str, result: dict[str, object]) -> None:
    """Write `result`, which brings `columns` and `rows`, as JSON and as a Markdown table beside it, and print this."""
    path = write_result(name, result)
    text = any_table(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
