# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The latency benchmark's tables, written as JSON, as Markdown and as plots."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .latency_contestants import BURST, CONTESTANTS, MIXTURE, OPEN, SHARE, vocabulary
from .latency_plots import draw_ratios, draw_times
from .latency_summary import (
    TARGET_COLUMNS,
    Figures,
    Summary,
    label,
    least_times,
    median_figures,
    ratios,
    summarise,
    target_rows,
)
from .machine import command_line, write_result
from .report import any_table

if TYPE_CHECKING:
    from .latency import Run

MEBIBYTE, GIGA = 2**20, 1e9
BASELINE = "t5-large"
UNKNOWN = "–"
ENGINE_PACKAGES = ("ctranslate2", "xllamacpp", "gguf")
PARTS = {
    "targets": "Targets",
    "parts": "Source and decoding apart",
    "et5": "What ET5 cost",
    "throughput": "Throughput",
    "scaling": "EMamba on long sources",
    "failures": "Not measured",
}

Table = dict[str, Any]


def write_report(run: Run, load: float | None) -> str:
    """Write everything that a run has found so far; returns the Markdown."""
    arguments = run.arguments
    speeds = {name: max(speed[name] for speed in run.speeds) for name in run.speeds[0]}
    loaded = run.pool.loaded
    summary = summarise(run.answers, loaded)
    lengths = list(arguments.lengths)
    rows = target_rows(summary, lengths, arguments.new_tokens, loaded, speeds)
    result: dict[str, Any] = {
        "command": command_line("latency", arguments),
        **whole_answers(summary, lengths),
        "note": describe(run, speeds),
        "targets": {
            "columns": TARGET_COLUMNS,
            "rows": rows,
            "note": "Limit: weights read once a step at the reading speed of this run, the source's products at its "
            "rate for large matrices of its format, PyTorch's or ours, nothing else; the peer as measured. Had ours "
            "only read: decoding as fast as memory was read right before each of its turns.",
        },
        "parts": parts_table(summary, lengths, arguments.new_tokens, loaded, speeds),
        "et5": et5_table(summary),
        "throughput": throughput_table(run),
        "scaling": scaling_table(run),
        "failures": {"columns": ["What", "Reason"], "rows": [[k, v] for k, v in run.failures.items()]},
        "summary": summary,
        "ratios": ratios(summary),
        "engines": loaded,
        "reloads": run.pool.reloads,
        "engine_versions": engine_versions(),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "folder"},
        "rounds": run.rounds,
        "stopped": run.stopped,
        "load_average_at_start": load,
        "speeds": run.speeds,
        "answers": run.answers,
        "throughput_answers": run.throughput,
        "scaling_answers": run.scaling,
    }
    path = write_result(arguments.name, result)
    result = json.loads(path.read_text(encoding="utf-8"))
    pictures = draw(result, path.parent, arguments.name)
    text = any_table(result)
    for part, heading in PARTS.items():
        if result[part]["rows"]:
            text += f"\n## {heading}\n\n{any_table(result[part])}"
    text += "".join(f"\n![{title}]({file})\n" for file, title in pictures.items())
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def describe(run: Run, speeds: Figures) -> str:
    """The sentences below the first table: sizes, rules of the comparison, the machine's speed."""
    arguments = run.arguments
    engines = ", ".join(f"{name} {version}" for name, version in engine_versions().items())
    slowest = {name: min(speed[name] for speed in run.speeds) for name in speeds}
    sentences = [
        f"Seconds of a whole answer of {arguments.new_tokens} new tokens, batch 1, greedy, without an early end; "
        f"{arguments.sizes} sizes, random weights, a vocabulary of {vocabulary(arguments.sizes):,} for all, "
        f"{arguments.threads} thread(s), device {arguments.device}; medians of {run.rounds} rounds taking turns, "
        f"after {arguments.warm_up} to warm up (sources of at most {arguments.longest_warm_up:,} tokens). "
        f"A turn went on for {arguments.turn_seconds:g} s and counts as its median answer, the first left out where "
        "there were more.",
        f"Meanwhile the machine read {speeds['bytes_per_second'] / GIGA:.1f} GB/s and multiplied float32 matrices at "
        f"{speeds['gemm_flops'] / GIGA:.0f} GFLOP/s, int8 ones at {speeds['int8_ops'] / GIGA:.0f} GOP/s, the best of "
        f"all rounds; in the slowest, {slowest['bytes_per_second'] / GIGA:.1f} GB/s, "
        f"{slowest['gemm_flops'] / GIGA:.0f} GFLOP/s and {slowest['int8_ops'] / GIGA:.0f} GOP/s.",
        "MambaFormer is flan-t5-base and Mamba-130m, both in int8. Gate and router are computed as in use; which "
        "tokens go to ET5 is set from outside, because random weights route at random.",
        f'"Gate open for {OPEN:.0%}" is {1 - OPEN:g} of the time with the gate closed and {OPEN:g} of the time with '
        f"it open, where ET5 then writes {SHARE / OPEN:.1%} of the tokens, so that it writes {SHARE:.1%} of all. "
        f"Bursts are of about {BURST} tokens; independent tokens stand at places of their own, a set number in every "
        "answer.",
        "EMamba alone is the same model with an ET5 of next to no size, which is never asked. llama.cpp's files "
        "round the embeddings too. Peak memory is that of the contestant's process, its libraries included, while "
        "loading or answering.",
    ]
    if engines:
        sentences.append(f"Engines: {engines}.")
    if arguments.device != "cpu":
        sentences.append("On the device, PyTorch's peak is that of its own allocations; other engines' is the host's.")
    if run.pool.reloads:
        sentences.append(
            "Memory did not hold all at a time; loaded again: "
            + ", ".join(f"{name} ({count})" for name, count in run.pool.reloads.items())
            + "."
        )
    return " ".join([*sentences, *([run.stopped] if run.stopped else [])])


