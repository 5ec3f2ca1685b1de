# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Question-answer data for training: CSV, JSON, JSONL and Parquet files, folders, Hub data sets, the packaged DentalQA.

All become rows of `question`, `context`, `answer` text, and then token ids in the one source format of the project.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..dental_qa import load_dental_qa
from ..tokenizer.source_format import QUESTION_PREFIX, collapse_whitespace, format_context, format_source

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
PUBMEDQA_VALIDATION = 50
"""Rows of the 500 that are not PubMedQA's test set that are kept for validation, the last ones by their id."""


def load_qa(
    name_or_path: str,
    split: str = "train",
    question_column: str = "question",
    context_column: str | None = "context",
    answer_column: str = "answer",
    config_name: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """
    Load a question-answering data set as text columns `question`, `context` (empty where there is none), `answer`.

    Args:
        name_or_path: `dental_qa` (packaged), a .csv, .tsv, .json, .jsonl or .parquet file, PubMedQA's own
            `ori_pqal.json`, a folder of such files, or a Hub id.
        split: of the data set; a single file holds one split and is taken whole.
        question_column, context_column, answer_column: the names of the columns; a context may be missing, a list of
            passages, or PubMedQA's mapping with `contexts`.
        config_name: of a Hub data set that has several.
        limit: keep so many rows, drawn with `seed`.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for missing columns, blank questions or answers, a file that is not UTF-8 or not readable.

    Example::

        load_qa("answers.csv", question_column="q", answer_column="a", context_column=None)
    """
    if name_or_path == "dental_qa":
        dataset = load_dental_qa(split)
    elif Path(name_or_path).name == "ori_pqal.json":
        dataset = read_pubmedqa(Path(name_or_path), split)
    elif is_one_split(name_or_path):
        dataset = read_file(Path(name_or_path))
    else:
        dataset = load_dataset(name_or_path, config_name, split=split)
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    return to_columns(dataset, name_or_path, question_column, context_column, answer_column)


def is_one_split(name_or_path: str) -> bool:
    """Whether this is a file that holds a single split, taken whole whatever split is asked for."""
    path = Path(name_or_path)
    return path.suffix.lower() in READERS and path.name != "ori_pqal.json"


def to_columns(dataset: Dataset, name: str, question: str, context: str | None, answer: str) -> Dataset:
    """Rename to the three columns, flatten contexts to text, and refuse blank questions and answers."""
    missing = [column for column in (question, answer) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}: it has {dataset.column_names}. Name them with "
            "question_column, context_column and answer_column."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows: give a data set with at least one question.")
    contexts = dataset[context] if context in dataset.column_names else [""] * len(dataset)
    columns = {
        "question": [as_text(value) for value in dataset[question]],
        "context": [as_text(value) for value in contexts],
        "answer": [as_text(value) for value in dataset[answer]],
    }
    for column in ("question", "answer"):
        blank = [row for row, text in enumerate(columns[column]) if not text]
        if blank:
            raise ValueError(
                f"{name}: {len(blank)} of {len(dataset)} rows have an empty {column}, the first is row {blank[0]} "
                "(counted from 0): fill them in or remove them."
            )
    return Dataset.from_dict(columns)


def as_text(value: object) -> str:
    """One line of text of a string, a list of passages, a mapping with `contexts`, or nothing."""
    if value is None or value != value:  # NaN is what an empty CSV field may become
        return ""
    if isinstance(value, dict):
        value = value.get("contexts", list(value.values()))
    if isinstance(value, list | tuple):
        return " ".join(as_text(part) for part in value)
    return collapse_whitespace(str(value))


def read_file(path: Path) -> Dataset:
    """A single local file, by its suffix."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file, a folder, 'dental_qa' or a Hub id.")
    if path.suffix.lower() in TEXT_SUFFIXES:
        check_utf8(path)
    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        return load_dataset(READERS[path.suffix.lower()], data_files=str(path), split="train", **options)
    except Exception as error:  # the reader of each format raises errors of its own
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(f"{path} could not be read as {path.suffix[1:]}: {reason}") from error


def check_utf8(path: Path) -> None:
    """Raise `ValueError` naming the first byte that is not UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}. Save it as UTF-8, "
            f"for example with `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`."
        ) from None


