# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""An evaluation as files: JSON, Markdown, arrays, answers and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation_plots import (
    plot_answers,
    plot_captured,
    plot_pareto,
    plot_reliability,
    plot_runs,
    plot_shares,
)
from .evaluation_report import METRIC_LABELS, all_tables, to_markdown
from .evaluation_run import Evaluation
from .evaluation_statistics import run_lengths
from .training_plots import TRACES_FIGURE, Traces, plot_traces


def write_files(folder: Path, found: Evaluation, traces: Traces | None = None) -> None:
    """
    Write all files of an evaluation into `folder`, which exists; figures are of MambaFormer as it comes.

    Args:
        traces: what the model's training logged, to be drawn too.
    """
    result = found.result
    runs = {split: run_lengths(answers["mambaformer"].experts) for split, answers in found.answers.items()}
    for split, (lengths, gaps) in runs.items():
        result["splits"][split]["runs"] = {"runs": lengths, "gaps": gaps}
    figures = draw(folder, found, runs, traces)
    result = {**result, "figures": figures, "tables": all_tables(result)}
    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(to_markdown(result, figures), encoding="utf-8")
    arrays: dict[str, Any] = found.arrays
    np.savez_compressed(folder / "per_question.npz", **arrays)
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for split, by_policy in found.answers.items():
            questions = found.questions[split]
            for row, name in enumerate(questions.ids):
                record = {"split": split, "id": name, **questions.texts[row]}
                record["answers"] = {policy: answers.texts[row] for policy, answers in by_policy.items()}
                record["et5_tokens"] = np.flatnonzero(by_policy["mambaformer"].experts[row] == 1).tolist()
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def draw(
    folder: Path, found: Evaluation, runs: dict[str, tuple[list[int], list[int]]], traces: Traces | None = None
) -> list[str]:
    """Draw all figures; returns the names of the files."""
    splits = found.result["splits"]
    quality = {split: values["policies"] for split, values in splits.items()}
    drawn = []
    for metric in ("bert_score", "token_f1"):
        if all(metric in row["scores"] for rows in quality.values() for row in rows.values()):
            note = f"BERTScore by {found.result['bert_score_model']}" if metric == "bert_score" else ""
            drawn.append(plot_pareto(quality, metric, METRIC_LABELS[metric], folder / f"pareto_{metric}.png", note))
    likelihoods = {split: values["likelihood"]["policies"] for split, values in splits.items()}
    drawn.append(plot_captured(likelihoods, folder / "captured.png"))
    drawn.append(plot_reliability({s: v["router"] for s, v in splits.items()}, folder / "reliability.png"))
    shares = {split: values["shares"] for split, values in splits.items()}
    drawn.append(
        plot_shares(
            {split: values["position"] for split, values in shares.items()},
            pooled([values.get("length_class", {}) for values in shares.values()]),
            pooled([values.get("field", {}) for values in shares.values()]),
            folder / "shares.png",
        )
    )
    drawn.append(plot_runs(runs, folder / "runs.png"))
    for split, answers in found.pieces.items():
        if answers:
            drawn.append(plot_answers(answers, folder / f"answers_{split}.png"))
    if traces is not None:
        drawn.append(plot_traces(traces, folder / TRACES_FIGURE))
    return [path.name for path in drawn]


def pooled(groups: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Shares of tokens by group, over all splits."""
    totals: dict[str, list[float]] = {}
    for group in groups:
        for name, counts in group.items():
            pair = totals.setdefault(name, [0.0, 0.0])
            pair[0] += counts["et5"]
            pair[1] += counts["tokens"]
    return {name: et5 / max(1.0, tokens) for name, (et5, tokens) in totals.items()}


def finite(value):
    """`value` with numbers that JSON cannot hold, NaN and infinities, as None."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