def engine_versions() -> dict[str, str]:
    """Versions of the other engines, where they are installed."""
    found = {}
    for name in ENGINE_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_order(summary: Summary) -> list[str]:
    """Contestants that answered, peers first, the mixture before the answers that it is made of."""
    names = [name for name in CONTESTANTS if summary.get(name)]
    if MIXTURE in summary:
        names.insert(names.index("closed"), MIXTURE)
    return names


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """A figure as text, or a dash."""
    return UNKNOWN if value is None else format(scale * value, form)


def whole_answers(summary: Summary, lengths: list[int]) -> Table:
    """Seconds and ratio to T5-Large by source length, and peak memory at the longest."""
    columns = ["Answers by"]
    for length in lengths:
        columns += [f"{length:,} tokens: s", "x T5-Large"]
    rows: list[list[object]] = []
    for name in in_order(summary):
        row: list[object] = [label(name)]
        for length in lengths:
            seconds = summary[name].get(length, {}).get("seconds")
            base = summary.get(BASELINE, {}).get(length, {}).get("seconds")
            row += [shown(seconds, ".3f"), shown(base / seconds if base and seconds else None, ".1f")]
        peaks = [summary[name].get(length, {}).get("peak_bytes") for length in (lengths[0], lengths[-1])]
        rows.append([*row, *(shown(peak, ",.0f", 1 / MEBIBYTE) for peak in peaks)])
    return {"columns": [*columns, f"MiB at {lengths[0]:,}", f"MiB at {lengths[-1]:,}"], "rows": rows}


def parts_table(summary: Summary, lengths: list[int], new_tokens: int, loaded: dict, speeds: Figures) -> Table:
    """Time to the first token and milliseconds for each later one, with the least that the machine allows."""
    columns = ["Answers by"]
    for length in lengths:
        columns += [f"{length:,} tokens: s to the first", "x limit", "ms a token", "x limit", "x reading"]
    rows: list[list[object]] = []
    for name in in_order(summary):
        row: list[object] = [label(name)]
        alone = name != MIXTURE and CONTESTANTS[name].scenario.get("routing") == "emamba"
        for length in lengths:
            figures = summary[name].get(length, {})
            least = least_times(name, length, new_tokens, summary, loaded, speeds) if figures and alone else {}
            for part, scale in (("first", 1.0), ("decode", 1000 / (new_tokens - 1))):
                row += [shown(figures.get(part), ".4g", scale)]
                row += [shown(figures[part] / least[part] if part in least else None, ".2f")]
            row += [shown(figures.get("x_reading") if alone else None, ".2f")]
        told = {} if name == MIXTURE else loaded.get(CONTESTANTS[name].engine, {})
        rows.append([*row, shown(told.get("seconds"), ".2f"), shown(told.get("weight_bytes"), ",.0f", 1 / MEBIBYTE)])
    return {"columns": [*columns, "Ready from disk, s", "Weights, MiB"], "rows": rows}


