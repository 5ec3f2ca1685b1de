# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Time one routed pass of ET5's decoder at flan-t5-base's size: transformers' modules, and ours in one compiled call.

    python -m mambaformer.benchmarks.et5_pass --lengths 64 512 --positions 1 5 20 --rounds 15

A pass computes the position that asks and those that ET5 has skipped since it last spoke. Weights are random: the time
of a pass does not depend on them. All take turns within every round, so that whatever else the machine does meets them
alike; medians are compared. Beside them stands the time in which the machine can read what a pass has to: the weights,
and the source's keys and values, by the best reading speed measured in the same run. Where others share the machine's
memory that is the speed of a lucky moment, so each pass is also compared with reading as much right before it.
Writes `benchmarks/results/et5_pass.json` and `et5_pass.md`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from ..modeling_mambaformer.et5_pass import ET5_FORMATS, BoundET5, ET5Decoder
from ..modeling_mambaformer.lazy_et5 import LazyET5State
from ..modeling_mambaformer.packed_weights import DECODE_LIBRARY
from ..modeling_mambaformer.sources import Sources
from .decode_step import GIGABYTE, LIBRARY_MODULES, median_ratio, readable, reading_speed
from .latency_peers import random_t5
from .machine import best_seconds, command_line, write_table

BEFORE = 32  # positions that ET5 has read before the pass

Pass = Callable[[int], object]


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def passes(et5: T5ForConditionalGeneration, length: int, decoder: ET5Decoder | None, most: int) -> tuple[Pass, int]:
    """A pass over up to `most` positions of one answer to a source of `length`, and the bytes kept of that."""
    vocab = et5.config.vocab_size
    state = LazyET5State(Sources.build(torch.randint(2, vocab, (1, length)), None, vocab), torch.zeros(1).long())
    answer = torch.randint(2, vocab, (1, BEFORE + most))
    bound = None if decoder is None else BoundET5(decoder)  # as during an answer
    state.encode(et5, [0])
    state.decode(et5, answer, [0], BEFORE, BEFORE - 1, bound)

    def run(positions: int) -> None:
        state.reached = [BEFORE]
        state.decode(et5, answer, [0], BEFORE + positions, BEFORE + positions - 1, bound)

    return run, sum(x.nbytes for pair in state.cross for x in pair)


@torch.no_grad()
def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512], help="tokens of the source")
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 5, 20], help="of a pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", choices=("true", "tiny"), default="true")
    parser.add_argument("--name", default="et5_pass", help="name of the result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    et5 = random_t5(arguments.sizes, "flan-t5-base")
    decoders: dict[str, ET5Decoder | None] = {LIBRARY_MODULES: None}
    weights = {LIBRARY_MODULES: sum(map(parameter_bytes, (et5.decoder.block, et5.lm_head)))}
    for block in et5.decoder.block:  # whose keys and values of the source were made before the pass
        attention = block.layer[1].EncDecAttention
        weights[LIBRARY_MODULES] -= parameter_bytes(attention.k) + parameter_bytes(attention.v)
    for weight_format in ET5_FORMATS if DECODE_LIBRARY is not None else ():
        name, decoder = f"compiled pass, {weight_format}", ET5Decoder(weight_format)
        decoders[name], weights[name] = decoder, decoder.packed(et5, check=False).pass_bytes
    most = max(arguments.positions)
    runs = {
        (name, length): passes(et5, length, it, most) for name, it in decoders.items() for length in arguments.lengths
    }
    times: dict[tuple[str, int, int], list[float]] = {}
    readings: dict[tuple[str, int, int], list[float]] = {}  # of as many bytes, before each
    speeds = []
    memory = readable(max(weights.values()) + max(kept for _, kept in runs.values()))
    for turn in range(arguments.rounds + 1):
        speeds.append(reading_speed())
        for (name, length), (run, kept) in runs.items():
            for positions in arguments.positions:
                run(positions)
                read = 1000 * best_seconds(memory[: (weights[name] + kept) // 4].sum, 1)
                spent = 1000 * best_seconds(partial(run, positions), 1)
                if turn:
                    times.setdefault((name, length, positions), []).append(spent)
                    readings.setdefault((name, length, positions), []).append(read)
    rows: list[list[object]] = []
    for (name, length), (_, kept) in runs.items():
        limit = 1000 * (weights[name] + kept) / max(speeds)
        row: list[object] = [name, length, round((weights[name] + kept) / 2**20), round(limit, 2)]
        for positions in arguments.positions:
            median = statistics.median(times[name, length, positions])
            beside = median_ratio(times[name, length, positions], readings[name, length, positions])
            row += [round(median, 2), round(median / limit, 2), round(beside, 2)]
        rows.append(row)
    columns = ["Pass", "Source tokens", "Read, MiB", "limit, ms"]
    for positions in arguments.positions:
        columns += [f"ms, {positions} position{'s' * (positions > 1)}", "x limit", "x reading"]
    result: dict[str, object] = {
        "command": command_line("et5_pass", arguments),
        "columns": columns,
        "rows": rows,
        "note": f"Decoder and head of flan-t5-base's size, one row, {BEFORE} positions before the pass, "
        f"{arguments.threads} thread(s); medians of {arguments.rounds} rounds, taking turns. Limit: weights and the "
        f"source's keys and values read at the best reading speed of this run, {max(speeds) / GIGABYTE:.1f} GB/s "
        f"(slowest round {min(speeds) / GIGABYTE:.1f}). Reading: as many bytes in one piece right before each pass, "
        "median of the ratios.",
        "arguments": vars(arguments),
        "bytes_per_second": speeds,
        "milliseconds": {" / ".join(map(str, key)): values for key, values in times.items()},
        "reading_milliseconds": {" / ".join(map(str, key)): values for key, values in readings.items()},
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
