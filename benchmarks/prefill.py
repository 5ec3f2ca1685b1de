# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time a Mamba of mamba-130m's shape reading a source: transformers' modules, ours, and the compiled call.

    python -m mambaformer.benchmarks.prefill --lengths 64 512 2048 --scaling 4096 16384 65536 --rounds 5 --threads 2

Weights are random: the time does not depend on them. All take turns within every round, so that whatever else the
machine does meets them alike; medians are compared. Beside the compiled call stand the multiplications and additions
of its products in a second of the whole, and the share of its time outside products with matrices. The second part
reads longer and longer sources in one process each, with the growth of its peak memory over that of reading one token.
Writes `benchmarks/results/prefill.json` and `prefill.md`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM

from ..modeling_mambaformer.emamba_decoder import EMambaDecoder, cached_states
from ..modeling_mambaformer.emamba_prefill import can_read, fresh_cache, run_prefill
from ..modeling_mambaformer.emamba_stream import read_source
from ..modeling_mambaformer.mamba_mixer import use_selective_scan
from ..modeling_mambaformer.packed_weights import DECODE_LIBRARY, PackedWeights
from ..modeling_mambaformer.quantized_modules import round_emamba
from ..modeling_mambaformer.sources import Sources
from .machine import command_line, write_table

LIBRARY_MODULES, OUR_MODULES = "transformers' modules, float32", "our modules, float32"
FORMATS = ("float32", "int8", "int4")
MEBIBYTE = 2**20


def build(arguments: argparse.Namespace, weight_format: str) -> MambaForCausalLM:
    """A random model on our scan, its weights held in this format."""
    sizes = {"hidden_size": arguments.hidden_size, "num_hidden_layers": arguments.layers}
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=arguments.vocab_size, pad_token_id=0, eos_token_id=1, **sizes)
    model = MambaForCausalLM(config).eval()
    use_selective_scan(model)
    if weight_format != "float32":
        round_emamba(model, weight_format)
    return model


def source(arguments: argparse.Namespace, length: int) -> Sources:
    """Random sources of this length."""
    ids = torch.randint(arguments.vocab_size, (arguments.batch, length))
    return Sources.build(ids, None, arguments.vocab_size)


def compiled(packed: PackedWeights, model: MambaForCausalLM, read: Sources) -> Callable[[], float]:
    """A call that reads from nothing and returns the seconds that one thread spent in products."""
    seconds = ctypes.c_double()

    def run() -> float:
        rows = len(read.left_ids)
        states = cached_states(fresh_cache(model, packed, rows), packed, rows)
        if states is None:
            raise RuntimeError("the compiled prefill does not apply here")
        run_prefill(packed, read.left_ids, read.lengths, *states, seconds=seconds)
        return seconds.value

    return run


def product_operations(packed: PackedWeights, length: int, batch: int) -> int:
    """Multiplications and additions in the products of one call; the last layer's gate and output meet one token."""
    layers = list(packed.layers)
    every = sum(m.rows * m.columns for x in layers for m in (x.in_proj, x.x_proj, x.dt_proj, x.out_proj))
    gate, out = layers[-1].in_proj, layers[-1].out_proj
    last = gate.rows // 2 * gate.columns + out.rows * out.columns
    return 2 * batch * (length * (every - last) + last)


def measure(
    runs: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every contestant, round by round after one of warming up, and those of products where it tells."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    products: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            inside = run()
            if turn:
                times[name].append(time.perf_counter() - start)
                if isinstance(inside, float):
                    products[name].append(inside)
    return times, products


def read_alone(arguments: argparse.Namespace) -> None:
    """What a process of the scaling part does: read one source, and print seconds and the growth of peak memory."""
    weight_format, length = arguments.alone[0], int(arguments.alone[1])
    model = build(arguments, weight_format)
    packed = EMambaDecoder().prepare(model)
    with torch.no_grad():
        compiled(packed, model, source(arguments, 1))()
        run = compiled(packed, model, source(arguments, length))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"seconds": times, "grown_bytes": grown}))


