# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A plain T5 beside the MambaFormer: its recipe, its answers, its time, and where it stands in what is written."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer import embedded_checkpoint
from mambaformer.trainer import embedded, evaluation_plots
from mambaformer.trainer.data import tokenize_qa
from mambaformer.trainer.embedded import PARTS
from mambaformer.trainer.evaluate import main
from mambaformer.trainer.evaluation_generation import PLAIN, Policy, time_answers, write_answers
from mambaformer.trainer.evaluation_models import load_plain
from mambaformer.trainer.evaluation_policies import milliseconds
from mambaformer.trainer.pretrain import build_expert, parse_arguments
from mambaformer.trainer.pretrain_data import collate_et5
from mambaformer.trainer.pretrain_loss import fuse_activations, pretraining_loss

TOKENIZER = tiny_tokenizer()
COSTS = {"pass": 2.0, "token": 0.1, "encoder": 4.0, "emamba": 1.0}
OWN = {"output_dir", "data", "threads", "max_minutes", "et5_d_model", "et5_d_ff", "et5_layers", "et5_heads"}
"""What the recipe says otherwise than the embedded default's."""
OF_THE_DATA = {"medquad", "rewordings", "context_rows", "max_source_tokens", "max_context_words"}
"""What was settled when the data were prepared."""


