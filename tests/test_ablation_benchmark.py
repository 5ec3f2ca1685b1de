# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Routers distilled again: from kept readings as from EMamba itself, and the whole benchmark on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.benchmarks import ablation, machine, report
from mambaformer.benchmarks.ablation_variants import VARIANTS
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.evaluation_likelihood import switches
from mambaformer.trainer.kept_readings import KeptReadings
from mambaformer.trainer.router_pass import run_router

TOKENIZER = tiny_tokenizer()


def test_kept_readings_route_as_emamba_itself_does(model):
    """Values and gradients, in other batches than those in which the rows were read."""
    rows = tokenize_qa(Dataset.from_list(tiny_rows(12)), TOKENIZER, 48, 16)
    readings = KeptReadings()
    for members in (range(5), (11, 2, 7, 0, 9), range(12), range(12)):
        batch = Collator(TOKENIZER)([rows[i] for i in members])
        ended = batch["labels"] == -100
        decoder_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        arguments = model, batch["input_ids"], batch["attention_mask"], decoder_ids, 0.1, ended
        results, gradients = [], []
        for route in (run_router, readings.route):
            said = route(*arguments)
            model.zero_grad()
            (said.margin[~ended].sin().sum() + said.gate_logit.sin().sum()).backward()
            results.append(said)
            parts = (model.router, model.gate)
            gradients.append([p.grad.clone() for part in parts for p in part.parameters()])
        own, kept = results
        assert 0 < int((own.expert == 1).sum()) < int((~ended).sum())
        assert torch.equal(own.expert, kept.expert) and torch.equal(own.gap[~ended], kept.gap[~ended])
        for name in ("margin", "encoded"):
            torch.testing.assert_close(getattr(kept, name)[~ended], getattr(own, name)[~ended], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept.gate_logit, own.gate_logit, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert readings.read == len(readings.rows) == 12


def test_switches_are_counted_within_answers():
    expert = torch.tensor([[0, 1, 1, 0, -1, -1], [1, 1, 1, 1, 1, 0], [0, 0, -1, -1, -1, -1]])
    assert switches(expert).tolist() == [2, 1, 0]


def test_every_term_and_every_group_is_off_in_turn():
    weights = [variant.weights for variant in VARIANTS.values() if variant.weights]
    off = {name for changed in weights for name, value in changed.items() if not value}
    assert off == {"w_use", "w_burst", "w_z", "w_gate", "w_util"}
    assert {variant.without for variant in VARIANTS.values()} == {None, "complexity", "length", "domain", "past"}


@pytest.fixture
def benchmark(model, tmp_path, monkeypatch):
    """A function that runs the benchmark on a tiny model on disk; it returns the result."""
    model.config.cost_table = {"pass": 2.0, "token": 0.1, "encoder": 4.0, "emamba": 1.0}
    model.config.expert_budget, model.config.max_target_length = 0.2, 16
    with torch.no_grad():
        model.emamba.get_input_embeddings().weight[TOKENIZER.eos_token_id].normal_(std=0.2)
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    data = str(write_jsonl(tmp_path / "qa.jsonl", tiny_rows(24)))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    fields = ["--dataset", data, "--distil_dataset", data, "--validation_dataset", data]
    fields += ["--max_source_length", "48", "--max_target_length", "16", "--expert_budget", "0.2"]
    fields += ["--lexicon", "dental_qa", "--per_device_train_batch_size", "8"]

    def run(*words: str) -> dict:
        argv = ["--model", str(tmp_path / "tiny"), "--run", str(tmp_path / "run"), "--data", data, "--splits", "test"]
        argv += ["--rows", "10", "--calibration-rows", "8", "--bert-score", "none", "--resamples", "50", *fields]
        assert ablation.main([*argv, *words]) == 0
        return json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))

    return run


def test_the_benchmark_on_a_tiny_model(benchmark, tmp_path):
    steps = ["--steps", "3", "--distil.warmup_steps", "0", "--distil.learning_rate", "0.1"]
    result = benchmark("--variants", "no_burst", "no_complexity", "--answers", "4", *steps)
    assert list(result["variants"]) == ["whole", "no_burst", "no_complexity"]
    assert {"machine", "command", "columns", "rows", "note", "cost_table"} <= set(result)
    assert str(tmp_path) not in json.dumps(result)
    whole, without = result["variants"]["whole"], result["variants"]["no_complexity"]
    assert "loss_burst" in whole["losses"] and "loss_burst" not in result["variants"]["no_burst"]["losses"]
    assert whole["losses"]["loss_util"] != without["losses"]["loss_util"]
    for name, found in result["variants"].items():
        assert found["steps"] == 3
        by_router = found["splits"]["test"]["router"]
        assert by_router["captured"]["value"] <= 1 and by_router["share"] == pytest.approx(0.2, abs=0.1)
        assert ("less" in by_router) == ("less" in found["answers"]) == (name != "whole")
        assert 0 <= found["answers"]["scores"]["token_f1"]["value"] <= 1
    assert without["splits"]["test"]["router"]["less"]["value"] != 0  # another router
    utilities = list((tmp_path / "run" / "utilities").glob("*/*.arrow"))
    assert len(utilities) == 1  # asked once, for all
    block = report.fill("<!-- begin: ablation -->\n<!-- end -->\n")
    assert "| no burst term |" in block and "Measured on" in block and block.count("\n| ") == len(result["rows"]) + 2

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("routers-*/*/finished/*")}
    assert len(times) == 3 * 3
    again = benchmark("--variants", "no_complexity", "--answers", "0", "--resume", *steps)
    assert {file: file.stat().st_mtime_ns for file in times} == times  # taken up, not trained
    again = again["variants"]["no_complexity"]
    assert again["splits"]["test"]["router"]["captured"] == pytest.approx(
        without["splits"]["test"]["router"]["captured"]
    )
    assert "answers" not in again
    other = benchmark("--variants", "no_gate", "--answers", "0", "--resume", "--distil.max_steps", "1")["variants"]
    assert other["whole"]["steps"] == 1  # a router of other settings is not taken up
    assert "loss_gate" in other["whole"]["losses"] and "loss_gate" not in other["no_gate"]["losses"]
    assert other["no_gate"]["splits"]["test"]["mambaformer"]["gate_threshold"] is None


@pytest.mark.parametrize(
    ("words", "named"), [(["--distil.max_stepz", "2"], "max_stepz"), (["--config", "nowhere.yaml"], "nowhere.yaml")]
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, named):
    words += ["--distil_dataset", "questions.jsonl", "--validation_dataset", "questions.jsonl"]
    assert ablation.main(["--model", str(tmp_path), "--run", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and named in error and len(error.splitlines()) == 1
