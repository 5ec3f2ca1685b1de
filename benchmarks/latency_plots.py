# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The latency benchmark's figures, drawn from its result as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..trainer.evaluation_plots import EMAMBA_COLOUR, ET5_COLOUR, GREY, OWN_COLOUR, pyplot, save
from .latency_contestants import CONTESTANTS, MIXTURE
from .latency_summary import label

MARKERS = "osD^vPX<>*hpd8H+x"


def colour(name: str) -> str:
    """One colour for each kind: T5, other Mambas, EMamba alone, MambaFormer."""
    if name == MIXTURE or CONTESTANTS[name].engine == "mambaformer":
        return OWN_COLOUR
    if CONTESTANTS[name].scenario:
        return EMAMBA_COLOUR
    return ET5_COLOUR if "t5" in name else GREY


def draw_times(result: dict[str, Any], path: Path) -> Path:
    """Seconds of a whole answer by source length, both logarithmic, a line for each contestant."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for marker, (name, by_length) in zip(MARKERS, result["summary"].items(), strict=False):
        if by_length:
            points = sorted((int(length), figures["seconds"]) for length, figures in by_length.items())
            style = {"marker": marker, "markersize": 4, "linewidth": 2 if name == MIXTURE else 1}
            axes.plot(*zip(*points, strict=True), color=colour(name), label=label(name), **style)
    axes.set(xscale="log", yscale="log", xlabel="source tokens", ylabel="seconds of a whole answer")
    lengths = result["arguments"]["lengths"]
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return save(figure, path)


def draw_ratios(result: dict[str, Any], path: Path) -> Path | None:
    """How many times as fast as each peer MambaFormer answers, a group of bars for each source length."""
    by_peer = {peer: lengths for peer, lengths in result["ratios"].get(MIXTURE, {}).items() if lengths}
    if not by_peer:
        return None
    plt = pyplot()
    lengths = [str(length) for length in result["arguments"]["lengths"]]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(by_peer) * len(lengths)))
    thickness = 0.8 / len(lengths)
    for at, length in enumerate(lengths):
        rows = [
            (row + at * thickness, ratios[length]) for row, ratios in enumerate(by_peer.values()) if length in ratios
        ]
        if rows:
            bars = axes.barh(*zip(*rows, strict=True), height=thickness, color=OWN_COLOUR, alpha=1 - 0.2 * (at % 4),
                             label=f"{int(length):,} source tokens")  # fmt: skip
            axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(by_peer))], [label(peer) for peer in by_peer])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times as fast as the peer", title=label(MIXTURE))
    axes.set_xlim(right=1.4 * axes.get_xlim()[1])  # room for the longest bar's figure
    low, high = axes.get_xlim()
    ticks = [step * 10**power for power in range(-2, 4) for step in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return save(figure, path)
