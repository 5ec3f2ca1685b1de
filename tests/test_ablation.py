# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Every loss term and every router feature group can be switched off, from the YAML file to the saved model."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.configuration.configuration_mambaformer import MambaFormerConfig
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.losses import LOSS_TERMS
from mambaformer.trainer.run import main
from mambaformer.trainer.trainer import MambaFormerTrainer

TOKENIZER = tiny_tokenizer()
GROUPS = ("complexity", "length", "domain", "past")


def trainer_of(model, folder, **fields) -> MambaFormerTrainer:
    """A joint stage with every term at work."""
    weights = {f"w_{name}": 0.5 for name in LOSS_TERMS}
    args = MambaFormerTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", **{"stage": "joint", **weights, **fields}
    )
    rows = tokenize_qa(Dataset.from_list(tiny_rows(8)), TOKENIZER, 48, 16)
    return MambaFormerTrainer(model=model, args=args, train_dataset=rows, processing_class=TOKENIZER)


def test_each_loss_term_off_in_turn(model, tmp_path):
    """Without a term the loss is less by it, its figure is not logged, and all others stay as they are."""
    trainer = trainer_of(model, tmp_path, price="0.3")
    model.eval()  # no dropout
    batch = Collator(TOKENIZER)([trainer.train_dataset[i] for i in range(4)])
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def loss_and_terms() -> tuple[float, dict[str, float]]:
        trainer._logged["eval"].clear()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        logged = trainer._logged["eval"]
        return float(loss.detach()), {name[5:]: float(v[0]) for name, v in logged.items() if name[:5] == "loss_"}

    whole, all_terms = loss_and_terms()
    assert set(all_terms) == set(LOSS_TERMS)
    for name in LOSS_TERMS:
        trainer.weights = {**dict.fromkeys(LOSS_TERMS, 0.5), name: 0.0}
        loss, terms = loss_and_terms()
        assert terms == pytest.approx({other: all_terms[other] for other in LOSS_TERMS if other != name}, rel=1e-4)
        assert loss == pytest.approx(whole - 0.5 * all_terms[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", ["adapt", "distil", "joint"])
def test_no_loss_at_all_is_refused(model, tmp_path, stage):
    off = {f"w_{name}": 0.0 for name, term in LOSS_TERMS.items() if stage in term.stages}
    with pytest.raises(ValueError, match=f"{stage}.*no loss.*w_expert" if stage != "distil" else "no loss.*w_util"):
        trainer_of(model, tmp_path, stage=stage, **off)


def test_dual_ascent_of_the_trainer_reaches_the_budget(model, tmp_path):
    trainer = trainer_of(model, tmp_path, price="0.0", price_rate=1.0, expert_budget=0.1)
    margins = 2 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    for _ in range(400):
        spent = float(torch.sigmoid((margins - trainer.routing.price) / 0.3).mean())
        trainer._step["threshold"].append(0.0)
        trainer._step["spent"].append(spent)
        trainer.adapt_routing()
    assert spent == pytest.approx(0.1, abs=1e-3) and trainer.routing.price > 1


@pytest.fixture
def composed(model, tmp_path) -> dict:
    """A configuration file's fields: the tiny model on disk, its data, few steps."""
    model.config.cost_table = {"pass": 3.0, "token": 0.2, "encoder": 10.0, "emamba": 1.0}
    with torch.no_grad():
        model.emamba.get_input_embeddings().weight[TOKENIZER.eos_token_id].normal_(std=0.2)
    model.save_pretrained(tmp_path / "composed")
    TOKENIZER.save_pretrained(tmp_path / "composed")
    return {
        "model_name_or_path": str(tmp_path / "composed"),
        "dataset": str(write_jsonl(tmp_path / "qa.jsonl", tiny_rows(20))),
        "output_dir": str(tmp_path / "out"),
        "cost_table": "keep",
        "calibrate": False,
        "score_samples": 0,
        "max_source_length": 48,
        "max_target_length": 16,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.001,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def run_yaml(tmp_path, fields: dict) -> dict:
    """Run a YAML file of `fields`; returns the training report."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert main([str(path)]) == 0
    return json.loads((tmp_path / "out" / "training_report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("off", GROUPS)
def test_each_feature_group_off_from_the_file_to_the_saved_model(model, composed, tmp_path, off):
    kept = [name for name in GROUPS if name != off]
    domain_weight = model.router.domain_weight.clone()
    report = run_yaml(tmp_path, {**composed, "stages": ["distil"], "router_features": kept, "distil": {"w_use": 0.0}})
    assert "loss_use" not in report["stages"]["distil"] and report["stages"]["distil"]["loss_util"] > 0
    saved = type(model).from_pretrained(tmp_path / "out" / "model")
    assert saved.config.router_features == kept
    assert saved.router.uses_past == (off != "past")
    assert saved.router.feature_proj.in_features < model.router.feature_proj.in_features or off == "past"
    torch.testing.assert_close(saved.router.domain_weight, domain_weight)


def test_unknown_feature_group_is_named(composed, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**composed, "router_features": ["smell"]}), encoding="utf-8")
    assert main([str(path)]) == 2
    assert "smell" in capsys.readouterr().err


def test_all_groups_are_covered():
    assert tuple(MambaFormerConfig().router_features) == GROUPS


def test_three_stages_from_one_file_with_curves_in_tensorboard(composed, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    weights = {f"w_{name}": 0.1 for name in LOSS_TERMS}
    fields = {
        **composed,
        "stages": ["adapt", "distil", "joint"],
        "report_to": "tensorboard",
        **weights,
        "max_steps": 3,
    }
    report = run_yaml(tmp_path, fields)
    assert list(report["stages"]) == ["adapt", "distil", "joint"]
    routing = {"lambda", "lambda_per_ms", "tau", "share", "soft_share", "expected_cost", "expected_cost_ms", "passes"}
    routing |= {"caught_up_tokens", "encoder_calls", "oracle_gain", "router_gain", "oracle_gap"}
    for stage in report["stages"]:
        terms = {f"loss_{name}" for name, term in LOSS_TERMS.items() if stage in term.stages}
        expected = terms | (routing if stage != "adapt" else {"nll_et5", "nll_emamba"}) | {"loss"}
        (file,) = (tmp_path / "out" / stage).glob("runs/**/events.*")
        events = accumulator.EventAccumulator(str(file.parent))
        events.Reload()
        missing = {name for name in expected if f"train/{name}" not in events.Tags()["scalars"]}
        assert not missing, stage
        curves = {name: [event.value for event in events.Scalars(f"train/{name}")] for name in expected}
        assert {len(curve) for curve in curves.values()} == {3}
        assert all(torch.isfinite(torch.tensor(curve)).all() for curve in curves.values())
        if stage == "joint":
            assert len(set(curves["lambda"])) == 3  # dual ascent is at work
            ratio = [
                cost / unit for cost, unit in zip(curves["expected_cost_ms"], curves["expected_cost"], strict=True)
            ]
            assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-4)
