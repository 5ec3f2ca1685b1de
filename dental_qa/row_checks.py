# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Checks of the composed rows: columns, lengths, that every fact is used, and that nothing leaks between splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from . import contexts
from .schema import ASPECTS, DIFFICULTIES, LENGTH_CLASSES, SPLITS, STYLES, Concept, Problem, Row
from .similarity import NEAR_DUPLICATE, near_duplicates, normalise

MAX_QUESTION_WORDS = 80
MAX_SENTENCES = 6
#: Something wrong with how a template was filled.
BROKEN = re.compile(r"[{}]|\b(a|an|the) (a|an|the)\b|\s{2,}|\ba [aeio]\w+|\?\?|\.\.", re.IGNORECASE)
A_IS_RIGHT = re.compile(r"\ba (one|uni|use|eu)\w*", re.IGNORECASE)


def check_rows(concepts: list[Concept], rows: list[Row], held_out: Iterable[str]) -> Iterator[Problem]:
    """Everything wrong with the rows."""
    yield from _columns(rows)
    yield from _sources(concepts, rows)
    yield from _held_out(concepts, rows, set(held_out))
    yield from leaks(rows)


def _columns(rows: list[Row]) -> Iterator[Problem]:
    ids: set[str] = set()
    answers: dict[tuple[str, str], str] = {}
    for row in rows:
        for name, allowed in (
            ("split", SPLITS),
            ("style", STYLES),
            ("length_class", LENGTH_CLASSES),
            ("difficulty", DIFFICULTIES),
        ):
            if getattr(row, name) not in allowed:
                yield Problem("columns", row.id, f"{name} is {getattr(row, name)!r}; known are {', '.join(allowed)}.")
        if not set(row.aspect.split("+")) <= set(ASPECTS):
            yield Problem("columns", row.id, f"aspect is {row.aspect!r}.")
        if row.id in ids:
            yield Problem("columns", row.id, "the id is used twice.")
        ids.add(row.id)
        if not row.question.endswith(("?", ".")) or contexts.word_count(row.question) > MAX_QUESTION_WORDS:
            yield Problem(
                "question", row.id, f"is not a question of at most {MAX_QUESTION_WORDS} words: {row.question!r}"
            )
        broken = BROKEN.search(A_IS_RIGHT.sub("one", row.question))
        if broken:
            yield Problem("question", row.id, f"has {broken.group(0)!r}: {row.question!r}")
        if not 1 <= len(row.facts) <= MAX_SENTENCES:
            yield Problem("answer", row.id, f"has {len(row.facts)} sentences; 1 to {MAX_SENTENCES} are allowed.")
        if contexts.word_count(row.context) > contexts.MAX_WORDS:
            yield Problem(
                "context", row.id, f"has {contexts.word_count(row.context)} words, over {contexts.MAX_WORDS}."
            )
        key = (normalise(row.question), row.context)
        if answers.setdefault(key, row.answer) != row.answer:
            yield Problem("question", row.id, f"has another answer elsewhere: {row.question!r}")


def _sources(concepts: list[Concept], rows: list[Row]) -> Iterator[Problem]:
    """Answers are their facts, every fact answers something, and long test contexts hold the answer."""
    facts = {fact_id: sentence for concept in concepts for fact_id, sentence in concept.all_facts.items()}
    used: set[str] = set()
    for row in rows:
        used.update(row.facts)
        if row.answer != " ".join(facts.get(fact, "?") for fact in row.facts):
            yield Problem("answer", row.id, "is not its facts; build the data set again.")
        elif row.split == "test_long" and not all(facts[fact] in row.context for fact in row.facts):
            yield Problem("context", row.id, "does not hold the answer.")
    for fact_id in facts:
        if fact_id not in used:
            yield Problem("facts used", fact_id, "answers no row.")


def _held_out(concepts: list[Concept], rows: list[Row], held_out: set[str]) -> Iterator[Problem]:
    """Concepts of test_concept appear in no other split but test_long, and no training text names them."""
    for row in rows:
        if (row.concept in held_out) != (row.split == "test_concept") and row.split != "test_long":
            yield Problem("held out", row.id, f"the concept {row.concept!r} does not belong into {row.split}.")
    sentences: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.split == "train":
            for text in {row.question, row.answer, row.context}:
                sentences[text.lower()].append(row.id)
    corpus = "\n".join(sentences)
    for concept in concepts:
        stem = concept.name.lower().removesuffix("s")
        if concept.id in held_out and re.search(rf"\b{re.escape(stem)}(s|es)?\b", corpus):
            first = next(ids[0] for text, ids in sentences.items() if stem in text)
            yield Problem("held out", concept.id, f"the name {concept.name!r} stands in training, e.g. in {first}.")


def leaks(rows: list[Row], threshold: float = NEAR_DUPLICATE) -> Iterator[Problem]:
    """Questions and answers of one split that are the same or nearly the same in another."""
    for part in ("question", "answer"):
        groups = [{normalise(getattr(row, part)) for row in rows if row.split == split} for split in SPLITS]
        for later, text, earlier, other, similarity in near_duplicates(groups, threshold):
            place = f"{SPLITS[earlier]} and {SPLITS[later]}"
            yield Problem("leak", place, f"{part}s with similarity {similarity:.2f}: {text!r} and {other!r}.")
