# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Cross-validation: groups stay whole, folds repeat, a stopped run goes on fold by fold, mean and spread are right."""

from __future__ import annotations

import json
import shutil
from itertools import combinations

import pytest
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.dental_qa import load_dental_qa
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.cross_validation import load_folds
from mambaformer.trainer.cross_validation_report import spread
from mambaformer.trainer.folds import deal, sentences, without_sentences
from mambaformer.trainer.pubmedqa import test_ids as official_test_ids
from mambaformer.trainer.run import main
from mambaformer.trainer.run_arguments import RunArguments


def stages(tmp_path, **values) -> dict[str, MambaFormerTrainingArguments]:
    """Arguments of one stage."""
    folder = str(tmp_path / "out" / "adapt")
    return {"adapt": MambaFormerTrainingArguments(output_dir=folder, use_cpu=True, report_to="none", **values)}


def check_apart(folds) -> None:
    """Every row is tested once; no group is in two folds, nor in two roles of a fold."""
    assert sorted(row for part in folds.parts for row in part) == list(range(len(folds.groups)))
    for number, part in enumerate(folds.parts):
        roles = folds.roles(number)
        assert roles["test"] == part
        assert sorted(row for rows in roles.values() for row in rows) == list(range(len(folds.groups)))
        named = [{folds.groups[row] for row in rows} for rows in roles.values()]
        assert all(named) and not any(one & other for one, other in combinations(named, 2))
    named = [{folds.groups[row] for row in part} for part in folds.parts]
    assert not any(one & other for one, other in combinations(named, 2))


def test_groups_are_dealt_whole_evenly_and_always_alike():
    groups = [f"g{i % 23}" for i in range(400)] + ["large"] * 90
    parts = deal(groups, [1] * 5, 0)
    assert sorted(row for part in parts for row in part) == list(range(490))
    assert max(map(len, parts)) - min(map(len, parts)) <= 90
    backwards = deal(groups[::-1], [1] * 5, 0)
    assert [{groups[row] for row in part} for part in parts] == [
        {groups[::-1][row] for row in part} for part in backwards
    ]
    assert parts != deal(groups, [1] * 5, 1)
    big, small = deal([str(i) for i in range(1000)], [9, 1], 0)
    assert (len(big), len(small)) == (900, 100)
    assert [len(part) for part in deal(["a"] * 9 + ["b"] * 9, [50, 1], 0)] == [9, 9]
    with pytest.raises(ValueError, match="490 rows of 24 groups do not fill 25 parts"):
        deal(groups, [1] * 25, 0)


@pytest.fixture(scope="module")
def dental(tmp_path_factory):
    """DentalQA in four folds, divided as the embedded default's recipe does."""
    run = RunArguments(model_name_or_path="m", cross_validate=4, distil_split="validation")
    return load_folds(run, stages(tmp_path_factory.mktemp("dental")))


def test_no_concept_of_dental_qa_crosses_folds(dental):
    folds = dental
    check_apart(folds)
    assert folds.column == "concept" and set(folds.sizes) == {"train", "validation", "distil"}
    assert not set(folds.groups) & set(load_dental_qa("test_concept")["concept"])
    sizes = list(map(len, folds.parts))
    assert max(sizes) < 1.02 * min(sizes)


def test_no_pubmed_id_crosses_folds(tmp_path, shared_data):
    data = str(shared_data / "pubmedqa" / "ori_pqal.json")
    splits = {"train_split": "train[:350]", "distil_split": "train[350:]", "max_validation_samples": 50}
    folds = load_folds(
        RunArguments(model_name_or_path="m", dataset=data, cross_validate=5, **splits), stages(tmp_path)
    )
    check_apart(folds)
    assert folds.column == "id" and len(set(folds.groups)) == len(folds.groups) == 500
    assert not set(folds.groups) & official_test_ids()
    assert list(map(len, folds.parts)) == [100] * 5
    assert {role: len(rows) for role, rows in folds.roles(0).items()} == {
        "test": 100,
        "train": 280,
        "validation": 40,
        "distil": 80,
    }


def test_any_column_or_the_question_groups_rows(tmp_path):
    rows = [{**row, "patient": f"p{i % 6}"} for i, row in enumerate(tiny_rows(60))]
    rows = [*rows, {**rows[0], "question": rows[0]["question"].upper(), "patient": "p9"}]
    path = str(write_jsonl(tmp_path / "qa.jsonl", rows))
    given = {"model_name_or_path": "m", "dataset": path, "cross_validate": 3}
    folds = load_folds(RunArguments(**given, group_column="patient"), stages(tmp_path))
    check_apart(folds)
    assert set(folds.groups) == {f"p{i}" for i in (*range(6), 9)}
    folds = load_folds(RunArguments(**given), stages(tmp_path))
    check_apart(folds)
    assert len(set(folds.groups)) == len({row["question"].casefold() for row in rows}) < len(rows)
    with pytest.raises(ValueError, match="has no column 'doctor'"):
        load_folds(RunArguments(**given, group_column="doctor"), stages(tmp_path))
    with pytest.raises(ValueError, match="7 groups do not fill 8 parts"):
        load_folds(RunArguments(**{**given, "cross_validate": 8}, group_column="patient"), stages(tmp_path))