def read_pubmedqa(path: Path, split: str) -> Dataset:
    """
    PubMedQA's expert-labelled rows (arXiv 1909.06146): `test` is the official half, named by `test_ground_truth.json`
    beside the file; the rest is `train`, but for the last `PUBMEDQA_VALIDATION` ids, which are `validation`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: fetch PubMedQA's ori_pqal.json, or give a Hub id.")
    check_utf8(path)
    records = json.loads(path.read_text(encoding="utf-8"))
    truth = path.with_name("test_ground_truth.json")
    if not truth.is_file():
        raise FileNotFoundError(f"{truth} does not exist: it names PubMedQA's test rows; put it beside {path.name}.")
    test = sorted(json.loads(truth.read_text(encoding="utf-8")))
    rest = sorted(set(records) - set(test))
    splits = {"train": rest[:-PUBMEDQA_VALIDATION], "validation": rest[-PUBMEDQA_VALIDATION:], "test": test}
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist; PubMedQA has {', '.join(splits)}.")
    rows = [records[key] for key in splits[split]]
    return Dataset.from_dict(
        {
            "question": [row["QUESTION"] for row in rows],
            "context": [" ".join(row["CONTEXTS"]) for row in rows],
            "answer": [row["LONG_ANSWER"] for row in rows],
            "id": splits[split],
            "decision": [row["final_decision"] for row in rows],
        }
    )


def source_ids(tokenizer: PreTrainedTokenizerBase, question: str, context: str, limit: int) -> list[int]:
    """Ids of one source, at most `limit`; what does not fit is cut from the context's end, then the question's."""
    ids = tokenizer(format_source(question, context))["input_ids"]
    if len(ids) <= limit:
        return ids
    asked = tokenizer(f"{QUESTION_PREFIX} {collapse_whitespace(question)}")["input_ids"]
    if len(asked) >= limit:
        return asked[: limit - 1] + asked[-1:]
    passage = tokenizer(format_context(context), add_special_tokens=False)["input_ids"]
    return passage[: limit - len(asked)] + asked


def tokenize_qa(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_source_length: int = 512, max_target_length: int = 128
) -> Dataset:
    """
    Token ids of a data set of `load_qa`: `input_ids`, `attention_mask`, `labels` and `length` (of both together).

    Args:
        max_source_length, max_target_length: in tokens, the end-of-sequence token included.
    """

    def encode(rows: dict[str, list[str]]) -> dict[str, list]:
        sources = [
            source_ids(tokenizer, question, context, max_source_length)
            for question, context in zip(rows["question"], rows["context"], strict=True)
        ]
        labels = [
            ids if len(ids) <= max_target_length else ids[: max_target_length - 1] + ids[-1:]
            for ids in tokenizer(rows["answer"])["input_ids"]
        ]
        return {
            "input_ids": sources,
            "attention_mask": [[1] * len(ids) for ids in sources],
            "labels": labels,
            "length": [len(source) + len(target) for source, target in zip(sources, labels, strict=True)],
        }

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenising")


class Collator:
    """
    Pads rows of `tokenize_qa` to a batch, and with them any column that runs along the labels (cached utilities).

    Sources are padded on the tokenizer's side; labels always on the right, with -100, since the decoder starts at the
    left.

    Args:
        tokenizer: gives the padding id and side.
    """

    ALONG_LABELS = {"labels": -100, "log_p_et5": 0.0, "log_p_emamba": 0.0, "top_et5": 0, "top_emamba": 0}

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sources = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
        batch = dict(self.tokenizer.pad(sources, return_tensors="pt"))
        for name, filler in self.ALONG_LABELS.items():
            if name in rows[0]:
                values = [torch.tensor(row[name]) for row in rows]
                batch[name] = pad_sequence(values, batch_first=True, padding_value=filler)
        return batch
