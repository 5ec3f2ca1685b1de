# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""When two texts count as the same or nearly the same.

Same: equal after `normalise`. Nearly the same: the Jaccard similarity of their sets of word 3-grams is at least
`NEAR_DUPLICATE`. The search is exact: prefix filtering (Chaudhuri et al., ICDE 2006) only skips pairs that cannot reach it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

NEAR_DUPLICATE = 0.8
SHINGLE = 3
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def words(text: str) -> list[str]:
    """Lower-cased words and numbers; hyphens separate."""
    return WORD.findall(text.lower())


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
    left: Iterable[str], right: Iterable[str], threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[str, str, float]]:
    """Every pair (l, r) of unique texts whose similarity is at least the threshold."""
    sets = [{text: shingles(text) for text in dict.fromkeys(side)} for side in (left, right)]
    frequency = Counter(gram for side in sets for grams in side.values() for gram in grams)
    index: dict[str, list[str]] = defaultdict(list)
    for text, grams in sets[1].items():
        for gram in _prefix(grams, frequency, threshold):
            index[gram].append(text)
    for text, grams in sets[0].items():
        candidates = dict.fromkeys(other for gram in _prefix(grams, frequency, threshold) for other in index[gram])
        for other in candidates:
            similarity = jaccard(grams, sets[1][other])
            if similarity >= threshold:
                yield text, other, similarity


def _prefix(grams: frozenset[str], frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest grams: two sets at least this similar share one of them."""
    size = len(grams) - math.ceil(threshold * len(grams)) + 1
    return sorted(grams, key=lambda gram: (frequency[gram], gram))[:size]
