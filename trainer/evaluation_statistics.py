# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Intervals by a paired bootstrap over questions, and what says how good a router is as a classifier."""

from __future__ import annotations

import numpy as np

Interval = dict[str, float]
"""`value`, and the `low` and `high` ends of its interval."""


class PairedBootstrap:
    """
    Percentile intervals over resampled questions (Efron and Tibshirani, 1993, section 13). All statistics of one
    instance share its resamples, so that differences are paired.

    Args:
        questions: how many there are. resamples: how often they are drawn again, with replacement. level: coverage.
    """

    def __init__(self, questions: int, resamples: int = 2000, seed: int = 0, level: float = 0.95):
        if questions < 1 or resamples < 1:
            raise ValueError(f"{questions} questions and {resamples} resamples: give at least one of each.")
        self.level = level
        drawn = np.random.default_rng(seed).integers(questions, size=(resamples, questions))
        self.counts = np.stack([np.bincount(row, minlength=questions) for row in drawn]).astype(float)  # (R, n)

    def mean(self, values: np.ndarray) -> Interval:
        """Of the mean of `(n,)` values; differences of two policies are given as their values' differences."""
        return self.ratio(values, np.ones(len(values)))

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """Of sum over sum of `(n,)` values; NaN where the lower sum is 0."""
        above, below = np.asarray(above, float), np.asarray(below, float)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (self.counts @ above) / (self.counts @ below)  # (R,)
            value = above.sum() / below.sum()
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn) or not np.isfinite(value):
            return {"value": float("nan"), "low": float("nan"), "high": float("nan")}
        tail = 100 * (1 - self.level) / 2
        low, high = np.percentile(drawn, [tail, 100 - tail])
        return {"value": float(value), "low": float(low), "high": float(high)}


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties by half; NaN without both. Inputs `(n,)`."""
    labels = np.asarray(labels, bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each distinct value, counted from 1
    return float((ranks[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean precision at the positives in falling order of `scores` `(n,)`; NaN without a positive."""
    ordered = np.asarray(labels, float)[np.argsort(-np.asarray(scores), kind="stable")]
    if not ordered.sum():
        return float("nan")
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float((precision * ordered).sum() / ordered.sum())


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int = 15) -> dict:
    """
    Bins of equal size of `probability` `(n,)` against how often it `happened` `(n,)`.

    Returns:
        lists `predicted`, `observed`, `count`, and `ece` (mean distance, weighted by count) and `brier`.
    """
    order = np.argsort(probability, kind="stable")
    groups = [group for group in np.array_split(order, min(bins, len(order))) if len(group)]
    predicted = [float(np.mean(probability[group])) for group in groups]
    observed = [float(np.mean(happened[group])) for group in groups]
    count = [len(group) for group in groups]
    distance = np.abs(np.array(predicted) - np.array(observed))
    return {
        "predicted": predicted,
        "observed": observed,
        "count": count,
        "ece": float(np.average(distance, weights=count)),
        "brier": float(np.mean((probability - happened) ** 2)),
    }


def run_lengths(experts: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """
    Lengths of ET5's runs, and of EMamba's stretches between two of them, in answers' choices (1: ET5).

    What lies before an answer's first call and after its last is no gap.
    """
    runs, gaps = [], []
    for choices in experts:
        called = np.flatnonzero(np.asarray(choices) == 1)
        if not len(called):
            continue
        pieces = np.split(called, np.flatnonzero(np.diff(called) > 1) + 1)
        runs += [len(piece) for piece in pieces]
        gaps += [int(after[0] - before[-1] - 1) for before, after in zip(pieces, pieces[1:], strict=False)]
    return runs, gaps
