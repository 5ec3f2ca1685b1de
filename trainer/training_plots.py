# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What a finished training run logged, read back from its folder and drawn: losses, price, share, ET5's work, gain.

One row of panels a stage, a panel a quantity; what a stage did not log has no panel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import STAGES
from .checkpoints import NAME, STATE
from .evaluation_plots import EMAMBA_COLOUR, ET5_COLOUR, GREY, OWN_COLOUR, SPLIT_COLOURS, pyplot, save
from .trainer import STATE_FILE
from .training_run import FINISHED, LOG_FILE

TRACES_FIGURE = "training_traces.png"
COLOURS = {
    "loss": "#000000",
    "nll_et5": ET5_COLOUR,
    "nll_emamba": EMAMBA_COLOUR,
    "lambda": OWN_COLOUR,
    "share": ET5_COLOUR,
    "soft_share": GREY,
    "oracle_gain": GREY,
    "router_gain": OWN_COLOUR,
    "oracle_gap": ET5_COLOUR,
}
LABELS = {
    "loss": "weighted sum",
    "nll_et5": "ET5",
    "nll_emamba": "EMamba",
    "lambda": "λ",
    "share": "tokens routed",
    "soft_share": "mean probability",
    "encoder_calls": "encoder runs",
    "oracle_gain": "oracle's gain",
    "router_gain": "router's gain",
    "oracle_gap": "gap to the oracle",
}


@dataclass(frozen=True)
class Panel:
    """
    A quantity: its title with the unit, which logged names belong to it, whether a log scale suits positive values,
    whether the axis starts at 0, and whether the values are shares, drawn in per cent with their target.
    """

    title: str
    takes: Callable[[str], bool]
    log: bool = False
    from_zero: bool = False
    target: bool = False


PANELS = (
    Panel("loss and its parts, unweighted", lambda name: name == "loss" or name.startswith("loss_"), log=True),
    Panel("gold answers (nats a token)", lambda name: name.startswith("nll_")),
    Panel("price λ (nats an average call)", lambda name: name == "lambda", from_zero=True),
    Panel("share of ET5, of tokens (%)", lambda name: name in ("share", "soft_share"), log=True, target=True),
    Panel("ET5's work an answer", lambda name: name in ("passes", "encoder_calls"), from_zero=True),
    Panel("gain over EMamba (nats a token)", lambda name: name in ("oracle_gain", "router_gain", "oracle_gap")),
)


@dataclass
class Traces:
    """
    What a run logged.

    Attributes:
        stages: by name, in the order of training, the entries of the trainer's log, each with its `step`.
        share: target share of ET5's tokens, `None` where the folder does not say.
    """

    stages: dict[str, list[dict[str, float]]]
    share: float | None = None


def read_traces(folder: Path) -> Traces:
    """
    The log of each stage in a run's output folder: what was kept when it finished, else its last checkpoint's.

    Raises:
        ValueError: where the folder holds no log, or one that cannot be read, naming it.
    """
    folder = Path(folder)
    kept = {name: entries for name in STAGES if (entries := stage_log(folder / name))}
    if not kept:
        raise ValueError(
            f"{folder} holds no log of a training stage: give the output_dir of a finished run of trainer/run.py, "
            f"which holds {STAGES[0]}/{FINISHED}/{LOG_FILE} or another stage's."
        )
    report_file = folder / "training_report.json"
    report = parsed(report_file.read_text(encoding="utf-8"), report_file) if report_file.is_file() else {}
    order = [name for name in report.get("stages", {}) if name in kept]
    order += [name for name in kept if name not in order]
    share = report.get("calibration", {}).get("target_share")
    for name in order if share is None else ():
        for state in (path / STATE_FILE for path in checkpoints(folder / name)):
            share = parsed(state.read_text(encoding="utf-8"), state)["share"] if state.is_file() else share
    return Traces({name: kept[name] for name in order}, share)


def stage_log(folder: Path) -> list[dict[str, float]]:
    """The entries of a stage's folder, none where it keeps none."""
    path = folder / FINISHED / LOG_FILE
    if path.is_file():
        return [parsed(line, path) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for path in (checkpoint / STATE for checkpoint in reversed(checkpoints(folder))):
        if path.is_file():
            return parsed(path.read_text(encoding="utf-8"), path)["log_history"]
    return []


def checkpoints(folder: Path) -> list[Path]:
    """A stage's checkpoints, by their steps."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def parsed(text: str, path: Path) -> Any:
    """JSON `text` of the file `path`, which an error names."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): train that stage again, or remove its folder.") from None


def curve(entries: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged name, `(n,)` each."""
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return np.array([step for step, _ in points], float), np.array([value for _, value in points], float)


def panels_of(entries: list[dict[str, float]]) -> dict[Panel, list[str]]:
    """The panels of a stage, and the logged names that belong to each, in the order in which they were logged."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    found = {panel: [name for name in names if panel.takes(name)] for panel in PANELS}
    return {panel: sorted(taken, key=lambda name: name != "loss") for panel, taken in found.items() if taken}


def plot_traces(traces: Traces, path: Path) -> Path:
    """Draw a row of panels a stage; evaluation figures, where a stage logged any, are dashed."""
    rows = {stage: panels_of(entries) for stage, entries in traces.stages.items()}
    width = max(1, max(len(found) for found in rows.values()))
    size = (3.4 * width, 3.0 * len(rows))
    figure, grid = pyplot().subplots(len(rows), width, figsize=size, squeeze=False)
    for axes, (stage, found) in zip(grid, rows.items(), strict=True):
        for axis, (panel, names) in zip(axes, found.items(), strict=False):
            draw_panel(axis, panel, names, traces.stages[stage], traces.share)
        axes[0].set_ylabel(f"stage {stage}", fontweight="bold")
        for axis in axes[len(found) :]:
            axis.axis("off")
    return save(figure, path)


def draw_panel(
    axis: Any, panel: Panel, names: list[str], entries: list[dict[str, float]], share: float | None
) -> None:
    """One quantity of one stage."""
    scale = 100.0 if panel.target else 1.0
    drawn = []
    for number, name in enumerate(names):
        colour = COLOURS.get(name, SPLIT_COLOURS[number % len(SPLIT_COLOURS)])
        for logged, style in ((name, "-" if number <= len(SPLIT_COLOURS) else "-."), (f"eval_{name}", "--")):
            steps, values = curve(entries, logged)
            if len(steps):
                label = LABELS.get(name, name.removeprefix("loss_").replace("_", " "))
                label = f"{label}, evaluation" if logged != name else label
                marker = "." if len(steps) < 3 else ""
                axis.plot(steps, scale * values, style + marker, color=colour, linewidth=1.2, label=label)
                drawn.append(scale * values)
    if panel.target and share is not None:
        axis.axhline(100 * share, color="black", linewidth=0.8, linestyle=":", label="target")
    known = np.concatenate(drawn)
    if panel.log and (known > 0).all() and known.max() > 20 * known.min():
        axis.set_yscale("log")
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.set_title(panel.title)
    axis.set_xlabel("optimizer step")
    if len(names) > 1 or panel.target:
        axis.legend(fontsize=7, ncols=2 if len(names) > 4 else 1, frameon=True, framealpha=0.7, edgecolor="none")
