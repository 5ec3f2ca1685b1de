# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time one decoding step of a Mamba of mamba-130m's shape: transformers' modules, ours, and the compiled step.

    python -m mambaformer.benchmarks.decode_step --tokens 8 --rounds 7 --threads 1 2

Weights are random: the time of a step does not depend on them. All take turns within every round, so that whatever
else the machine does meets them alike; medians are compared. Beside them stands the time in which the machine can read
the step's weights at all: their bytes by the best reading speed measured in the same run. Where others share the
machine's memory that is the speed of a lucky moment, so each turn is also compared with reading as much before it.
Writes `benchmarks/results/decode_step.json` and `decode_step.md`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from ..modeling_mambaformer.emamba_decoder import EMambaDecoder
from ..modeling_mambaformer.mamba_mixer import use_selective_scan
from ..modeling_mambaformer.packed_weights import DECODE_LIBRARY, WEIGHT_FORMATS
from ..modeling_mambaformer.quantized_modules import round_emamba
from ..modeling_mambaformer.weight_arena import large_zeros
from .machine import best_seconds, command_line, write_table

LIBRARY_MODULES, OUR_MODULES = "transformers' modules, float32", "our modules, float32"
STREAM_BYTES = 256 * 2**20
GIGABYTE = 1e9


def readable(count: int) -> torch.Tensor:
    """`count` bytes in large pages, as float32, each page in a place of its own."""
    return large_zeros((count // 4,)).fill_(1.0)


def median_ratio(values: list[float], beside: list[float]) -> float:
    """The median of what some values are to those measured beside them."""
    return statistics.median(value / other for value, other in zip(values, beside, strict=True))


def reading_speed(repeats: int = 7) -> float:
    """Bytes a second at which this many threads read memory in large pages, as weights lie, the best of `repeats`."""
    values = readable(STREAM_BYTES)
    values.sum()
    return values.nbytes / best_seconds(values.sum, repeats)


def modules_step(model: MambaForCausalLM, ids: torch.Tensor) -> Callable[[], object]:
    """One token by a model's modules, from a state of its own."""
    cache = DynamicCache(config=model.config)
    model(ids.expand(-1, 4), cache_params=cache, use_cache=True)
    return lambda: model(ids, cache_params=cache, use_cache=True)


def compiled_step(model: MambaForCausalLM, ids: torch.Tensor, decoder: EMambaDecoder) -> Callable[[], object]:
    """One token by the compiled step, as answers use it, from a state of its own."""
    cache = DynamicCache(config=model.config)
    model(ids.expand(-1, 4), cache_params=cache, use_cache=True)
    step = decoder.bind(model, cache, ids)
    if step is None:
        raise RuntimeError("the compiled decoding step does not apply here")
    return step.run


def measure(
    steps: dict[str, Callable[[], object]], byte_counts: dict[str, int], tokens: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """
    By rounds: milliseconds a token of every contestant, a turn's first token warming up; milliseconds of reading as
    many bytes right before; and the reading speed.
    """
    times, readings = ({name: [] for name in steps} for _ in range(2))
    speeds, memory = [], readable(max(byte_counts.values()))
    for turn in range(rounds + 1):
        speeds.append(reading_speed())
        for name, step in steps.items():
            for kept, call in ((readings, memory[: byte_counts[name] // 4].sum), (times, step)):
                call()
                start = time.perf_counter()
                for _ in range(tokens):
                    call()
                if turn:
                    kept[name].append(1000 * (time.perf_counter() - start) / tokens)
    return times, readings, speeds


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=50280)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8, help="in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--name", default="decode_step", help="name of the result file")
    arguments = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    sizes = {"hidden_size": arguments.hidden_size, "num_hidden_layers": arguments.layers}
    config = MambaConfig(vocab_size=arguments.vocab_size, pad_token_id=0, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    plain = MambaForCausalLM(config).eval()
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    ours = copy.deepcopy(plain)
    use_selective_scan(ours)
    ids = torch.randint(config.vocab_size, (arguments.batch, 1))

    medians: dict[str, list[float]] = {}
    times, readings, limits, speeds, slowest = {}, {}, {}, {}, {}
    with torch.no_grad():
        steps = {LIBRARY_MODULES: modules_step(plain, ids), OUR_MODULES: modules_step(ours, ids)}
        byte_counts = dict.fromkeys(steps, 0)
        for weight_format in WEIGHT_FORMATS if DECODE_LIBRARY is not None else ():
            decoder, name = EMambaDecoder(weight_format), f"compiled step, {weight_format}"
            steps[name] = compiled_step(ours, ids, decoder)
            byte_counts[name] = decoder.prepare(ours).step_bytes
        if DECODE_LIBRARY is not None:
            held, decoder, name = copy.deepcopy(ours), EMambaDecoder(), "compiled step, int4"
            round_emamba(held, "int4")
            steps[name] = compiled_step(held, ids, decoder)
            byte_counts[name] = decoder.prepare(held).step_bytes
        for name in (LIBRARY_MODULES, OUR_MODULES):
            byte_counts[name] = 4 * parameters
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            of_threads = measure(steps, byte_counts, arguments.tokens, arguments.rounds)
            times[threads], readings[threads], found = of_threads
            speeds[threads], slowest[threads] = max(found), min(found)
            limits[threads] = {name: 1000 * count / speeds[threads] for name, count in byte_counts.items()}
            for name, values in times[threads].items():
                medians.setdefault(name, []).append(statistics.median(values))

    rows = []
    for name in steps:
        row: list[object] = [name, round(byte_counts[name] / 2**20)]
        for threads, median in zip(arguments.threads, medians[name], strict=True):
            limit = limits[threads][name]
            beside = median_ratio(times[threads][name], readings[threads][name])
            row += [round(median, 2), round(limit, 2), round(median / limit, 2), round(beside, 2)]
        rows.append(row)
    columns = ["Step", "Weights read, MiB"]
    for threads in arguments.threads:
        columns += [f"ms a token, {threads} thread(s)", "limit, ms", "x limit", "x reading"]
    speed_text = ", ".join(
        f"{speeds[threads] / GIGABYTE:.1f} GB/s (slowest round {slowest[threads] / GIGABYTE:.1f}) with {threads}"
        for threads in arguments.threads
    )
    result = {
        "command": command_line("decode_step", arguments),
        "columns": columns,
        "rows": rows,
        "note": f"Mamba of {parameters / 1e6:.0f} M parameters ({arguments.layers} layers of width "
        f"{arguments.hidden_size}), batch {arguments.batch}; medians of {arguments.rounds} rounds of "
        f"{arguments.tokens} tokens, taking turns. Limit: weights read at the best reading speed of this run, "
        f"{speed_text} thread(s). Reading: as many bytes in one piece right before each turn, median of the ratios.",
        "instructions": DECODE_LIBRARY.mambaformer_decode_isa().decode() if DECODE_LIBRARY is not None else None,
        "arguments": vars(arguments),
        "load_average_at_start": load,
        "bytes_per_second": speeds,
        "milliseconds": times,
        "reading_milliseconds": readings,
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
