# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Loading, checking, tokenising and padding question-answer data; the metrics."""

from __future__ import annotations

import csv

import pytest
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.trainer.data import Collator, load_qa, tokenize_qa
from mambaformer.trainer.metrics import BertScore, exact_match, rouge_l, score_answers, token_f1

TOKENIZER = tiny_tokenizer()
COLUMNS = ["question", "context", "answer"]


def save(rows: list[dict[str, str]], path):
    """Write rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
        return path
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_each_format_gives_the_same_rows(tmp_path, suffix):
    rows = tiny_rows(5)
    loaded = load_qa(str(save(rows, tmp_path / f"qa{suffix}")))
    assert loaded.column_names == COLUMNS
    assert loaded.to_list() == rows


def test_columns_are_mapped_and_contexts_flattened(tmp_path):
    rows = [{"q": "why?", "passages": ["one.", "two."], "a": "because"}, {"q": "how?", "passages": [], "a": "so"}]
    path = tmp_path / "qa.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    loaded = load_qa(str(path), question_column="q", context_column="passages", answer_column="a")
    assert loaded["context"] == ["one. two.", ""]
    assert load_qa(str(path), "train", "q", None, "a")["context"] == ["", ""]


def test_limit_draws_rows_by_seed(tmp_path):
    path = str(write_jsonl(tmp_path / "qa.jsonl", tiny_rows(20)))
    first, again, other = (load_qa(path, limit=5, seed=seed)["question"] for seed in (0, 0, 1))
    assert len(first) == 5 and first == again and first != other


@pytest.mark.parametrize("column", ["question", "answer"])
def test_blank_cells_are_refused_with_their_row(tmp_path, column):
    rows = tiny_rows(4)
    rows[2][column] = "  \n"
    with pytest.raises(ValueError, match=f"1 of 4 rows have an empty {column}, the first is row 2"):
        load_qa(str(write_jsonl(tmp_path / "qa.jsonl", rows)))


def test_missing_columns_are_named_with_those_there(tmp_path):
    path = str(write_jsonl(tmp_path / "qa.jsonl", tiny_rows(3)))
    with pytest.raises(ValueError, match=r"no column 'prompt'.*'question', 'context', 'answer'"):
        load_qa(path, question_column="prompt")


def test_a_named_context_column_must_be_there(tmp_path):
    path = str(write_jsonl(tmp_path / "qa.jsonl", [{"question": "why?", "answer": "so"}]))
    assert load_qa(path)["context"] == [""]
    with pytest.raises(ValueError, match="no column 'passage'"):
        load_qa(path, context_column="passage")


def test_a_decision_goes_before_the_answer(tmp_path):
    rows = [{**row, "label": label} for row, label in zip(tiny_rows(3), ("yes", "no", "maybe"), strict=True)]
    loaded = load_qa(str(write_jsonl(tmp_path / "qa.jsonl", rows)), decision_column="label", keep=("label",))
    assert loaded["answer"] == [f"{row['label']}. {row['answer']}" for row in rows]
    assert loaded["label"] == ["yes", "no", "maybe"]
    rows[1]["label"] = " "
    with pytest.raises(ValueError, match="1 of 3 rows have an empty label, the first is row 1"):
        load_qa(str(write_jsonl(tmp_path / "other.jsonl", rows)), decision_column="label")


def test_cells_are_taken_as_written(tmp_path):
    """What pandas takes for missing numbers are words of an answer; a byte-order mark is no part of a name."""
    path = tmp_path / "qa.csv"
    path.write_text("question,context,answer\nany caries?,,None\nnext visit?,,NA\nhow many?,,32\n", "utf-8-sig")
    assert load_qa(str(path))["answer"] == ["None", "NA", "32"]
    path = tmp_path / "empty.csv"
    path.write_text("question,context,answer\nany caries?,,None\nnext visit?,,\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 2 rows have an empty answer, the first is row 1"):
        load_qa(str(path))


@pytest.mark.parametrize("text", ["", "question,context,answer\n"])
def test_a_file_without_rows(tmp_path, text):
    path = tmp_path / "qa.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"qa.csv has no rows"):
        load_qa(str(path))


def test_a_folder_is_checked_like_a_file(tmp_path):
    save(tiny_rows(4), tmp_path / "train.csv")
    save(tiny_rows(3), tmp_path / "validation.csv")
    assert [len(load_qa(str(tmp_path), split)) for split in ("train", "validation", "train[:2]")] == [4, 3, 2]
    with pytest.raises(ValueError, match="nowhere"):
        load_qa(str(tmp_path), "nowhere")
    (tmp_path / "validation.csv").write_bytes("question,context,answer\ncaf\xe9?,,yes\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"validation.csv is not UTF-8: byte 0xe9"):
        load_qa(str(tmp_path))
    (tmp_path / "validation.csv").write_text('question,context,answer\na,b,c,d,e\n"', encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read"):
        load_qa(str(tmp_path))


def test_a_hub_id_that_is_out_of_reach_is_named():
    with pytest.raises((OSError, ValueError), match="nobody/no-such-set"):
        load_qa("nobody/no-such-set")


def test_wrong_encoding_names_the_byte(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("question,context,answer\ncaf\xe9?,,yes\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xe9 at offset 27"):
        load_qa(str(path))


def test_unreadable_and_absent_files(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "why?", "answer": ', encoding="utf-8")
    with pytest.raises(ValueError, match="broken.jsonl could not be read as jsonl"):
        load_qa(str(broken))
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        load_qa(str(tmp_path / "absent.csv"))


def test_dental_qa_is_packaged():
    validation = load_qa("dental_qa", "validation", limit=20)
    assert len(validation) == 20 and validation.column_names == COLUMNS
    with pytest.raises(ValueError, match="nowhere"):
        load_qa("dental_qa", "nowhere")


def test_pubmedqa_keeps_its_official_test(shared_data):
    path = str(shared_data / "pubmedqa" / "ori_pqal.json")
    splits = {name: load_qa(path, name) for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 450, "validation": 50, "test": 500}
    assert not set(splits["train"]["question"]) & set(splits["test"]["question"])
    assert all(splits["test"]["context"])


def test_a_long_context_is_cut_and_never_the_question():
    question, context = "what is the pulp?", " ".join(["the root is hard."] * 30)
    rows = tokenize_qa(
        Dataset.from_list([{"question": question, "context": context, "answer": "a tooth"}]), TOKENIZER, 24, 8
    )
    ids = rows[0]["input_ids"]
    asked = TOKENIZER(f"question: {question}")["input_ids"]
    assert len(ids) == 24 and ids[-len(asked) :] == asked
    assert ids[0] == TOKENIZER.convert_tokens_to_ids("context")


def test_long_answers_keep_their_end():
    rows = tokenize_qa(
        Dataset.from_list([{"question": "q?", "context": "", "answer": "tooth " * 50}]), TOKENIZER, 24, 8
    )
    assert len(rows[0]["labels"]) == 8 and rows[0]["labels"][-1] == TOKENIZER.eos_token_id
    assert rows[0]["length"] == len(rows[0]["input_ids"]) + 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_padded_on_the_right_whatever_the_sources_side(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rows = tokenize_qa(Dataset.from_list(tiny_rows(6)), tokenizer, 48, 16)
    utilities = rows.map(lambda row: {"log_p_et5": [-0.5] * len(row["labels"]), "top_et5": row["labels"]})
    batch = Collator(tokenizer)(list(utilities))
    for i, row in enumerate(utilities):
        size = len(row["labels"])
        assert batch["labels"][i, :size].tolist() == row["labels"]
        assert (batch["labels"][i, size:] == -100).all()
        assert batch["top_et5"][i, :size].tolist() == row["labels"]
        assert batch["log_p_et5"][i].sum() == pytest.approx(-0.5 * size)
        at = slice(None, len(row["input_ids"])) if side == "right" else slice(-len(row["input_ids"]), None)
        assert batch["input_ids"][i, at].tolist() == row["input_ids"]
        assert batch["attention_mask"][i].sum() == len(row["input_ids"])


def test_metrics_on_known_answers():
    assert exact_match(["The pulp."], ["pulp"]) == 1.0
    assert token_f1(["soft pulp tissue"], ["the pulp is soft"]) == pytest.approx(2 * 2 / (3 + 3))
    assert token_f1(["", "x"], ["pulp", "x"]) == 0.5
    assert rouge_l(["a b c d"], ["a x c d"]) == pytest.approx(0.75)
    scores = score_answers(["the pulp", ""], ["pulp", "root"])
    assert scores == {"exact_match": 0.5, "token_f1": 0.5, "rouge_l": pytest.approx((2 / 3) / 2)}
    with pytest.raises(ValueError, match="1 predictions but 2 references"):
        score_answers(["a"], ["a", "b"])


def test_bert_score_scores_empty_answers_zero_and_names_its_encoder(tmp_path):
    """A tiny random encoder in a folder whose name holds "t5", which bert-score would take for a T5."""
    pytest.importorskip("bert_score")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "mint5"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pulp", "tooth", "the", "is", "soft"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(vocabulary), model_max_length=int(1e30)).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    scorer = BertScore(str(folder), num_layers=2)
    assert type(scorer.scorer._model).__name__.startswith("Bert")
    same = scorer(["the pulp is soft"], ["the pulp is soft"])
    assert same == pytest.approx(1.0, abs=1e-4)
    assert scorer(["the pulp is soft", "", "  "], ["the pulp is soft", "tooth", "pulp"]) == pytest.approx(same / 3)
    scores = score_answers(["pulp"], ["tooth"], scorer)
    assert scores["bert_score_model"] == "mint5" and 0 < scores["bert_score"] <= 1
