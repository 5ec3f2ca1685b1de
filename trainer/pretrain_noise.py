# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Noise in closed-book questions, against learning their wordings by heart.

A model of a few million parameters that sees each wording often knows it as a whole, and in a new one is lost although
the word that counts stands there. With some of the tokens missing or random it has to go by each of them. Questions
with a context and recall tasks stay as they are: there every token may have to be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .pretrain_data import GROUPS, TokenStore

NOISY = ("dental", "statement", "medquad")
PREFIX = 2  # "question" and ":", which every source begins with


@dataclass
class QuestionNoise:
    """
    Strikes tokens of a source: half of them are left out, half give way to random ones. The first `PREFIX` and the end
    stay. How many are struck differs from source to source, evenly between none and twice the `share`, so that whole
    questions and mere fragments are both met.

    Args:
        share: of the tokens, over all sources; in [0, 0.5]. seed: the same row gets the same noise in every run.
            vocab_size: random ids are below it. first: and not below this one, so that no special token is among them.

    Raises:
        ValueError: for a `share` outside [0, 0.5].
    """

    share: float
    seed: int
    vocab_size: int
    first: int

    def __post_init__(self):
        if not 0 <= self.share <= 0.5:
            raise ValueError(f"question_noise is {self.share}: give a share of tokens from 0 to 0.5")

    def of(self, store: TokenStore) -> Dataset:
        """`store` as it is, or with noise in its closed-book questions."""
        return NoisyStore(store, self) if self.share else store

    def apply(self, source: np.ndarray, index: int) -> np.ndarray:
        """`source` `(S,)` of row `index` with its noise; a new array of at most `S` tokens."""
        rng = np.random.default_rng((self.seed, index))
        struck = rng.random(len(source)) < 2 * self.share * rng.random()
        struck[:PREFIX] = struck[-1:] = False
        left_out = struck & (rng.random(len(source)) < 0.5)
        random_ids = rng.integers(self.first, self.vocab_size, len(source))
        return np.where(struck, random_ids, source)[~left_out]


class NoisyStore(Dataset):
    """A token store whose closed-book questions carry noise."""

    def __init__(self, store: TokenStore, noise: QuestionNoise):
        self.store, self.noise = store, noise
        self.noisy = np.isin(store.group, [GROUPS.index(name) for name in NOISY])

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, target = self.store[index]
        return (self.noise.apply(source, index) if self.noisy[index] else source), target


class NumberedRows(Dataset):
    """A data set whose batches carry the numbers of their rows, as `row` `(B,)` long."""

    def __init__(self, dataset: Dataset, collate: Callable[[list], dict[str, torch.Tensor]]):
        self.dataset, self.collate_rows = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        return index, self.dataset[index]

    def collate(self, numbered: list[tuple]) -> dict[str, torch.Tensor]:
        """The batch of the rows themselves, and their numbers."""
        numbers, rows = zip(*numbered, strict=True)
        return {**self.collate_rows(list(rows)), "row": torch.tensor(numbers)}
