# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The evaluation's statistics, decisions and figures, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from mambaformer.trainer.decisions import decision_of, score_decisions
from mambaformer.trainer.evaluation_plots import plot_answers, plot_runs, plot_shares
from mambaformer.trainer.evaluation_policies import sequence_rules
from mambaformer.trainer.evaluation_statistics import (
    PairedBootstrap,
    auroc,
    average_precision,
    reliability,
    run_lengths,
)


def test_bootstrap_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = PairedBootstrap(400, 4000).mean(values)
    error = values.std() / 20
    assert interval["value"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert interval["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_bootstrap_agrees_with_scipy():
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    generator = np.random.default_rng(2)
    above, below = generator.exponential(size=80), generator.uniform(1, 2, size=80)
    theirs = bootstrap(
        (above, below), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile", rng=3
    ).confidence_interval
    ours = PairedBootstrap(80, 9999).ratio(above, below)
    width = theirs.high - theirs.low
    assert ours["low"] == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.05 * width)


def test_a_constant_difference_has_no_spread_though_both_scores_have():
    scores = np.random.default_rng(0).uniform(size=50)
    bootstrap = PairedBootstrap(50, 500)
    apart = bootstrap.mean((scores + 0.1) - scores)
    assert apart["low"] == pytest.approx(0.1) and apart["high"] == pytest.approx(0.1)
    assert bootstrap.mean(scores)["high"] - bootstrap.mean(scores)["low"] > 0.05
    assert bootstrap.mean(scores) == PairedBootstrap(50, 500).mean(scores) != PairedBootstrap(50, 500, 1).mean(scores)


def test_a_ratio_to_nothing_is_no_number():
    interval = PairedBootstrap(3, 10).ratio(np.ones(3), np.zeros(3))
    assert all(np.isnan(value) for value in interval.values())
    with pytest.raises(ValueError, match="0 questions"):
        PairedBootstrap(0)


def test_classifier_figures_on_known_rankings():
    labels = np.array([0, 0, 1, 1])
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auroc(np.zeros(4), labels) == 0.5
    assert np.isnan(auroc(np.zeros(2), np.ones(2)))
    assert average_precision(np.array([0.1, 0.4, 0.35, 0.8]), labels) == pytest.approx((1 + 2 / 3) / 2)
    bins = reliability(np.array([0.2] * 10 + [0.8] * 10), np.array([1.0] * 2 + [0.0] * 8 + [1.0] * 8 + [0.0] * 2), 2)
    assert bins["ece"] == pytest.approx(0.0) and bins["observed"] == [0.2, 0.8] and bins["count"] == [10, 10]
    assert reliability(np.full(4, 0.9), np.zeros(4))["ece"] == pytest.approx(0.9)


def test_run_lengths_and_gaps():
    runs, gaps = run_lengths([np.array([0, 1, 1, 0, 0, 0, 1]), np.array([0, 0]), np.array([1, 0, 1])])
    assert runs == [2, 1, 1, 1] and gaps == [3, 1]


def test_decisions_beside_the_majority():
    assert decision_of("Yes, it is.") == "yes" and decision_of(" - maybe") == "maybe"
    assert decision_of("Nothing is known.") is None and decision_of("") is None
    scores = score_decisions(["yes", "no", None, "yes"], ["yes", "no", "maybe", "no"])
    assert scores["accuracy"] == 0.5 and scores["decided"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["majority_accuracy"] == 0.5
    assert scores["majority_macro_f1"] == pytest.approx((2 * 2 / (4 + 2)) / 3)
    with pytest.raises(ValueError, match="'perhaps' is no decision"):
        score_decisions(["yes"], ["perhaps"])


def test_rules_by_sequence_spend_the_budget():
    features = {"length": np.array([4.0, 1.0, 3.0, 2.0])}
    up, down = sequence_rules(features, np.full(4, 10.0), budget=5.0)
    assert up.chosen(features).tolist() == [True, False, True, False]
    assert down.chosen(features).tolist() == [False, True, False, True]
    none, _ = sequence_rules(features, np.full(4, 10.0), budget=0.0)
    every, _ = sequence_rules(features, np.full(4, 10.0), budget=10.0)
    assert not none.chosen(features).any() and every.chosen(features).all()


def test_figures_of_hard_cases_are_drawn(tmp_path):
    """No runs at all, no groups, dollar signs and words longer than a line."""
    pytest.importorskip("matplotlib")
    pieces = [("It", False), (" costs", True), (" $5", True), (" and $6", False), (" " + "x" * 200, False), ("", True)]
    drawn = [
        plot_runs({"a": ([], []), "b": ([1, 2, 90], [40, 3])}, tmp_path / "runs.png"),
        plot_shares({"a": [0.1, 0.2]}, {}, {}, tmp_path / "shares.png"),
        plot_answers([{"question": "What?" * 40, "pieces": pieces}], tmp_path / "answers.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
