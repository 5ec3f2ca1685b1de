# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""When two texts count as the same or nearly the same.

Same: equal after `normalise`. Nearly the same: the Jaccard similarity of their sets of word 3-grams is at least
`NEAR_DUPLICATE`. The search is exact: prefix filtering (Chaudhuri et al., ICDE 2006)
only skips pairs that cannot reach it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

NEAR_DUPLICATE = 0.8
SHINGLE = 3
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def words(text: str) -> list[str]:
    """Lower-cased words and numbers; hyphens separate."""
    return WORD.findall(text.lower())


@lru_cache(maxsize=200_000)
def normalise(text: str) -> str:
    return " ".join(words(text))


def shingles(text: str, n: int = SHINGLE) -> frozenset[str]:
    """The word n-grams of the text; a shorter text is one shingle."""
    tokens = words(text)
    if len(tokens) <= n:
        return frozenset([" ".join(tokens)])
    return frozenset(map(" ".join, zip(*(tokens[i:] for i in range(n)), strict=False)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second) if first or second else 1.0


def near_duplicates(
    groups: Sequence[Iterable[str]], threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[int, str, int, str, float]]:
    """Every pair of texts from different groups whose similarity is at least the threshold, equal texts included.

    Yields:
        later group, its text, earlier group, its text, similarity.
    """
    sets = [{text: shingles(text) for text in dict.fromkeys(group)} for group in groups]
    frequency = Counter(gram for group in sets for grams in group.values() for gram in grams)
    index: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, group in enumerate(sets):
        prefixes = {text: _prefix(grams, frequency, threshold) for text, grams in group.items()}
        for text, prefix in prefixes.items():
            for earlier, other in dict.fromkeys(entry for gram in prefix for entry in index.get(gram, ())):
                similarity = jaccard(group[text], sets[earlier][other])
                if similarity >= threshold:
                    yield number, text, earlier, other, similarity
        for text, prefix in prefixes.items():
            for gram in prefix:
                index[gram].append((number, text))


def _prefix(grams: frozenset[str], frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest grams: two sets at least this similar share one of them."""
    size = len(grams) - math.ceil(threshold * len(grams)) + 1
    return sorted(grams, key=lambda gram: (frequency[gram], gram))[:size]
