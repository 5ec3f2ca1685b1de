# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""PubMedQA: its official test split from the file and from the Hub's layout, decisions in answers and in scores."""

from __future__ import annotations

import json

import pytest
import yaml
from datasets import Dataset, load_dataset

from mambaformer.trainer import pubmedqa
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import load_qa
from mambaformer.trainer.decisions import decision_of, with_decision
from mambaformer.trainer.metrics import score_answers
from mambaformer.trainer.pubmedqa import HUB_ID, is_pubmedqa, read_pubmedqa
from mambaformer.trainer.run_arguments import RunArguments
from mambaformer.trainer.run_data import load_texts
from mambaformer.trainer.run_parsing import parse


@pytest.fixture
def labeled(tmp_path):
    """A file as PubMedQA's own, with its real test ids, 60 others, and made-up text."""
    ids = [*sorted(pubmedqa.test_ids()), *(f"x{i:02}" for i in range(60))]
    records = {
        key: {
            "QUESTION": f"Is {key} so?",
            "CONTEXTS": [f"First of {key}.", "Second."],
            "LONG_ANSWER": f"It is {key}.",
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i, key in enumerate(ids)
    }
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_the_official_test_set_is_that_of_its_authors(shared_data):
    folder = shared_data / "pubmedqa"
    truth = json.loads((folder / "test_ground_truth.json").read_text(encoding="utf-8"))
    test = read_pubmedqa(folder / "ori_pqal.json", "test")
    assert dict(zip(test["id"], test["decision"], strict=True)) == truth and len(test) == 500
    rest = [key for name in ("train", "validation") for key in read_pubmedqa(folder / "ori_pqal.json", name)["id"]]
    assert len(rest) == len(set(rest)) == 500 and not set(rest) & set(truth)


def test_question_and_contexts_give_decision_and_long_answer(labeled):
    row = read_pubmedqa(labeled, "test")[0]
    key, decision = row["id"], row["decision"]
    assert row == {
        "id": key,
        "question": f"Is {key} so?",
        "context": f"First of {key}. Second.",
        "answer": f"{decision}. It is {key}.",
        "long_answer": f"It is {key}.",
        "decision": decision,
    }
    assert load_qa(str(labeled), "test", answer_column="long_answer")["answer"][0] == f"It is {key}."


def test_the_hub_copy_gives_the_same_splits(labeled, tmp_path, monkeypatch):
    """The Hub's copy has one split, of all 1,000, under other names."""
    records = json.loads(labeled.read_text(encoding="utf-8"))
    for i, key in enumerate([key for key in records if key.startswith("x")]):
        records[str(i)] = records.pop(key)
    labeled.write_text(json.dumps(records), encoding="utf-8")
    rows = [
        {
            "pubid": int(key),
            "question": record["QUESTION"],
            "context": {"contexts": record["CONTEXTS"], "labels": ["A", "B"]},
            "long_answer": record["LONG_ANSWER"],
            "final_decision": record["final_decision"],
        }
        for key, record in records.items()
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "hub.parquet"))
    asked = []

    def hub(*arguments, split):
        asked.append((*arguments, split))
        return load_dataset("parquet", data_files=str(tmp_path / "hub.parquet"), split="train")

    monkeypatch.setattr(pubmedqa, "load_dataset", hub)
    for split in ("train", "validation", "test"):
        assert load_qa(HUB_ID, split).to_list() == load_qa(str(labeled), split).to_list()
    assert set(asked) == {("qiaojin/PubMedQA", "pqa_labeled", "train")}
    assert is_pubmedqa(HUB_ID, "pqa_labeled") and not is_pubmedqa(HUB_ID, "pqa_artificial")


