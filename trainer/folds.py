# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Rows divided into parts, by groups (a concept, a PubMed id) that stay whole, always the same for the same seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from datasets import Dataset

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LEAST_WORDS = 4
"""Shorter sentences ("Yes.", "It is rare.") may stand anywhere."""


def deal(groups: Sequence[str], sizes: Sequence[float], seed: int) -> list[list[int]]:
    """
    Deal n rows to parts of about the relative `sizes`, each group whole to one part.

    The groups come in the order of a hash of their name and `seed`, each to the part that lacks most rows. The result
    does not depend on the order of the rows, nor on the process or machine.

    Args:
        groups: one name a row. sizes: one a part, above 0; only their ratios count.

    Returns:
        row numbers of each part, ascending.

    Raises:
        ValueError: where a part would stay empty.
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    order = sorted(rows, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    lacking = [size * len(groups) / sum(sizes) for size in sizes]
    parts: list[list[int]] = [[] for _ in sizes]
    for number, group in enumerate(order):
        empty = [i for i, part in enumerate(parts) if not part]
        choice = empty if len(order) - number <= len(empty) else range(len(parts))  # the last ones fill the empty
        part = max(choice, key=lambda i: lacking[i])
        parts[part] += rows[group]
        lacking[part] -= len(rows[group])
    if not all(parts):
        raise ValueError(
            f"{len(groups)} rows of {len(rows)} groups do not fill {len(parts)} parts: give fewer folds, or more data."
        )
    return [sorted(part) for part in parts]


def sentences(text: str) -> list[str]:
    """The sentences of a text in one line."""
    return SENTENCE_END.split(text)


def without_sentences(rows: Dataset, answers: Iterable[str]) -> Dataset:
    """
    `rows` whose contexts lack every sentence of `answers`, unless it belongs to the row's own answer.

    A long context of DentalQA tells of several concepts: without this, a fold's answers could be read in training.
    """
    held_out = {s for text in answers for s in sentences(text) if len(s.split()) >= LEAST_WORDS}

    def cut(row: dict[str, str]) -> dict[str, str]:
        told = sentences(row["context"])
        gone = held_out.intersection(told).difference(sentences(row["answer"]))
        return {"context": " ".join(s for s in told if s not in gone)} if gone else {"context": row["context"]}

    return rows.map(cut, desc="Cutting contexts")
