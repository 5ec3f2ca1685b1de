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
    "plain_t5": ("#b5179e", ""),
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


def add_legend(figure: Any, handles: dict[str, Any], count: int) -> None:
    """One legend below `count` panels."""
    columns = {1: 2, 2: 3}.get(count, 5)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def plot_pareto(splits: dict[str, dict], metric: str, metric_label: str, path: Path, note: str = "") -> Path:
    """
    Quality against ET5's cost, one panel a split. Who calls no ET5 at all, a plain T5, has no place on this axis: its
    quality is a line across the panel, with its time an answer in words.

    Args:
        splits: by name, rows of the quality table with `policy`, `label`, `cost_ms` and `scores[metric]` intervals.
        note: above the panels.
    """
    figure, axes = panels(len(splits))
    handles: dict[str, Any] = {}
    for axis, (split, rows) in zip(axes, splits.items(), strict=True):
        curve = [r for r in rows.values() if r["policy"].startswith("mambaformer_")]
        curve.sort(key=lambda r: r["cost_ms"])
        placed = [r for r in rows.values() if not np.isnan(r["cost_ms"])]
        for row in rows.values():
            if np.isnan(row["cost_ms"]):
                handles.setdefault(f"{row['label']} (not on this axis)", draw_level(axis, row, metric))
        for row in [*(r for r in placed if r["policy"] in STYLES), *curve]:
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
        dearest = max(row["cost_ms"] for row in placed)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.2, 2 * max(1.0, dearest))
        ticks = [0, *(10**power for power in range(5) if 10**power <= 2 * dearest)]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(split)
        axis.set_xlabel("what ET5 costs an answer (ms, from the cost table)")
    axes[0].set_ylabel(metric_label)
    if note:
        figure.suptitle(note, fontsize=9)
    add_legend(figure, handles, len(axes))
    return save(figure, path)


def draw_level(axis: Any, row: dict, metric: str) -> Any:
    """A row's score as a line across `axis`, its interval as a band, and its time beside MambaFormer's in words."""
    colour, _ = STYLES[row["policy"]]
    score = row["scores"][metric]
    axis.axhspan(score["low"], score["high"], color=colour, alpha=0.07, linewidth=0)
    if "latency" in row:
        times = f"{row['label']}: {row['latency']['of_mambaformer']:.1f} × MambaFormer's time"
        place = axis.get_yaxis_transform()  # across: share of the panel; up: the score
        axis.text(0.1, score["value"], times, transform=place, color=colour, fontsize=7, va="bottom")
    return axis.axhline(score["value"], color=colour, linewidth=1.1, linestyle="--")


def plot_captured(splits: dict[str, list[dict]], path: Path) -> Path:
    """
    Share of the oracle's gain that each policy captures at exactly each budget, teacher-forced, one panel a split.

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
            found = sorted((r for r in rows if r["policy"] == policy and r["matched"] == "split_share"), key=budget_of)
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
    add_legend(figure, handles, len(axes))
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
    bars = [(name, value, ET5_COLOUR) for name, value in sorted(by_field.items(), key=lambda pair: pair[1])]
    bars += [(name, value, OWN_COLOUR) for name, value in sorted(by_length.items(), key=lambda pair: pair[1])]
    figure, axes = panels(2 if bars else 1, width=5.2, height=max(3.8, 0.21 * len(bars) + 0.8))
    for (split, shares), colour in zip(by_position.items(), SPLIT_COLOURS * 9, strict=False):
        values = 100 * np.asarray(shares)
        axes[0].plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.1, label=split)
    axes[0].set_title("by position")
    axes[0].set_xlabel("position in the answer (tokens)")
    axes[0].set_ylabel("tokens written by ET5 (%)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    if bars:
        names = [name.replace("_", " ") for name, *_ in bars]
        axes[1].barh(range(len(bars)), [100 * v for _, v, _ in bars], color=[c for *_, c in bars], height=0.65)
        axes[1].set_yticks(range(len(bars)), names)
        axes[1].set_ylim(-0.6, len(bars) - 0.4)
        axes[1].set_title("by class of length (green) and by field" if by_length else "by field")
        axes[1].set_xlabel("tokens written by ET5 (%)")
        axes[1].grid(axis="y", visible=False)
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


def plot_answers(answers: list[dict], path: Path, width: int = 100) -> Path:
    """
    Answers with the tokens that ET5 wrote on a coloured ground.

    Args:
        answers: `question`, and `pieces`: `(text, by_et5)` pairs that joined are the answer. width: letters a line.
    """
    height, left = 0.2, 0.2  # inches, of a line and of the margin
    letter = round(0.602 * 9.5 / 72 * DPI) / DPI  # of this monospaced face, whose letters are set on whole pixels
    blocks = [(wrapped([(a["question"], False)], width), wrapped(a["pieces"], width)) for a in answers]
    rows = 2 + sum(len(asked) + len(said) + 1 for asked, said in blocks)
    plt = pyplot()
    size = (letter * width + 2 * left, height * rows)
    figure = plt.figure(figsize=size, layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, size[0])
    axis.set_ylim(size[1], 0)
    axis.axis("off")
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 9.5, "va": "center", "parse_math": False}

    def draw(line: list[tuple[str, bool]], y: float, **more: Any) -> None:
        for at, (character, by_et5) in enumerate(line):
            if by_et5 and character != " ":
                corner = (left + at * letter, y - 0.45 * height)
                patch = plt.Rectangle(corner, letter, 0.9 * height, color=ET5_COLOUR, alpha=0.35, linewidth=0)
                axis.add_patch(patch)
        axis.text(left, y, "".join(character for character, _ in line), **style, **more)

    y = height
    draw([(c, True) for c in "ET5"] + [(c, False) for c in " wrote what is coloured, EMamba the rest"], y, color=GREY)
    y += 1.5 * height
    for asked, said in blocks:
        for line in asked:
            draw(line, y, fontweight="bold")
            y += height
        for line in said:
            draw(line, y)
            y += height
        y += 0.8 * height
    return save(figure, path)


def wrapped(pieces: list[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    """Pieces as lines of at most `width` characters, each with its piece's mark; lines break at spaces."""
    characters = [(" " if c.isspace() else c, mark) for text, mark in pieces for c in text]
    lines = []
    while characters:
        end = min(width, len(characters))
        if len(characters) > width:
            spaces = [at for at in range(1, width + 1) if characters[at][0] == " "]
            end = spaces[-1] if spaces else width
        lines.append(characters[:end])
        characters = characters[end:]
        while characters and characters[0][0] == " ":
            characters.pop(0)
    return lines
