# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Nothing copied: finds word 8-grams that the data set shares with other text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .similarity import words

N = 8


def ngrams(text: str, n: int = N) -> Iterator[str]:
    tokens = words(text)
    return map(" ".join, zip(*(tokens[i:] for i in range(n)), strict=False))


def shared_ngrams(ours: dict[str, str], others: Iterable[str], n: int = N) -> dict[str, list[str]]:
    """Which of our texts share word n-grams with the others.

    Args:
        ours: place (a fact id, a file) -> text.
        others: texts to compare with, read once.

    Returns:
        n-gram -> places it stands at, for the n-grams that occur in `others` too.
    """
    places: dict[str, list[str]] = {}
    for place, text in ours.items():
        for gram in ngrams(text, n):
            places.setdefault(gram, []).append(place)
    found: dict[str, list[str]] = {}
    for text in others:
        for gram in ngrams(text, n):
            if gram in places:
                found[gram] = places[gram]
    return found