@pytest.fixture
def plain_folder(et5_folder, tmp_path):
    """The tiny ET5 as a checkpoint of its own, which ends rarely, with the tokenizer."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in et5_folder.iterdir():
        (folder / file.name).symlink_to(file)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return tokenize_qa(Dataset.from_list(tiny_rows(14)), TOKENIZER, 48, 16)


def recipe(root, name: str):
    return parse_arguments([str(root / "trainer" / "configs" / f"{name}.yaml")])


def test_the_recipe_differs_from_the_embedded_default_in_size_alone(repo_root):
    plain, base = recipe(repo_root, "embedded_plain_t5"), recipe(repo_root, "embedded_pretrain")
    ours = {key for key, value in vars(plain).items() if value != vars(base)[key]}
    reading = {"reading_from", "reading_factor"}  # which embedded.py gives its ET5 on the command line
    assert {key for key in ours if not key.startswith("emamba_")} - OF_THE_DATA - reading <= OWN
    given = dict(zip(PARTS["embedded_pretrain"]["et5"][::2], PARTS["embedded_pretrain"]["et5"][1::2], strict=True))
    assert plain.reading_factor == float(given["--reading_factor"]) and plain.reading_from
    assert plain.data_dir == base.data_dir and plain.output_dir != base.output_dir
    assert plain.threads * plain.max_minutes == 2 * base.threads * base.max_minutes  # both experts, one core each


def test_both_go_through_the_same_parts(monkeypatch, tmp_path):
    """Every expert and every part once, in order, with as many minutes of a core on either side; none again."""
    monkeypatch.chdir(tmp_path)
    given = []

    def train(module, file, *arguments):
        made = parse_arguments([file, *arguments])
        assert module == "pretrain" and made.stage == "train"
        assert not made.initial_dir or (Path(made.initial_dir) / made.expert / "config.json").is_file()
        given.append(made)
        (Path(made.output_dir) / made.expert).mkdir(parents=True)
        (Path(made.output_dir) / made.expert / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(embedded, "command", train)
    embedded.pretrain_experts()
    experts = given.copy()
    embedded.pretrain_plain()
    plain = given[len(experts) :]
    assert sorted((made.expert, made.output_dir) for made in experts) == sorted(
        (expert, f"runs/{part}") for part in PARTS for expert in ("et5", "emamba")
    )
    spent = [sum(made.threads * made.max_minutes for made in side) for side in (experts, plain)]
    assert spent[0] == spent[1] and len({made.data_dir for made in given}) == 1
    ours = next(made for made in experts if made.expert == "et5" and made.question_noise)
    assert [made.question_noise for made in plain] == [0.0, ours.question_noise]
    assert plain[1].weights == ours.weights and plain[1].learning_rate == ours.learning_rate
    embedded.pretrain_experts()
    embedded.pretrain_plain()
    assert given == experts + plain


def test_twice_the_parameters_of_the_shipped_model_and_a_step_that_trains_all(repo_root):
    made = recipe(repo_root, "embedded_plain_t5")

    class Vocabulary:
        pad_token_id, eos_token_id = 0, 1

        def __len__(self):
            return recipe(repo_root, "embedded_pretrain").vocab_size

    with safe_open(embedded_checkpoint() / "model.safetensors", "pt") as file:
        shipped = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    model = fuse_activations(build_expert(made, Vocabulary()))
    assert 2 * shipped <= model.num_parameters() <= 2.5 * shipped
    assert model.lm_head.weight is not model.shared.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batch = collate_et5([(np.array([50, 60, 70, 1]), np.array([60, 70, 1])), (np.array([40, 1]), np.array([30, 1]))])
    first = pretraining_loss(model, made.expert, batch)
    first.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    optimizer.step()
    with torch.no_grad():
        assert float(pretraining_loss(model, made.expert, batch)) < float(first)


def test_answers_are_those_of_the_same_t5_asked_for_every_token(model, rows, plain_folder):
    plain = load_plain(str(plain_folder), TOKENIZER)
    wanted = write_answers(model, TOKENIZER, rows, Policy("et5", "", "et5"), 14, max_new_tokens=9)
    for size in (14, 5, 1):
        found = write_answers(model, TOKENIZER, rows, Policy(PLAIN, "", plain=plain), size, max_new_tokens=9)
        assert found.texts == wanted.texts and len(set(found.texts)) > 3
        assert np.array_equal(found.counts["tokens"], wanted.counts["tokens"])
        assert all(np.array_equal(a, b) for a, b in zip(found.ids, wanted.ids, strict=True))
    assert all((experts == -1).all() for experts in found.experts)
    assert np.isnan(found.cost(milliseconds(COSTS))).all() and np.isnan(found.counts["et5"]).all()
    model.config.max_target_length = 4
    short = write_answers(model, TOKENIZER, rows, Policy(PLAIN, "", plain=plain), 14)
    assert set(short.counts["tokens"]) == {4.0}  # the model's own limit, where none is given


def test_an_answer_ends_with_its_first_end(model, rows, plain_folder):
    plain = load_plain(str(plain_folder), TOKENIZER)
    policy = Policy(PLAIN, "", plain=plain)
    whole = write_answers(model, TOKENIZER, rows, policy, 14, max_new_tokens=9)
    end = int(whole.ids[0][3])
    plain.generation_config.eos_token_id = [1, end]
    cut = write_answers(model, TOKENIZER, rows, policy, 14, max_new_tokens=9)
    for before, after in zip(whole.ids, cut.ids, strict=True):
        ends = np.flatnonzero(np.isin(before, [1, end]))
        assert np.array_equal(after, before[: ends[0] + 1] if len(ends) else before)
    assert len(cut.ids[0]) <= 4 and cut.counts["tokens"][0] == len(cut.ids[0])


def test_it_takes_its_turn_at_every_timed_question(model, rows, plain_folder):
    plain = load_plain(str(plain_folder), TOKENIZER)
    plain.config.use_cache = plain.generation_config.use_cache = False  # as a checkpoint of a training run may say
    asked, lengths, fed = [], [], []
    plain.decoder.register_forward_pre_hook(
        lambda _, a, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    plain.encoder.register_forward_hook(lambda *_: asked.append(len(lengths)))
    model.emamba.backbone.register_forward_hook(lambda *_: lengths.append(0))
    policies = [Policy("emamba", "", "emamba"), Policy(PLAIN, "", plain=plain)]
    times = time_answers(model, TOKENIZER, rows.select(range(4)), policies, {}, max_new_tokens=5)
    assert len(asked) == 5 and len(set(asked)) >= 3  # once before, uncounted; the other policy's work lies between
    assert set(fed) == {1}  # keys and values of what was written are kept: the time is not made longer than it need be
    assert len(times[PLAIN]["seconds"]) == 4 and (times[PLAIN]["seconds"] > 0).all()
    written = write_answers(model, TOKENIZER, rows.select(range(4)), policies[1], 4, max_new_tokens=5)
    assert times[PLAIN]["tokens"].tolist() == written.counts["tokens"].tolist()


def test_a_checkpoint_with_a_head_of_its_own_keeps_it(plain_folder, tmp_path):
    plain = load_plain(str(plain_folder), TOKENIZER)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach() + 1.0)
    plain.save_pretrained(tmp_path / "untied")
    TOKENIZER.save_pretrained(tmp_path / "untied")
    again = load_plain(str(tmp_path / "untied"), TOKENIZER)
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(again.shared.weight, again.lm_head.weight)


@pytest.fixture
def saved(model, tmp_path):
    """The model in a folder, calibrated by hand, and a file of questions."""
    model.config.cost_table, model.config.expert_budget, model.config.max_target_length = dict(COSTS), 0.2, 8
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", write_jsonl(tmp_path / "questions.jsonl", tiny_rows(12))


def test_a_whole_run_sets_it_beside_the_model(saved, plain_folder, tmp_path, model):
    pytest.importorskip("matplotlib")
    folder, data = saved
    out = tmp_path / "results"
    argv = ["--model", str(folder), "--plain", str(plain_folder), "--data", str(data), "--splits", "test"]
    argv += ["--rows", "6", "--calibration-rows", "6", "--latency-rows", "3", "--resamples", "20", "--budgets", "0.2"]
    assert main([*argv, "--bert-score", "none", "--baselines", "none", "--out", str(out)]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    policies = result["splits"]["test"]["policies"]
    assert list(policies) == ["emamba", "et5", "mambaformer", PLAIN]
    row, own = policies[PLAIN], policies["mambaformer"]
    assert row["scores"] == policies["et5"]["scores"]  # the same weights wrote the same answers
    assert row["cost_ms"] is row["et5_share"] is row["passes"] is None and own["cost_ms"] is not None
    arrays = np.load(out / "per_question.npz")
    less = arrays["test/mambaformer/token_f1"].mean() - arrays["test/plain_t5/token_f1"].mean()
    assert row["mambaformer_less_this"]["token_f1"]["value"] == pytest.approx(less)
    seconds = [np.median(arrays[f"test/{name}/latency_seconds"]) for name in (PLAIN, "mambaformer")]
    assert row["latency"]["of_mambaformer"] == pytest.approx(seconds[0] / seconds[1])
    assert own["latency"]["of_mambaformer"] == 1 and row["latency"]["questions"] == 3
    sizes = {"mambaformer": model.num_parameters(), PLAIN: model.et5.num_parameters()}
    assert result["parameters"] == sizes and len(result["plain_sha256"]) == 64
    table = {line[0]: line[1:] for line in result["tables"]["plain_test"]["rows"]}
    assert table["Parameters"] == [*(f"{n:,}" for n in sizes.values()), f"{sizes[PLAIN] / sizes['mambaformer']:.2f} ×"]
    assert table["Median ms an answer"][2] == f"{row['latency']['of_mambaformer']:.2f} ×"
    report = (out / "evaluation.md").read_text()
    line = next(line for line in report.splitlines() if line.startswith("| plain T5 |"))
    assert line.count("| – ") == 5 and "nan" not in report and "transformers' own generate" in report
    answers = [json.loads(text)["answers"] for text in (out / "answers.jsonl").read_text().splitlines()]
    assert all(found[PLAIN] == found["et5"] for found in answers)
    assert str(tmp_path) not in json.dumps(result)


def test_the_figure_draws_it_as_a_level_and_not_as_free(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(evaluation_plots, "save", lambda figure, path: figures.append(figure) or path)
    score = {"value": 0.4, "low": 0.3, "high": 0.5}
    rows = {
        name: {"policy": name, "label": name, "cost_ms": cost, "scores": {"token_f1": {**score, "value": value}}}
        for name, cost, value in ((PLAIN, float("nan"), 0.47), ("emamba", 0.0, 0.33), ("et5", 60.0, 0.44))
    }
    rows[PLAIN]["latency"] = {"of_mambaformer": 3.14}
    evaluation_plots.plot_pareto({"a": rows, "b": rows}, "token_f1", "Token F1", tmp_path / "x.png")
    for axis in figures[0].axes:
        points = {tuple(bar.lines[0].get_xydata()[0]) for bar in axis.containers}
        assert points == {(0.0, 0.33), (60.0, 0.44)}
        assert [0.47, 0.47] in [list(line.get_ydata()) for line in axis.lines]
        assert [text.get_text() for text in axis.texts] == [f"{PLAIN}: 3.1 × MambaFormer's time"]
        assert np.isfinite(axis.get_xlim()).all() and axis.get_ylim()[0] < 0.3 < 0.5 < axis.get_ylim()[1]
    assert f"{PLAIN} (not on this axis)" in [text.get_text() for text in figures[0].legends[0].get_texts()]
    evaluation_plots.pyplot().close(figures[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/no/such/folder", "--plain '/no/such/folder' does not exist"),
        (".", "--plain '.' holds no config.json"),
        ("tiny", "is a 'mambaformer' checkpoint: give a T5"),
        ("other", "has a vocabulary of its own"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(
    saved, plain_folder, tmp_path, capsys, monkeypatch, given, message
):
    monkeypatch.chdir(tmp_path)
    folder, data = saved
    if given == "other":
        plain_folder.rename(tmp_path / "other")
        text = (tmp_path / "other" / "tokenizer.json").read_text().replace('"pulp"', '"tongue"')
        (tmp_path / "other" / "tokenizer.json").write_text(text)
    argv = ["--model", str(folder), "--data", str(data), "--splits", "test", "--bert-score", "none", "--rows", "2"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--plain", given]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
