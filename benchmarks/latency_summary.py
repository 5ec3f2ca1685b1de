# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
From the latency benchmark's single answers to medians, ratios, targets, and the least time that the machine allows.

The least time reads each weight of a decoding step once at the measured reading speed, and makes the products of a
source at the rate measured for large matrices of float32, or of int8 where its weights are rounded; all else is taken
to cost nothing.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .latency_contestants import CONTESTANTS, MIXTURE, MIXTURE_LABEL, OPEN

PARTS = ("seconds", "first", "decode", "peak_bytes")
COUNTS = ("et5_share", "et5_passes", "et5_tokens", "encoder_calls")
ET5_PARTS = (*COUNTS, "encoder_seconds", "pass_seconds")

Figures = dict[str, Any]
Summary = dict[str, dict[int, Figures]]


@dataclass(frozen=True)
class Target:
    """`peer`'s `part` of an answer is to be `at_least` so many times `ours`; `None`: shown without a target."""

    ours: str
    peer: str
    part: str
    at_least: float | None
    lengths: tuple[int, ...] | None = None  # all that were measured


TARGETS = (
    Target(MIXTURE, "t5-large", "seconds", 24.4, (64,)),
    Target(MIXTURE, "t5-large", "seconds", 15, (512,)),
    Target(MIXTURE, "t5-large", "seconds", 14, (2048,)),
    Target(MIXTURE, "t5-large", "seconds", 14, (8192,)),
    Target("bursts", "t5-large", "seconds", None),
    Target("independent", "t5-large", "seconds", None),
    Target("closed", "t5-large", "seconds", None),
    Target(MIXTURE, "ctranslate2-t5-large", "seconds", 8, (64,)),
    Target(MIXTURE, "ctranslate2-t5-large", "seconds", 6, (512,)),
    Target("emamba-int8", "llama-q8_0", "decode", 3),
    Target("emamba-int8", "llama-q8_0", "first", 2.5),
    Target("emamba-float32", "mamba", "first", 6, (2048,)),
    Target("emamba-float32", "mamba", "decode", 4),
    Target(MIXTURE, "t5-large", "peak_bytes", 4),
)
PART_NAMES = {"seconds": "whole answer", "first": "source", "decode": "decoding", "peak_bytes": "peak memory"}


def label(name: str) -> str:
    """What a contestant is called in tables and plots."""
    return MIXTURE_LABEL if name == MIXTURE else CONTESTANTS[name].label


def median_figures(answers: list[Figures]) -> Figures:
    """The median of every part over some answers; the most memory; the mean of what ET5 did."""
    figures: Figures = {"rounds": len(answers)}
    for part in (*PARTS, *ET5_PARTS, "state_bytes"):
        values = [answer[part] for answer in answers if answer.get(part) is not None]
        if values:
            if part == "peak_bytes":
                figures[part] = max(values)
            else:
                figures[part] = statistics.fmean(values) if part in COUNTS else statistics.median(values)
    return figures


def summarise(answers: dict[str, dict[int, list[Figures]]], loaded: dict[str, Figures]) -> Summary:
    """
    Medians by contestant and source length; and the mixture of answers with the gate closed and open.

    Memory is the most that loading or an answer took. `x_reading` is the median of what decoding took to what reading
    as many weights would have, at the speed of reading right before each turn.
    """
    summary: Summary = {}
    for name, by_length in answers.items():
        summary[name] = {length: median_figures(some) for length, some in by_length.items()}
        engine = loaded.get(CONTESTANTS[name].engine, {})
        at_load, step = engine.get("peak_bytes"), engine.get("step_bytes")
        for length, figures in summary[name].items():
            if figures.get("peak_bytes") and at_load:
                figures["peak_bytes"] = max(figures["peak_bytes"], at_load)
            if step:
                figures["x_reading"] = statistics.median(
                    answer["decode"] * answer["bytes_per_second"] / ((answer["tokens"] - 1) * step)
                    for answer in by_length[length]
                )
    closed, opened = summary.get("closed", {}), summary.get("quarter", {})
    mixed = {length: mix(closed[length], opened[length]) for length in closed if length in opened}
    return {**summary, MIXTURE: mixed} if mixed else summary


