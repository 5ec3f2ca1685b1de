# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The questions of an evaluation: text and token ids, and what each row is told apart by (field, length class)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..dental_qa import load_dental_qa
from .data import load_qa, to_columns, tokenize_qa
from .pubmedqa import is_pubmedqa, read_pubmedqa

GROUPS = ("field", "length_class")
"""Columns by which DentalQA's figures are also given apart."""


@dataclass
class Questions:
    """
    n questions of one split.

    Attributes:
        split: its name. texts: columns `question`, `context`, `answer`. tokens: of `tokenize_qa`, in the same order.
        ids: one name a row. groups: column -> n values, where the data set has such a column.
        decisions: PubMedQA's yes, no, maybe, or `None`.
    """

    split: str
    texts: Dataset
    tokens: Dataset
    ids: list[str]
    groups: dict[str, list[str]]
    decisions: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def load_questions(
    data: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    seed: int,
    lengths: tuple[int, int],
) -> Questions:
    """
    A random sample of a split, always the same for the same seed.

    Args:
        data: as in `data.load_qa`. rows: how many, `None` for all. lengths: longest source and answer in tokens.

    Raises:
        ValueError, OSError: as `load_qa`.
    """
    if data == "dental_qa":
        table = load_dental_qa(split)
    elif is_pubmedqa(data):
        table = read_pubmedqa(data, split)
    else:
        table = load_qa(data, split)
    chosen = list(range(len(table)))
    if rows is not None and rows < len(table):
        chosen = sorted(random.Random(seed).sample(chosen, rows))
    table = table.select(chosen)
    texts = to_columns(table, data, "question", "context", "answer")
    names = set(table.column_names)
    return Questions(
        split,
        texts,
        tokenize_qa(texts, tokenizer, *lengths),
        [str(value) for value in table["id"]] if "id" in names else [str(index) for index in chosen],
        {name: list(table[name]) for name in GROUPS if name in names},
        list(table["decision"]) if "decision" in names else None,
    )


def calibration_questions(
    data: str, split: str, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, lengths: tuple[int, int]
) -> Questions:
    """
    The first `rows` of a shuffled validation split: with the seed of a training run (42, unless it was set), the rows
    that this run calibrated on and kept from the router's distillation.
    """
    texts = load_qa(data, split).shuffle(seed=seed)
    texts = texts.select(range(min(rows, len(texts))))
    tokens = tokenize_qa(texts, tokenizer, *lengths)
    return Questions(split, texts, tokens, [str(index) for index in range(len(texts))], {})