def et5_table(summary: Summary) -> Table:
    """What ET5 did in our answers, from their traces, and the seconds spent in its encoder and its decoder."""
    rows: list[list[object]] = []
    for name in in_order(summary):
        for length, figures in summary[name].items():
            if figures.get("encoder_calls"):
                counts = [f"{figures[part]:.2f}" for part in ("et5_passes", "et5_tokens", "encoder_calls")]
                times = [f"{figures[part]:.3f}" for part in ("encoder_seconds", "pass_seconds", "seconds")]
                rows.append([label(name), length, f"{figures['et5_share']:.1%}", *counts, *times])
    columns = ["Answers by", "Source tokens", "ET5 share", "Passes", "Positions decoded", "Encoder runs"]
    columns += ["Encoder, s", "Passes, s", "Whole answer, s"]
    return {"columns": columns, "rows": rows, "note": "Means of counts, medians of times, an answer."}


def throughput_table(run: Run) -> Table:
    """Tokens a second of ours by batch size, and ET5's time where one row of a batch asks it."""
    rows: list[list[object]] = []
    for case in run.throughput:
        figures, batch = median_figures(case["answers"]), case["batch"]
        asking = f", one row of {batch} asks ET5" if "open_rows" in case else ""
        written = batch * run.arguments.new_tokens
        later = batch * (run.arguments.new_tokens - 1)
        et5 = figures.get("encoder_seconds", 0) + figures.get("pass_seconds", 0)
        speeds = [f"{written / figures['seconds']:.1f}", f"{later / figures['decode']:.1f}"]
        rows.append([label(case["name"]) + asking, batch, *speeds, f"{et5:.3f}", f"{figures['seconds']:.3f}"])
    columns = ["Answers by", "Rows at once", "Tokens/s, whole answers", "Tokens/s, decoding", "In ET5, s", "In all, s"]
    length = run.throughput[0]["length"] if run.throughput else 0
    return {"columns": columns, "rows": rows, "note": f"Sources of {length} tokens each."}


def scaling_table(run: Run) -> Table:
    """Time and memory of EMamba alone by source length; the state that it keeps is of one size."""
    rows: list[list[object]] = []
    for case in run.scaling:
        figures, length = median_figures(case["answers"]), case["length"]
        peak = shown(figures.get("peak_bytes"), ",.0f", 1 / MEBIBYTE)
        times = [f"{figures['first']:.3f}", f"{1e6 * figures['first'] / length:.1f}"]
        step = f"{1000 * figures['decode'] / (run.arguments.new_tokens - 1):.2f}"
        rows.append([label(case["name"]), length, *times, step, f"{figures['state_bytes'] / 1024:.0f}", peak])
    columns = ["Answers by", "Source tokens", "s to the first token", "µs a source token", "ms a new token"]
    return {"columns": [*columns, "State, KiB", "Peak memory, MiB"], "rows": rows}


def draw(result: dict[str, Any], folder: Path, name: str) -> dict[str, str]:
    """Draw the plots where matplotlib is installed; file name -> title."""
    if importlib.util.find_spec("matplotlib") is None:
        print("No plots: matplotlib is not installed; pip install 'mambaformer[bench]' for them.", file=sys.stderr)
        return {}
    titles = {f"{name}_time.png": "Time of a whole answer by source length"}
    draw_times(result, folder / f"{name}_time.png")
    if draw_ratios(result, folder / f"{name}_ratios.png"):
        titles[f"{name}_ratios.png"] = "Our speed as a multiple of each peer's"
    return titles