def mix(closed: Figures, opened: Figures) -> Figures:
    """What a sequence costs on average where the gate is open for the share `OPEN` of them."""
    figures = {
        name: (1 - OPEN) * closed[name] + OPEN * opened[name]
        for name in (*PARTS, *ET5_PARTS)
        if closed.get(name) is not None and opened.get(name) is not None
    }
    if "peak_bytes" in figures:
        figures["peak_bytes"] = max(closed["peak_bytes"], opened["peak_bytes"])
    return {**figures, "rounds": min(closed["rounds"], opened["rounds"])}


def least_times(name: str, length: int, new_tokens: int, summary: Summary, loaded: dict, speeds: Figures) -> Figures:
    """
    The least `seconds`, `first` and `decode` that the machine allows one of ours; empty where it is not known.

    Args:
        speeds: `bytes_per_second`, `gemm_flops` and `int8_ops`.
    """
    if name == MIXTURE:
        parts = [least_times(one, length, new_tokens, summary, loaded, speeds) for one in ("closed", "quarter")]
        return mix(*({**part, "rounds": 0} for part in parts)) if all(parts) else {}
    engine = loaded.get(CONTESTANTS[name].engine, {})
    if not engine.get("step_bytes"):
        return {}
    read, multiply = speeds["bytes_per_second"], speeds["int8_ops" if engine["rounded"] else "gemm_flops"]
    step = engine["step_bytes"] / read
    figures, asked = {"first": 2 * engine["source_products"] * length / multiply + step}, summary[name][length]
    figures["decode"] = (new_tokens - 1) * step
    encoder = engine["encoder_products"] * length / multiply
    encoder += engine["encoder_pair_products"] * length**2 / speeds["gemm_flops"]
    et5 = asked.get("encoder_calls", 0) * 2 * encoder
    et5 += asked.get("et5_passes", 0) * engine["pass_bytes"] / read
    return {**figures, "seconds": figures["first"] + figures["decode"] + et5}


def target_rows(
    summary: Summary, lengths: list[int], new_tokens: int, loaded: dict, speeds: Figures
) -> list[list[object]]:
    """One row of `TARGET_COLUMNS` a target and length that were asked for; what failed says so."""
    rows: list[list[object]] = []
    for target in TARGETS:
        if target.ours not in summary or target.peer not in summary:
            continue
        for length in lengths if target.lengths is None else sorted({*target.lengths} & {*lengths}):
            row = [label(target.ours), label(target.peer), PART_NAMES[target.part], length]
            aim = "shown" if target.at_least is None else target.at_least
            ours = summary.get(target.ours, {}).get(length, {}).get(target.part)
            peer = summary.get(target.peer, {}).get(length, {}).get(target.part)
            if not ours or not peer:
                rows.append([*row, aim, "not measured", "–", "–", "–", "–"])
                continue
            reached = "–" if target.at_least is None else "yes" if peer / ours >= target.at_least else "no"
            beside = summary[target.ours][length].get("x_reading") if target.part == "decode" else None
            limits = [f"{peer / ours * beside:.1f}" if beside else "–"]
            for rates in (speeds, {**speeds, "int8_ops": speeds.get("exact_int8_ops")}):
                least = least_times(target.ours, length, new_tokens, summary, loaded, rates).get(target.part)
                limits.append(f"{peer / least:.1f}" if least else "–")
            rows.append([*row, aim, f"{peer / ours:.2f}", reached, *limits])
    return rows


TARGET_COLUMNS = ["Ours", "Against", "Part", "Source tokens", "Target, x", "Measured, x", "Reached"]
TARGET_COLUMNS += ["Had ours only read, x", "At our limit, x", "with exact int8, x"]


def ratios(summary: Summary) -> dict[str, dict[str, dict[int, float]]]:
    """How many times as long each peer's whole answers take as each of ours: ours -> peer -> length -> ratio."""
    ours = [name for name in summary if name == MIXTURE or CONTESTANTS[name].scenario]
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name in ours:
        for peer in summary:
            if peer not in ours:
                both = [length for length in summary[name] if length in summary[peer]]
                by_length = {at: summary[peer][at]["seconds"] / summary[name][at]["seconds"] for at in both}
                found.setdefault(name, {})[peer] = by_length
    return found
