# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""An ablation's result as one table, in the form that `report.py` fills into a document."""

from __future__ import annotations

from ..trainer.evaluation_report import RULE_LABELS, heading, number, span
from .ablation_scores import GATED, OPEN
from .ablation_variants import WHOLE

METRICS = ("bert_score", "token_f1")


def table_of(result: dict) -> dict:
    """
    `columns`, `rows` and `note`.

    A row a variant: with the gate open, the share of the oracle's gain on each split; on the first one how far it
    lies above the whole router's, switches and ET5's milliseconds an answer; behind the gate share and milliseconds;
    and of its answers each metric, less that of the whole router.
    """
    splits = list(result["questions"])
    first = splits[0]
    variants = result["variants"]
    answered = variants[WHOLE].get("answers")
    metrics = [metric for metric in METRICS if answered and metric in answered["scores"]]
    columns = ["Router", *(f"Oracle's gain, {split}" for split in splits), f"less the first row's, {first}"]
    columns += ["Switches", "ET5 ms", "Behind its gate", "ET5 ms then"]
    columns += [f"{heading(metric, result['bert_score_model'])}, less" for metric in metrics]
    rows = []
    for name, found in variants.items():
        by_router, gated = found["splits"][first][OPEN], found["splits"][first][GATED]
        row = [found["label"], *(span(found["splits"][split][OPEN]["captured"], 2) for split in splits)]
        row.append("" if name == WHOLE else span(by_router["less"], 2))
        row += [number(by_router["switches"], 2), number(by_router["cost_ms"], 1)]
        row += [number(gated["captured"]["value"], 2), number(gated["cost_ms"], 1)]
        if metrics and name == WHOLE:
            row += [f"({number(answered['scores'][metric]['value'])})" for metric in metrics]
        elif metrics:
            row += [span(found["answers"]["less"][metric]) for metric in metrics]
        rows.append(row)
    for rule in next(iter(result["rules"].values())):
        shares = [span(result["rules"][split][rule], 2) for split in splits]
        rows.append([RULE_LABELS[rule], *shares, *[""] * (len(columns) - 1 - len(shares))])
    return {"columns": columns, "rows": rows, "note": note_of(result, first, bool(metrics))}


def note_of(result: dict, first: str, answered: bool) -> str:
    """What the columns are, and from how many questions."""
    counts = ", ".join(f"{count} questions of {split}" for split, count in result["questions"].items())
    text = (
        f"Routers distilled again on {result['distil_rows']} questions in {result['variants'][WHOLE]['steps']} steps, "
        "on the same experts, with all else equal. "
        f"Share of the oracle's gain on gold answers at {100 * result['budget']:g} % of the tokens ({counts}), "
        "gate open and thresholds of the split itself; switches between the experts and what ET5 costs "
        f"an answer are on {first}. Brackets are 95 % intervals by a paired bootstrap over questions."
    )
    if answered:
        text += (
            f" Scores are of {result['answers']} answers to {first}, each router calibrated to the budget: the first "
            "row's own in parentheses, below it differences from them."
        )
    return text