@pytest.mark.parametrize("values", [{"cross_validate": 1}, {"cross_validate": 3, "score_samples": 0}])
def test_impossible_numbers_are_refused(values):
    with pytest.raises(ValueError, match="cross_validate is 1|score_samples is 0"):
        RunArguments(model_name_or_path="m", **values)


def test_answers_of_a_fold_cannot_be_read_in_training_contexts():
    rows = Dataset.from_list(
        [
            {"context": "Topic: gum. The gum holds the tooth. The pulp is quite soft. It is.", "answer": "It is."},
            {"context": "The pulp is quite soft. So they say.", "answer": "Indeed. The pulp is quite soft."},
            {"context": "", "answer": "It is."},
        ]
    )
    cut = without_sentences(rows, ["The pulp is quite soft. It is.", "The crown is hard and white."])
    assert cut["context"] == ["Topic: gum. The gum holds the tooth. It is.", rows[1]["context"], ""]


def test_no_sentence_of_a_held_out_answer_is_left_in_dental_qa(dental):
    roles = dental.roles(1)
    answers = list(dental.rows.select(roles["test"])["answer"])
    train = dental.rows.select(roles["train"]).shuffle(seed=0).select(range(3000))
    held_out = {s for text in answers for s in sentences(text) if len(s.split()) >= 4}

    def told(rows):
        own = zip(rows["context"], rows["answer"], strict=True)
        return sum(bool(held_out.intersection(sentences(c)).difference(sentences(a))) for c, a in own)

    assert told(train) > 0 and told(without_sentences(train, answers)) == 0


def test_mean_and_spread():
    assert spread([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "deviation": pytest.approx(7**0.5),
        "values": [1.0, 2.0, 6.0],
    }


def test_a_whole_cross_validation_is_taken_up_fold_by_fold(repo_root, et5_folder, emamba_folder, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "qa.jsonl", tiny_rows(30))
    named = {
        "et5": et5_folder,
        "emamba": emamba_folder,
        "tokenizer": tmp_path / "tokenizer",
        "dataset": tmp_path / "qa.jsonl",
        "output_dir": tmp_path / "out",
        "cost_table": "keep",
        "calibration_rounds": 1,
        "max_steps": 1,
        "score_samples": 4,
        "cross_validate": 2,
    }
    config = str(repo_root / "trainer" / "configs" / "smoke.yaml")
    command = [config, *(word for name, value in named.items() for word in (f"--{name}", str(value)))]
    assert main(command) == 0
    folder = tmp_path / "out"
    report = json.loads((folder / "cross_validation.json").read_text(encoding="utf-8"))
    assert [fold["rows"]["scored"] for fold in report["folds"]] == [4, 4]
    assert sum(fold["rows"]["test"] for fold in report["folds"]) == report["rows"] == 30
    for policy in ("mambaformer", "emamba", "et5"):
        for metric, found in report["summary"][policy].items():
            values = [fold["scores"][policy][metric] for fold in report["folds"]]
            assert found["values"] == values and found["mean"] == pytest.approx(sum(values) / 2)
    assert report["summary"]["et5"]["et5_share"]["mean"] == 1 and report["summary"]["emamba"]["et5_share"]["mean"] == 0
    assert all(found["perplexity"]["mean"] > 1 for found in report["summary"].values())
    markdown = (folder / "cross_validation.md").read_text(encoding="utf-8")
    assert "±" in markdown and markdown.count("| fold 2 (4 of ") == 3
    assert (folder / "fold_1" / "model" / "model.safetensors").is_file()

    kept = (folder / "fold_1" / "model" / "model.safetensors").stat().st_mtime_ns
    begun = json.loads((folder / "fold_2" / "fold.json").read_text(encoding="utf-8"))
    begun = {name: begun[name] for name in ("fold", "settings")}  # as a stop within the second fold leaves it
    (folder / "fold_2" / "fold.json").write_text(json.dumps(begun), encoding="utf-8")
    shutil.rmtree(folder / "fold_2" / "distil")
    assert main([*command, "--resume", "true"]) == 0
    again = json.loads((folder / "cross_validation.json").read_text(encoding="utf-8"))
    assert (folder / "fold_1" / "model" / "model.safetensors").stat().st_mtime_ns == kept
    for policy, metrics in report["summary"].items():
        for metric, found in metrics.items():
            assert again["summary"][policy][metric]["values"] == pytest.approx(found["values"], rel=1e-4), metric

    assert main([*command, "--resume", "true", "--adapt.learning_rate", "0.5"]) == 2
    assert "fold_1/fold.json is of a run with other arguments or other data" in capsys.readouterr().err