def test_slices_of_splits(labeled):
    whole = load_qa(str(labeled), "train")["question"]
    assert len(whole) == 10
    assert load_qa(str(labeled), "train[:7]")["question"] == whole[:7]
    assert load_qa(str(labeled), "train[70%:]")["question"] == whole[7:]
    assert load_qa(str(labeled), "train[-3:]")["question"] == whole[7:]
    both = load_qa(str(labeled), "validation+train[:2]", keep=("id",))
    assert both["question"][-2:] == whole[:2] and len(both) == 52 and both["id"][-1].startswith("x")
    with pytest.raises(ValueError, match="'nowhere' does not exist; PubMedQA has train, validation, test"):
        load_qa(str(labeled), "nowhere[:3]")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda records: records.popitem(), None),
        (lambda records: records.pop(next(iter(records))), "lacks 1 of the 500 official test questions"),
        (lambda records: next(iter(records.values())).pop("LONG_ANSWER"), "has no LONG_ANSWER"),
        (lambda records: next(iter(records.values())).update(LONG_ANSWER=" "), "1 of 500 rows have an empty answer"),
        (lambda records: next(iter(records.values())).update(final_decision=""), "1 of 500 rows have an empty answer"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(labeled, change, told):
    records = json.loads(labeled.read_text(encoding="utf-8"))
    change(records)
    labeled.write_text(json.dumps(records), encoding="utf-8")
    if told is None:
        assert len(load_qa(str(labeled), "test")) == 500
        return
    with pytest.raises(ValueError, match=told):
        load_qa(str(labeled), "test")


def test_files_of_another_kind(labeled):
    labeled.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list"):
        load_qa(str(labeled))
    labeled.write_text('{"1": ', encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read as json"):
        load_qa(str(labeled))
    labeled.write_bytes('{"1": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8: byte 0xe9"):
        load_qa(str(labeled))
    labeled.unlink()
    with pytest.raises(FileNotFoundError, match="qiaojin/PubMedQA"):
        load_qa(str(labeled))


def test_decisions_go_into_answers_and_come_out_of_them():
    for decision in ("yes", "no", "maybe"):
        assert decision_of(with_decision(decision, "It depends.")) == decision
    answers = ["no. So it is.", "yes. Some.", "It is so.", "maybe. Who knows."]
    references = ["no. It is not.", "no. None.", "yes. It is so.", "maybe. Nobody knows."]
    scores = score_answers(answers, references)
    assert scores["decision_accuracy"] == 0.5 and scores["decision_decided"] == 0.75
    assert scores["decision_macro_f1"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert scores["decision_majority_accuracy"] == 0.5
    assert scores["decision_majority_macro_f1"] == pytest.approx(2 / 3 / 3)
    assert not [name for name in score_answers(["no. x"], ["enamel"]) if name.startswith("decision")]


def test_the_recipe_keeps_its_three_parts_apart(repo_root, labeled, tmp_path, shared_data):
    from transformers import HfArgumentParser

    path = repo_root / "trainer" / "configs" / "pubmedqa_embedded.yaml"
    data = shared_data / "pubmedqa" / "ori_pqal.json"
    arguments = [str(path), "--dataset", str(data), "--output_dir", str(tmp_path)]
    run, stages = parse(arguments, HfArgumentParser([RunArguments, MambaFormerTrainingArguments]))
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["dataset"] == HUB_ID
    assert list(stages) == ["adapt", "distil"]
    assert stages["adapt"].et5_lora_rank > 0 and stages["adapt"].emamba_lora_rank > 0
    texts = load_texts(run, 0, ("id",))
    ids = {name: set(part["id"]) for name, part in texts.items()}
    assert {name: len(part) for name, part in ids.items()} == {"train": 350, "distil": 100, "validation": 50}
    assert len(set.union(*ids.values())) == 500 and not set.union(*ids.values()) & pubmedqa.test_ids()
    assert all(decision_of(answer) for part in texts.values() for answer in part["answer"])


def test_the_benchmark_says_how_to_train_what_it_measures(tmp_path, monkeypatch, capsys):
    from mambaformer.benchmarks import pubmedqa

    monkeypatch.setattr("sys.argv", ["pubmedqa", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert pubmedqa.main() == 0
    assert "pubmedqa_embedded.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
