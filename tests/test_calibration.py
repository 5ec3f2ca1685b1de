# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Calibration on generated answers, the sequence gate, and the measured cost table."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer.trainer.calibration import (
    Unrolled,
    calibrate,
    choose_gate,
    descending,
    unroll_generated,
    unroll_gold,
    without_cap,
)
from mambaformer.trainer.costs import measure_costs
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.distillation import add_utilities
from mambaformer.trainer.router_pass import run_router
from mambaformer.trainer.utility import CallCosts

TOKENIZER = tiny_tokenizer()
COSTS = {"pass": 2.0, "token": 0.1, "encoder": 4.0, "emamba": 1.0}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """32 tokenised rows."""
    return tokenize_qa(Dataset.from_list(tiny_rows(32)), TOKENIZER, 48, 16)


def test_share_of_generated_answers_meets_the_budget(model, rows):
    share = 0.2
    report = calibrate(model, rows, Collator(TOKENIZER), share, batch_size=16, gate=False, max_new_tokens=16, rounds=4)
    assert report["tokens"] > 150
    assert report["share"] == pytest.approx(share, abs=0.25 * share)
    config = model.config
    assert config.expert_budget == share and config.router_threshold == report["router_threshold"]
    assert config.threshold_for(share) == pytest.approx(config.router_threshold)
    shares, thresholds = zip(*config.threshold_table, strict=True)
    assert list(shares) == sorted(shares) and list(thresholds) == sorted(thresholds, reverse=True)
    with without_cap(model):
        _, again = unroll_generated(model, rows, Collator(TOKENIZER), 16, 16)
    assert again["share"] == pytest.approx(report["share"])
    assert config.expert_budget == share


def test_another_budget_by_the_table_has_about_its_share(model, rows):
    calibrate(model, rows, Collator(TOKENIZER), 0.1, batch_size=16, gate=False, max_new_tokens=16)
    model.config.router_threshold = model.config.threshold_for(0.3)
    with without_cap(model):
        _, measured = unroll_generated(model, rows, Collator(TOKENIZER), 16, 16)
    assert measured["share"] == pytest.approx(0.3, abs=0.12)


def test_unrolled_router_agrees_with_the_generated_trace(model, rows):
    batch = Collator(TOKENIZER)([rows[i] for i in range(6)])
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    result = model.generate(
        **source, routing="auto", expert_budget=1.0, max_new_tokens=10, do_sample=False, return_dict_in_generate=True
    )
    model.config.router_threshold = 0.0
    with without_cap(model):
        result = model.generate(**source, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    trace = result.route_trace
    done = trace.expert == -1
    said = run_router(model, **source, decoder_input_ids=result.sequences[:, :-1], threshold=0.0, ended=done)
    assert torch.equal(said.expert, trace.expert)
    torch.testing.assert_close(said.margin[~done], trace.margin[~done], rtol=1e-3, atol=1e-3)


def test_router_pass_runs_no_et5(model, rows):
    calls = []
    model.et5.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.et5.decoder.register_forward_hook(lambda *_: calls.append(1))
    batch = Collator(TOKENIZER)([rows[i] for i in range(4)])
    decoder_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    said = run_router(model, batch["input_ids"], batch["attention_mask"], decoder_ids, 0.0)
    said.margin.sum().backward()
    assert not calls
    assert all(p.grad is None for p in model.emamba.parameters())


def test_gate_closes_where_et5_gains_nothing(model, rows):
    collator = Collator(TOKENIZER)
    gold, delta = unroll_gold(model, add_utilities(model, rows, collator, 16), collator, 16)
    # ET5 helps in the sequences whose gate is above its median, and nowhere else.
    median = gold.gate_logit.median()
    helped = torch.where(gold.gate_logit[:, None] > median, 1.0, -1.0).expand_as(delta)
    costs = CallCosts.from_table(COSTS, 0.1, 6)
    threshold, table = choose_gate(model, gold, helped, 0.1, costs)
    assert threshold is not None and threshold >= float(median) - 1e-6
    best = next(row for row in table if row["gate_threshold"] == threshold)
    assert best["gain"] / best["cost"] > 1.02 * table[0]["gain"] / table[0]["cost"]
    assert gold.share(model, gold.threshold_for(model, 0.1, threshold), threshold) == pytest.approx(0.1, abs=0.02)


def test_gate_stays_open_where_et5_never_helps(model, rows):
    collator = Collator(TOKENIZER)
    gold, delta = unroll_gold(model, add_utilities(model, rows, collator, 16), collator, 16)
    assert choose_gate(model, gold, torch.full_like(delta, -1.0), 0.1, CallCosts.from_table(COSTS, 0.1, 6))[0] is None


def test_calibrated_gate_is_obeyed_by_generate(model, rows):
    model.config.cost_table = dict(COSTS)
    report = calibrate(model, rows, Collator(TOKENIZER), 0.2, batch_size=16, max_new_tokens=12)
    assert len(report["gate_candidates"]) == 10
    assert report["share"] == pytest.approx(0.2, abs=0.07)
    assert len(rows) == report["questions"]
    assert report["router_gain"] <= report["oracle_gain"]
    model.config.gate_threshold = 1e9
    batch = Collator(TOKENIZER)([rows[i] for i in range(4)])
    result = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=8,
        return_dict_in_generate=True,
    )
    assert int((result.route_trace.expert == 1).sum()) == 0


def test_share_falls_with_the_threshold(model, rows):
    collator = Collator(TOKENIZER)
    gold, _ = unroll_gold(model, add_utilities(model, rows, collator, 16), collator, 16)
    assert gold.share(model, -1e9) == 1.0 and gold.share(model, 1e9) == 0.0
    assert isinstance(gold, Unrolled) and gold.tokens == sum(map(len, rows["labels"]))


def test_threshold_table_is_made_monotone():
    assert descending({0.2: 1.0, 0.1: 0.5, 0.3: -1.0}) == [[0.1, 0.5], [0.2, 0.5], [0.3, -1.0]]


def test_costs_are_positive_and_the_model_is_left_as_it_was(model):
    model.train()
    before = torch.get_rng_state()
    table = measure_costs(model, source_length=12, target_length=6, repeats=3)
    assert set(table) == {"pass", "token", "encoder", "emamba"}
    assert table["encoder"] > 0 and table["emamba"] > 0 and table["pass"] + table["token"] > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
