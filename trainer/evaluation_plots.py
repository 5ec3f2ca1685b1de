# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The figures of an evaluation, as PNG files; each function takes plain numbers and draws one figure.

matplotlib is imported when a figure is drawn, without a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

EMAMBA_COLOUR, ET5_COLOUR, OWN_COLOUR, GREY = "#2f6f9f", "#c8553d", "#3a7d44", "#8a8a8a"
SPLIT_COLOURS = ("#2f6f9f", "#c8553d", "#3a7d44", "#8f5da2", "#b08900")
STYLES = {
    "emamba": (EMAMBA_COLOUR, "s"),
    "et5": (ET5_COLOUR, "s"),
    "mambaformer": (OWN_COLOUR, "*"),
    "confidence": ("#b08900", "^"),
    "confidence_cost": ("#b08900", "v"),
    "random_cost": (GREY, "x"),
    "sequence_cost": ("#8f5da2", "D"),
    "soft": ("#4d4d4d", "P"),
}
DPI = 150


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files only, in one plain style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "font.size": 9,
            "axes.titlesize": 10,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


def save(figure: Any, path: Path) -> Path:
    """Write and close a figure."""
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path


def panels(count: int, width: float = 4.6, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with `count` panels side by side."""
    figure, axes = pyplot().subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def plot_pareto(splits: dict[str, dict], metric: str, metric_label: str, path: Path) -> Path:
    """
    Quality against ET5's cost, one panel a split.

    Args:
        splits: by name, rows of the quality table with `policy`, `label`, `cost_ms` and `scores[metric]` intervals.
    """
    figure, axes = panels(len(splits))
    handles: dict[str, Any] = {}
    for axis, (split, rows) in zip(axes, splits.items(), strict=True):
        curve = [r for r in rows.values() if r["policy"].startswith("mambaformer_")]
        curve.sort(key=lambda r: r["cost_ms"])
        for row in [*curve, *(r for r in rows.values() if r["policy"] in STYLES)]:
            colour, marker = STYLES.get(row["policy"], (OWN_COLOUR, "o"))
            score = row["scores"][metric]
            bars = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            label = row["label"] if row["policy"] in STYLES else "MambaFormer at other budgets, no cap"
            big = 12 if marker == "*" else 6
            handles.setdefault(
                label,
                axis.errorbar(
                    row["cost_ms"],
                    score["value"],
                    yerr=bars,
                    fmt=marker,
                    color=colour,
                    markersize=big,
                    elinewidth=0.7,
                    alpha=0.9,
                    zorder=4 if big > 6 else 3,
                ),
            )
        if curve:
            xs, ys = [r["cost_ms"] for r in curve], [r["scores"][metric]["value"] for r in curve]
            axis.plot(xs, ys, color=OWN_COLOUR, linewidth=1, alpha=0.6)
        for name, colour in (("emamba", EMAMBA_COLOUR), ("et5", ET5_COLOUR)):
            if name in rows:
                axis.axhline(rows[name]["scores"][metric]["value"], color=colour, linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=-0.2)
        axis.set_title(split)
        axis.set_xlabel("what ET5 costs an answer (ms, from the cost table)")
    axes[0].set_ylabel(metric_label)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    return save(figure, path)


def plot_captured(splits: dict[str, list[dict]], path: Path) -> Path:
    """
    Share of the oracle's gain that each policy captures at each budget, teacher-forced, one panel a split.

    Args:
        splits: rows of the likelihood table.
    """
    shown = {
        "router": ("learned router, gate open", OWN_COLOUR, "o-"),
        "mambaformer": ("MambaFormer, with its gate", OWN_COLOUR, "*--"),
        "confidence": ("confidence rule", "#b08900", "^-"),
        "entropy": ("entropy rule", "#b08900", "v:"),
        "sequence": ("choice by sequence", "#8f5da2", "D-"),
        "random": ("random", GREY, "x-"),
        "informed": ("both distributions seen, answer not", "#4d4d4d", "P:"),
    }
    figure, axes = panels(len(splits))
    handles: dict[str, Any] = {}
    lowest = 0.0
    for axis, (split, rows) in zip(axes, splits.items(), strict=True):
        for policy, (label, colour, style) in shown.items():
            found = sorted((r for r in rows if r["policy"] == policy and r["matched"] == "share"), key=budget_of)
            values = [r["captured"]["value"] for r in found]
            (line,) = axis.plot([100 * r["budget"] for r in found], values, style, color=colour, markersize=5)
            if policy == "router" and found:
                low, high = ([r["captured"][end] for r in found] for end in ("low", "high"))
                axis.fill_between([100 * r["budget"] for r in found], low, high, color=colour, alpha=0.12)
            lowest = min([lowest, *(v for v in values if np.isfinite(v))])
            handles.setdefault(label, line)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        ticks = sorted({100 * r["budget"] for r in rows})
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_title(split)
        axis.set_xlabel("budget: tokens to ET5 (%)")
    for axis in axes:
        axis.set_ylim(max(lowest - 0.05, -1.0), 1.08)
    axes[0].set_ylabel("share of the oracle's gain captured")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return save(figure, path)


def budget_of(row: dict) -> float:
    """The budget of a row of the likelihood table."""
    return row["budget"]


def plot_reliability(splits: dict[str, dict], path: Path) -> Path:
    """The router's probability against how often ET5 was better, and better by more than its price."""
    figure, axes = panels(2)
    titles = {"better": "ET5 was better", "worth": "ET5 was better by more than its price"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        for (split, found), colour in zip(splits.items(), SPLIT_COLOURS * 9, strict=False):
            bins = found[name]
            label = f"{split}: ECE {bins['ece']:.3f}, AUROC {bins['auroc']:.2f}"
            axis.plot(bins["predicted"], bins["observed"], "o-", color=colour, markersize=4, label=label)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.set_aspect("equal")
        axis.set_title(title)
        axis.set_xlabel("router's probability, 15 bins of equal size")
        axis.legend(loc="upper left", fontsize=7.5)
    axes[0].set_ylabel("share of gold tokens")
    return save(figure, path)


def plot_shares(
    by_position: dict[str, Sequence[float]], by_length: dict[str, float], by_field: dict[str, float], path: Path
) -> Path:
    """
    ET5's share of the answers' tokens by position, by class of length and by field.

    Args:
        by_position: a split's shares at positions 0, 1, ... of the answer. by_length, by_field: shares by name.
    """
    groups = [group for group in (by_length, by_field) if group]
    tall = max(3.8, 0.24 * max([len(g) for g in groups], default=0) + 1)
    figure, axes = panels(1 + len(groups), height=tall)
    for (split, shares), colour in zip(by_position.items(), SPLIT_COLOURS * 9, strict=False):
        values = 100 * np.asarray(shares)
        axes[0].plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.2, label=split)
    axes[0].set_xlabel("position in the answer (tokens)")
    axes[0].set_ylabel("tokens written by ET5 (%)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    titles = ["by class of length", "by field"] if by_length else ["by field"]
    for axis, group, title in zip(axes[1:], groups, titles, strict=False):
        names = sorted(group, key=lambda name: group[name])
        axis.barh([n.replace("_", " ") for n in names], [100 * group[n] for n in names], color=ET5_COLOUR, height=0.6)
        axis.set_xlabel("tokens written by ET5 (%)")
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
    axes[0].set_title("by position")
    return save(figure, path)


def plot_runs(runs: dict[str, tuple[list[int], list[int]]], path: Path) -> Path:
    """Lengths of ET5's runs, and of the gaps between them, by split: shares of all runs and of all gaps."""
    figure, axes = panels(2)
    titles = ("run of ET5 (tokens)", "gap between two runs (tokens)")
    for which, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        longest = max([max(pair[which], default=1) for pair in runs.values()], default=1)
        edges = np.unique(np.round(np.geomspace(1, longest + 1, 12))) - 0.5 if longest > 12 else None
        if edges is None:
            edges = np.arange(0.5, longest + 1.5)
        width = 0.8 / max(1, len(runs))
        for number, ((split, pair), colour) in enumerate(zip(runs.items(), SPLIT_COLOURS * 9, strict=False)):
            lengths = pair[which]
            heights = np.histogram(lengths, edges)[0] / max(1, len(lengths))
            at = np.arange(len(heights)) + (number - (len(runs) - 1) / 2) * width
            axis.bar(at, 100 * heights, width=width, color=colour, label=f"{split} ({len(lengths)})")
        lows, highs = np.ceil(edges[:-1]).astype(int), np.floor(edges[1:]).astype(int)
        names = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(lows, highs, strict=True)]
        axis.set_xticks(range(len(names)), names, rotation=45 if len(names) > 8 else 0)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel(title)
        axis.legend(title="split (count)")
    axes[0].set_ylabel("share (%)")
    return save(figure, path)


def plot_answers(answers: list[dict], path: Path, width: int = 92) -> Path:
    """
    Answers with the tokens that ET5 wrote on a coloured ground.

    Args:
        answers: `question`, and `pieces`: `(text, by_et5)` pairs that joined are the answer. width: characters a line.
    """
    blocks = []
    for answer in answers:
        lines: list[list[tuple[str, bool]]] = [[]]
        used = 0
        for text, by_et5 in answer["pieces"]:
            text = text.replace("\n", " ")
            if used + len(text) > width and text.startswith(" "):
                lines.append([])
                used, text = 0, text.lstrip()
            lines[-1].append((text, by_et5))
            used += len(text)
        question = answer["question"]
        blocks.append((question if len(question) <= width else question[: width - 1] + "…", lines))
    rows = sum(len(lines) + 2 for _, lines in blocks) + 1
    plt = pyplot()
    height, letter = 0.2, 0.602 * 9.5 / 72  # inches of a line, and of a letter of this monospaced face
    figure = plt.figure(figsize=(letter * width + 0.5, height * (rows + 1)), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, letter * width + 0.5)
    axis.set_ylim(height * (rows + 1), 0)
    axis.axis("off")
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 9.5, "va": "center", "parse_math": False}
    y = height
    box = {"facecolor": ET5_COLOUR, "alpha": 0.35, "pad": 1, "linewidth": 0}
    axis.text(0.2, y, "written by ET5", bbox=box, **style)
    axis.text(0.2 + 17 * letter, y, "the rest is EMamba's", color=GREY, **style)
    y += 1.6 * height
    for question, lines in blocks:
        axis.text(0.2, y, question, fontweight="bold", **style)
        y += height
        for line in lines:
            at = 0
            for text, by_et5 in line:
                if by_et5 and text.strip():
                    lead = len(text) - len(text.lstrip())
                    left = 0.2 + (at + lead) * letter - 0.01
                    patch = plt.Rectangle(
                        (left, y - 0.45 * height),
                        letter * len(text.strip()) + 0.02,
                        0.88 * height,
                        color=ET5_COLOUR,
                        alpha=0.35,
                        linewidth=0,
                    )
                    axis.add_patch(patch)
                at += len(text)
            axis.text(0.2, y, "".join(text for text, _ in line), **style)
            y += height
        y += 0.7 * height
    return save(figure, path)
