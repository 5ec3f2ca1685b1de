# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time one layer's selective scan: transformers' loop over time, ours in chunked PyTorch, ours compiled.

    python -m mambaformer.benchmarks.scan --length 512 --width 1536 --state 16

The three take turns within every round, so that whatever else the machine does meets them alike; medians are compared.
Writes `benchmarks/results/scan.json` and `scan.md`; the JSON holds wall and processor time of every run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from ..modeling_mambaformer.native_library import LIBRARY
from ..modeling_mambaformer.selective_scan import selective_scan
from .machine import command_line, write_table

LOOP = "transformers' loop"
NAMES = {"loop": LOOP, "torch": "chunked PyTorch", "native": "compiled"}


def make_inputs(batch: int, length: int, width: int, state: int) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta_bias as in a fresh Mamba layer, channels last in memory."""
    torch.manual_seed(0)
    sequences = [torch.randn(batch, length, width).transpose(1, 2) for _ in range(3)]
    projections = [torch.randn(batch, length, state).transpose(1, 2) for _ in range(2)]
    A = -torch.arange(1.0, state + 1).repeat(width, 1)
    step = torch.empty(width).uniform_(0.001, 0.1)
    bias = step + torch.log(-torch.expm1(-step))
    u, delta, z = sequences
    inputs = [u, 0.1 * delta, A, *projections, torch.ones(width), z, bias]
    return [tensor.requires_grad_() for tensor in inputs]


def run(name: str, inputs: list[Tensor]) -> Tensor:
    """The scan by one implementation, `(batch, width, length)`."""
    if name == "loop":
        return mamba_selective_scan(*inputs, delta_softplus=True)
    os.environ["MAMBAFORMER_SCAN"] = name
    return selective_scan(*inputs, delta_softplus=True)


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of one call, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(names: list[str], inputs: list[Tensor], repeats: int, loop_repeats: int) -> dict[str, dict]:
    """Wall and processor seconds of every implementation, forward and forward with backward, round by round."""
    times: dict[str, dict] = {name: {"forward": [], "forward_backward": []} for name in names}

    def forward(name: str) -> None:
        with torch.no_grad():
            run(name, inputs)

    def both(name: str) -> None:
        out = run(name, inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    for name in names:
        forward(name)
    for turn in range(repeats):
        for name in names:
            times[name]["forward"].append(seconds(lambda name=name: forward(name)))
        for name in names:
            if name != "loop" or turn < loop_repeats:
                times[name]["forward_backward"].append(seconds(lambda name=name: both(name)))
    return times


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop-repeats", type=int, default=1, help="rounds with the loop's slow backward pass")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="what the table shows; processor time, summed over threads, on a machine that is busy with other work",
    )
    parser.add_argument("--name", default="scan", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    names = [name for name in NAMES if name != "native" or LIBRARY is not None]
    inputs = make_inputs(arguments.batch, arguments.length, arguments.width, arguments.state)
    with torch.no_grad():
        expected = run("loop", inputs)
        deviations = {name: (run(name, inputs) - expected).abs().max().item() for name in names}
    times = measure(names, inputs, arguments.repeats, arguments.loop_repeats)

    medians = {
        name: {key: [statistics.median(column) for column in zip(*values, strict=True)] for key, values in by.items()}
        for name, by in times.items()
    }
    clock = ("wall", "processor").index(arguments.clock)
    rows = []
    for name in names:
        row: list[object] = [NAMES[name]]
        for key in ("forward", "forward_backward"):
            ours, loop = medians[name][key][clock], medians["loop"][key][clock]
            row += [round(1000 * ours, 2), round(loop / ours, 1)]
        rows.append([*row, f"{deviations[name]:.1e}"])
    result = {
        "command": command_line("scan", arguments),
        "columns": ["Scan", "Forward, ms", "x loop", "Forward + backward, ms", "x loop", "Deviation from the loop"],
        "rows": rows,
        "note": f"One layer of width {arguments.width} and state {arguments.state}, {arguments.batch} x "
        f"{arguments.length} tokens, float32, {arguments.threads} thread(s), {arguments.clock} time; medians of "
        f"{arguments.repeats} rounds ({arguments.loop_repeats} for the loop's backward pass).",
        "arguments": vars(arguments),
        "load_average_at_start": load,
        "deviations": deviations,
        "wall_and_processor_seconds": times,
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
