# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Noise in pretraining questions."""

from __future__ import annotations

import numpy as np
import pytest

from mambaformer.trainer.pretrain_data import GROUPS
from mambaformer.trainer.pretrain_noise import QuestionNoise


class Store:
    """Random pairs of every group."""

    def __init__(self, count: int = 400):
        rng = np.random.default_rng(1)
        self.group = rng.integers(0, len(GROUPS), count)
        self.pairs = [(rng.integers(3, 8000, rng.integers(4, 30)), rng.integers(3, 8000, 6)) for _ in range(count)]
        for source, _ in self.pairs:
            source[-1] = 1

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pairs[index]


def test_tokens_of_closed_book_questions_alone_are_struck():
    """About the share asked for, not the beginning or the end, the same in every run, no source with a context."""
    store, noise = Store(), QuestionNoise(0.2, 5, 8000, 3)
    noisy, again = noise.of(store), noise.of(store)
    assert len(noisy) == len(store)
    missing = random = whole = total = 0
    for index in range(len(store)):
        (source, target), (before, same) = noisy[index], store[index]
        assert np.array_equal(target, same) and np.array_equal(source, again[index][0])
        if GROUPS[store.group[index]] in ("context", "recall"):
            assert np.array_equal(source, before)
            continue
        assert np.array_equal(source[:2], before[:2]) and source[-1] == before[-1]
        assert source.min() >= 0 and source.max() < 8000
        whole += np.array_equal(source, before)
        missing, total = missing + len(before) - len(source), total + len(before) - 3
        random += int((~np.isin(source, before)).sum())
    assert 0.07 < missing / total < 0.13 and 0.07 < random / total < 0.13
    assert whole > 10  # some are asked as they are


def test_other_seeds_and_shares():
    store = Store()
    one, other = (QuestionNoise(0.3, seed, 8000, 3).of(store) for seed in (0, 1))
    assert any(not np.array_equal(one[index][0], other[index][0]) for index in range(20))
    assert QuestionNoise(0.0, 5, 8000, 3).of(store) is store
    with pytest.raises(ValueError, match="1.5"):
        QuestionNoise(1.5, 5, 8000, 3)
