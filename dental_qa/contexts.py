# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Long contexts, assembled from the concepts' own facts: passages over several concepts, and case records."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from .grammar import base_of, kind_of, render
from .loading import PACKAGE, read_yaml
from .schema import Concept

MAX_WORDS = 1500
#: (fewest, most words, weight in training, weight in the test): the test has more of the longest.
BANDS = ((100, 250, 0.35, 0.2), (250, 500, 0.30, 0.3), (500, 900, 0.20, 0.25), (900, MAX_WORDS, 0.15, 0.25))
#: Fields whose conditions are not illnesses of a patient, so that "a patient with ..." would be wrong.
NO_CASES = ("radiology",)
CHILD_FIELDS = ("paediatric_dentistry",)


@cache
def frames() -> dict[str, Any]:
    return read_yaml(PACKAGE / "contexts.yaml")


def word_count(text: str) -> int:
    return len(text.split())


def draw_words(rng: Random, test: bool) -> int:
    low, high, *_ = rng.choices(BANDS, weights=[band[3 if test else 2] for band in BANDS])[0]
    return rng.randint(low, high)


def passage(
    concept: Concept, aspects: tuple[str, ...], others: list[Concept], values: dict[str, str], rng: Random, words: int
) -> str:
    """A titled text about several concepts in which the answer's facts stand somewhere.

    Args:
        aspects: the aspects that must be in the text, whole and in order.
        others: concepts that may be spoken of besides, nearest first.
        words: the length to aim at; the result never exceeds `MAX_WORDS`.
    """
    extra = [aspect for aspect in concept.aspects if aspect not in aspects]
    kept = set(aspects) | set(rng.sample(extra, rng.randint(0, min(3, len(extra)))))
    target = _paragraph(concept, [a for a in concept.aspects if a in kept], values["n"], rng)
    title = rng.choice(frames()["titles"]) + "."
    budget = min(words, MAX_WORDS) - word_count(target) - word_count(title)
    paragraphs = []
    for other in others:
        count = rng.randint(2, len(other.aspects))
        chosen = sorted(rng.sample(other.aspects, count), key=other.aspects.index)
        text = _paragraph(other, chosen, other.name, rng)
        if word_count(text) <= budget:
            paragraphs.append(text)
            budget -= word_count(text)
        if budget < 30:
            break
    paragraphs.insert(rng.randint(0, len(paragraphs)), target)
    return "\n".join([title, *paragraphs])


def _paragraph(concept: Concept, aspects: list[str], name: str, rng: Random) -> str:
    heading = render(rng.choice(frames()["headings"]), {"n": name})
    return " ".join([heading, *(sentence for aspect in aspects for sentence in concept.facts[aspect])])


def can_be_case(concept: Concept) -> bool:
    return base_of(kind_of(concept)) == "condition" and "symptoms" in concept.facts and concept.field not in NO_CASES


def case(
    concept: Concept,
    aspects: tuple[str, ...],
    others: list[Concept],
    values: dict[str, str],
    rng: Random,
    with_answer: bool,
) -> str:
    """A short patient record; with `with_answer` an information sheet follows that holds the facts asked for."""
    words = frames()["case"]
    if concept.field in CHILD_FIELDS:
        opening, ages = words["child_opening"], (4, 7)
    else:
        opening, ages = words["adult_opening"], (23, 44)
    slots = {
        **values,
        "job": rng.choice(words["adults"]),
        "age": str(rng.randint(*ages)),
        "months": str(rng.randint(5, 20)),
    }
    record = [render(rng.choice(opening), slots)]
    record += [render(s, slots) for s in rng.sample(words["background"], rng.randint(2, 5))]
    record.append(render(rng.choice(words["finding"]), slots))
    record += concept.facts["symptoms"]
    if not with_answer:
        return " ".join(record)
    sheet = [rng.choice(words["sheet"])]
    blocks = [[s for aspect in aspects for s in concept.facts[aspect]]]
    blocks += [
        [s for a in rng.sample(o.aspects, min(3, len(o.aspects))) for s in o.facts[a]]
        for o in others[: rng.randint(1, 4)]
    ]
    rng.shuffle(blocks)
    return " ".join(record) + "\n" + " ".join(sheet + [sentence for block in blocks for sentence in block])
