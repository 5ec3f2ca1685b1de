# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""PubMedQA's yes, no or maybe (arXiv 1909.06146): read off an answer's text, and scored beside the majority's."""

from __future__ import annotations

import re
from collections import Counter

DECISIONS = ("yes", "no", "maybe")
FIRST_WORD = re.compile(r"^\W*(yes|no|maybe)\b", re.IGNORECASE)


def decision_of(answer: str) -> str | None:
    """The decision that `answer` begins with; `None` where it begins with none, which counts as wrong."""
    found = FIRST_WORD.match(answer)
    return found[1].lower() if found else None


def with_decision(decision: str, answer: str) -> str:
    """An answer that begins with its decision, the form in which models learn it: `yes. <answer>`; blank if one is."""
    return f"{decision}. {answer}" if decision.strip() and answer.strip() else ""


def score_decisions(predicted: list[str | None], wanted: list[str]) -> dict[str, float]:
    """
    Accuracy and macro-F1 of decisions, `majority_accuracy` and `majority_macro_f1` of always giving the commonest one
    (the lines to beat), and `decided`, the share of the answers in which a decision was found.

    Raises:
        ValueError: for lists of different lengths, nothing to score, or a reference that is no decision.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"{len(predicted)} decisions for {len(wanted)} references: give one for each, at least one.")
    unknown = sorted(set(wanted) - set(DECISIONS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no decision: references are {', '.join(DECISIONS)}.")
    common = Counter(wanted).most_common(1)[0][0]
    majority: list[str | None] = [common] * len(wanted)
    return {
        "accuracy": accuracy(predicted, wanted),
        "macro_f1": macro_f1(predicted, wanted),
        "decided": sum(p is not None for p in predicted) / len(predicted),
        "majority_accuracy": accuracy(majority, wanted),
        "majority_macro_f1": macro_f1(majority, wanted),
    }


def accuracy(predicted: list[str | None], wanted: list[str]) -> float:
    """Share of equal decisions."""
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def macro_f1(predicted: list[str | None], wanted: list[str]) -> float:
    """Mean over the three decisions of F1, 0 for one that is neither given nor wanted."""
    total = 0.0
    for label in DECISIONS:
        hits = sum(p == w == label for p, w in zip(predicted, wanted, strict=True))
        either = sum(p == label for p in predicted) + sum(w == label for w in wanted)
        total += 2 * hits / either if either else 0.0
    return total / len(DECISIONS)
