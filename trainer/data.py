# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Question-answer data for training: CSV, JSON, JSONL and Parquet files, folders, Hub data sets, the packaged DentalQA.

All become rows of `question`, `context`, `answer` text, and then token ids in the one source format of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..dental_qa import load_dental_qa
from ..tokenizer.source_format import QUESTION_PREFIX, collapse_whitespace, format_context, format_source
from .decisions import with_decision
from .pubmedqa import FILE, is_pubmedqa, read_pubmedqa
from .reading import READERS, read_file, read_named, read_slices

CONTEXT = "context"
"""Default name of the one column that may be absent."""


def load_qa(
    name_or_path: str,
    split: str = "train",
    question_column: str = "question",
    context_column: str | None = CONTEXT,
    answer_column: str = "answer",
    config_name: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    decision_column: str | None = None,
    keep: Sequence[str] = (),
) -> Dataset:
    """
    Load a question-answering data set as text columns `question`, `context` (empty where there is none), `answer`.

    Args:
        name_or_path: `dental_qa` (packaged), a .csv, .tsv, .json, .jsonl or .parquet file, PubMedQA's own
            `ori_pqal.json` or its Hub id `qiaojin/PubMedQA` (see `read_pubmedqa`), a folder of such files, or any Hub
            id.
        split: of the data set, or a slice such as `train[:90%]`; a single file holds one split and is taken whole.
        question_column, context_column, answer_column: the names of the columns; a context may be missing, a list of
            passages, or PubMedQA's mapping with `contexts`.
        config_name: of a Hub data set that has several.
        limit: keep so many rows, drawn with `seed`.
        decision_column: a column of yes, no or maybe that is put before the answer: `yes. <answer>`.
        keep: other columns that the result keeps, as they are.

    Raises:
        FileNotFoundError: for a file or data set that does not exist.
        ValueError: for missing columns, blank questions, answers or decisions, a file that is not UTF-8 or not
            readable.

    Example::

        load_qa("answers.csv", question_column="q", answer_column="a", context_column=None)
    """
    if name_or_path == "dental_qa":
        dataset = read_slices(split, load_dental_qa)
    elif is_pubmedqa(name_or_path, config_name):
        dataset = read_slices(split, lambda name: read_pubmedqa(name_or_path, name))
    elif is_one_split(name_or_path):
        dataset = read_file(Path(name_or_path))
    else:
        dataset = read_named(name_or_path, config_name, split)
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    return to_columns(dataset, name_or_path, question_column, context_column, answer_column, decision_column, keep)


def is_one_split(name_or_path: str) -> bool:
    """Whether this is a file that holds a single split, taken whole whatever split is asked for."""
    path = Path(name_or_path)
    return path.suffix.lower() in READERS and path.name != FILE


def to_columns(
    dataset: Dataset,
    name: str,
    question: str,
    context: str | None,
    answer: str,
    decision: str | None = None,
    keep: Sequence[str] = (),
) -> Dataset:
    """Rename to the three columns, flatten contexts to text, and refuse blank questions, answers and decisions."""
    wanted = [question, answer, *([decision] if decision else []), *keep]
    wanted += [context] if context not in (None, CONTEXT) else []  # whoever names a column expects it to be there
    missing = [column for column in dict.fromkeys(wanted) if column not in dataset.column_names]
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
    checked = {"question": columns["question"], "answer": columns["answer"]}
    if decision:
        checked[decision] = [as_text(value) for value in dataset[decision]]
    for column, texts in checked.items():
        blank = [row for row, text in enumerate(texts) if not text]
        if blank:
            raise ValueError(
                f"{name}: {len(blank)} of {len(dataset)} rows have an empty {column}, the first is row {blank[0]} "
                "(counted from 0): fill them in or remove them."
            )
    if decision:
        columns["answer"] = list(map(with_decision, checked[decision], columns["answer"]))
    return Dataset.from_dict({**{column: list(dataset[column]) for column in keep}, **columns})


def as_text(value: object) -> str:
    """One line of text of a string, a list of passages, a mapping with `contexts`, or nothing."""
    if value is None or value != value:  # NaN is what an empty CSV field may become
        return ""
    if isinstance(value, dict):
        value = value.get("contexts", list(value.values()))
    if isinstance(value, list | tuple):
        return " ".join(as_text(part) for part in value)
    return collapse_whitespace(str(value))


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
    Token ids of a data set of `load_qa`: `input_ids`, `attention_mask`, `labels` and `length` (of both together), and
    `row`, each row's number: its own column, or its place in `dataset`.

    Args:
        max_source_length, max_target_length: in tokens, the end-of-sequence token included.
    """

    def encode(rows: dict[str, list[str]], places: list[int]) -> dict[str, list]:
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
            "row": rows["row"] if "row" in dataset.column_names else places,
        }

    columns = dataset.column_names
    return dataset.map(encode, batched=True, with_indices=True, remove_columns=columns, desc="Tokenising")


def numbered(dataset: Dataset) -> Dataset:
    """`dataset` with the column `row`, numbers from 0 that stay with the rows when they are shuffled or selected."""
    return dataset.add_column("row", list(range(len(dataset))))


class Collator:
    """
    Pads rows of `tokenize_qa` to a batch, and with them any column that runs along the labels (cached utilities).

    Sources are padded on the tokenizer's side; labels always on the right, with -100, since the decoder starts at the
    left. The rows' numbers come as `row` `(B,)`, to name them in errors; no model takes them.

    Args:
        tokenizer: gives the padding id and side.
    """

    ALONG_LABELS = {"labels": -100, "log_p_et5": 0.0, "log_p_emamba": 0.0, "top_et5": 0, "top_emamba": 0}

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        side = self.tokenizer.padding_side
        batch = {}
        for name, filler in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
            values = [torch.tensor(row[name]) for row in rows]
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filler, padding_side=side)
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        for name, filler in self.ALONG_LABELS.items():
            if name in rows[0]:
                values = [torch.tensor(row[name]) for row in rows]
                batch[name] = pad_sequence(values, batch_first=True, padding_value=filler)
        return batch
