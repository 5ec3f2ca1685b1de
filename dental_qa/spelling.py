# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Words that are neither in general medical text nor among the reviewed terms of `dental_terms.yaml`.

The word list is what two large bodies of medical text use repeatedly. It holds American spellings and few dental
terms, so British forms and dental terms stand in `dental_terms.yaml`, read word by word before they were taken in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .loading import PACKAGE, read_yaml
from .similarity import words

TERMS = PACKAGE / "dental_terms.yaml"
#: A word seen less often than this in the other text may be a slip there.
MIN_COUNT = 3


def read_terms(path: Path = TERMS) -> set[str]:
    return set(read_yaml(path)["terms"].split())


def known_words(texts: Iterable[str], terms: set[str]) -> set[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words(text))
    return {word for word, count in counts.items() if count >= MIN_COUNT} | terms


def unknown_words(ours: dict[str, str], known: set[str]) -> dict[str, list[str]]:
    """Unknown word -> the places where it stands. Numbers and words with a digit are left alone."""
    found: dict[str, list[str]] = {}
    for place, text in ours.items():
        for word in words(text):
            base = re.sub(r"['’]s?$", "", word)
            if base not in known and not any(character.isdigit() for character in base) and len(base) > 1:
                found.setdefault(base, []).append(place)
    return found
