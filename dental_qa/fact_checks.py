# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Checks of the sentences in the concept files: form, length, banned forms, repetition."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .schema import Concept, Problem
from .similarity import normalise, words

MIN_WORDS, MAX_WORDS = 6, 40
#: Aspects that tell somebody what to do.
ADVICE = ("treatment", "procedure", "aftercare", "urgent_care", "prevention", "uses")
UNQUALIFIED = re.compile(r"\b(always|never|guarantees?d?|100% safe|cures)\b", re.IGNORECASE)
QUALIFIER = re.compile(r"\b(not|almost|nearly|hardly) (always|never|guaranteed?)\b", re.IGNORECASE)
#: A sentence that speaks of an amount to be given.
DOSE = re.compile(r"\b(dos(e|es|age)|mg|prescribed as|taken as|given as|maximum of)\b", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:[.,]\d+)*(?![\w-]|[.,]\d)")
UNIT_WORDS = """
mg g kg ml l mcg µg microgram micrograms microsievert microsieverts mm cm ppm iu unit units % per
percent c °c mpa kv ma n hz bar mmhg mmol joules gy gray second seconds minute minutes hour hours
day days week weeks month months year years time times dose doses tablet tablets capsule capsules
cartridge cartridges part parts drop drops puff puffs spray sprays degree degrees people patients
cases case teeth in out
"""
UNITS = frozenset(UNIT_WORDS.split())
RANGE_WORDS = {"to", "or", "and", "of", "about", "up"}


def check_facts(concepts: list[Concept]) -> Iterator[Problem]:
    """Everything wrong with single facts, by fact id."""
    seen: dict[str, str] = {}
    for concept in concepts:
        for fact_id, sentence in concept.all_facts.items():
            place = f"{concept.field}.yaml:{fact_id}"
            aspect = fact_id.split(".")[1]
            for message in (*form_errors(sentence), *banned_forms(sentence, aspect)):
                yield Problem("facts", place, f"{message} {sentence!r}")
            if fact_id.endswith(".1") and not _names_concept(sentence, concept):
                yield Problem("names concept", place, f"does not name {concept.name!r}: {sentence!r}")
            key = normalise(sentence)
            if key in seen:
                yield Problem("facts", place, f"repeats {seen[key]}.")
            seen[key] = fact_id


def form_errors(sentence: str) -> Iterator[str]:
    count = len(sentence.split())
    if not MIN_WORDS <= count <= MAX_WORDS:
        yield f"has {count} words; {MIN_WORDS} to {MAX_WORDS} are allowed."
    if sentence != " ".join(sentence.split()):
        yield "has stray white space."
    if not sentence[0].isupper() and not sentence[0].isdigit():
        yield "does not begin with a capital."
    if not sentence.endswith("."):
        yield "does not end with a full stop."
    if re.search(r"[a-z0-9)%]\. +[A-Z]", sentence):
        yield "is more than one sentence."
    odd = sorted(set(re.findall(r"[^\w\s.,'%()/:°µ–-]", sentence)))
    if odd:
        yield f"has unusual characters {''.join(odd)!r}."
    twice = re.search(r"\b(\w+) \1\b", sentence, re.IGNORECASE)
    if twice:
        yield f"repeats the word {twice.group(1)!r}."


def banned_forms(sentence: str, aspect: str) -> Iterator[str]:
    """An amount without a unit, and unqualified promises or orders in advice."""
    if aspect in ADVICE:
        found = UNQUALIFIED.search(QUALIFIER.sub("", sentence))
        if found:
            yield f"says {found.group(0)!r} without a qualifier."
    if DOSE.search(sentence):
        for match in NUMBER.finditer(sentence):
            if not _has_unit(sentence[match.end() :]):
                yield f"gives {match.group(0)} without a unit."


def _has_unit(rest: str) -> bool:
    """Whether a unit follows, at once or behind a second number ("200 to 400 mg", "1 in 1,000")."""
    tokens = re.findall(r"[^\W\d_]+'?|\d+(?:[.,]\d+)*|%|°c", rest.lower())
    for token in tokens[:4]:
        if token in UNITS:
            return True
        if token not in RANGE_WORDS and not token[0].isdigit():
            return False
    return False


def _names_concept(sentence: str, concept: Concept) -> bool:
    """Whether the sentence holds the name, or at least all its words (a plural s more or less)."""
    if normalise(concept.name) in normalise(sentence):
        return True
    present = {word.removesuffix("s") for word in words(sentence)}
    return all(word.removesuffix("s") in present for word in words(concept.name))