def scaling(arguments: argparse.Namespace, weight_format: str, length: int) -> dict:
    """The result of `read_alone` in a process of its own."""
    command = [sys.executable, "-m", "mambaformer.benchmarks.prefill", "--alone", weight_format, str(length)]
    for name in ("hidden_size", "layers", "vocab_size", "batch", "rounds", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def contest(arguments: argparse.Namespace, length: int) -> tuple[list[list[Any]], dict]:
    """Rows of the table and all times for sources of one length."""
    read = source(arguments, length)
    ours = build(arguments, "float32")
    runs: dict[str, Callable[[], object]] = {}
    if length <= arguments.longest_loop:
        plain = MambaForCausalLM(ours.config).eval()
        runs[LIBRARY_MODULES] = lambda: plain.backbone(read.left_ids, use_cache=True)
    runs[OUR_MODULES] = lambda: read_source(ours, read)
    operations = {}
    for weight_format in FORMATS if can_read() else ():
        model = ours if weight_format == "float32" else copy.deepcopy(ours)
        if weight_format != "float32":
            round_emamba(model, weight_format)
        packed = EMambaDecoder().prepare(model)
        runs[f"compiled, {weight_format}"] = compiled(packed, model, read)
        operations[f"compiled, {weight_format}"] = product_operations(packed, length, arguments.batch)
    with torch.no_grad():
        times, products = measure(runs, arguments.rounds)
    rows = []
    base = statistics.median(times[OUR_MODULES])
    for name, values in times.items():
        median = statistics.median(values)
        row: list[Any] = [name, length, round(1000 * median, 1), round(base / median, 2), None, None]
        if products[name]:
            outside = statistics.median(1 - inside / all_ for inside, all_ in zip(products[name], values, strict=True))
            row[4:] = [round(operations[name] / median / 1e9), round(outside, 2)]
        rows.append(row)
    return rows, {"seconds": times, "seconds_in_products": products}


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=50280)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--longest-loop", type=int, default=512, help="longest source for transformers' modules")
    parser.add_argument("--scaling", type=int, nargs="*", default=[4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="prefill", help="name of the result file")
    parser.add_argument("--alone", nargs=2, metavar=("FORMAT", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        read_alone(arguments)
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows: list[list[Any]] = []
    times: dict[int, dict] = {}
    for length in arguments.lengths:
        found, times[length] = contest(arguments, length)
        rows += found
    grown: dict[str, dict] = {}
    for length in arguments.scaling if can_read() else ():
        for weight_format in ("float32", "int8"):
            alone = scaling(arguments, weight_format, length)
            grown[f"{weight_format}, {length}"] = alone
            median = statistics.median(alone["seconds"])
            rows.append([f"compiled, {weight_format}", length, round(1000 * median, 1), None, None, None])
    for row in rows:
        key = f"{row[0].removeprefix('compiled, ')}, {row[1]}"
        row += [
            round(1e3 * row[2] / row[1], 1),
            round(grown[key]["grown_bytes"] / MEBIBYTE, 1) if key in grown else None,
        ]
    result = {
        "command": command_line("prefill", arguments),
        "columns": [
            "Reading",
            "Source tokens",
            "ms",
            "x our modules",
            "GOP/s",
            "share outside products",
            "µs a token",
            "peak memory grown, MiB",
        ],
        "rows": [["-" if value is None else value for value in row] for row in rows],
        "note": f"Mamba of {arguments.layers} layers of width {arguments.hidden_size}, batch {arguments.batch}, "
        f"{arguments.threads} thread(s); medians of {arguments.rounds} rounds, taking turns. GOP/s: the products' "
        "multiplications and additions in a second of the whole call. Rows with memory were measured in a process "
        "each, whose peak memory had first been that of reading one token.",
        "instructions": DECODE_LIBRARY.mambaformer_decode_isa().decode() if DECODE_LIBRARY is not None else None,
        "arguments": vars(arguments),
        "load_average_at_start": load,
        "times": times,
        "scaling": grown,
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
