# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Grammar and wordings of DentalQA's questions."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from mambaformer.dental_qa.grammar import alias_phrase, article_of, concept_slots, indefinite, is_usable, render
from mambaformer.dental_qa.schema import ASPECTS, STYLES, Concept
from mambaformer.dental_qa.similarity import normalise
from mambaformer.dental_qa.wording import (
    GROUPS,
    decapitalise,
    framed,
    part_question,
    phrasings,
    single_templates,
    wording_errors,
)


def make(name: str, definition: str, plural: bool = False, **extra) -> Concept:
    facts = {aspect: (f"{name} text.",) for aspect in ASPECTS if aspect not in ("uses", "function")}
    return Concept("x", "f", name, plural, (), None, {**facts, "definition": (definition,), **extra})


ABSCESS = make("dental abscess", "A dental abscess is a pocket of pus.")
BRACES = make("fixed braces", "Fixed braces are brackets and wires.", plural=True, uses=("Fixed braces move teeth.",))
PULP = make("dental pulp", "The dental pulp is soft tissue.", function=("The dental pulp feels.",))
CARIES = make("dental caries", "Dental caries is a disease.")


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("abscess", "an"), ("tooth", "a"), ("X-ray", "an"), ("unit", "a"), ("ultrasonic bath", "an"), ("MRI scan", "an"),
     ("LED lamp", "an"), ("NiTi file", "a"), ("one-piece implant", "a"), ("hour", "an"), ("CT scan", "a")],
)  # fmt: skip
def test_indefinite_article_follows_the_sound(phrase: str, article: str) -> None:
    assert indefinite(phrase) == article


@pytest.mark.parametrize(("concept", "article"), [(ABSCESS, "a"), (BRACES, ""), (PULP, "the"), (CARIES, "")])
def test_article_comes_from_the_definition(concept: Concept, article: str) -> None:
    assert article_of(concept) == article


def test_number_and_pronoun_agree() -> None:
    template = "why {does} {x} hurt, what {is} {it} and when {has} {it} to come off {itself}?"
    assert (
        render(template, concept_slots(BRACES))
        == "Why do fixed braces hurt, what are they and when have they to come off themselves?"
    )
    assert (
        render(template, concept_slots(ABSCESS))
        == "Why does a dental abscess hurt, what is it and when has it to come off itself?"
    )


@pytest.mark.parametrize(
    ("alias", "phrase"),
    [
        ("gum boil", ("a gum boil", False)),
        ("ulcer of the mouth", ("an ulcer of the mouth", False)),
        ("milk teeth", ("milk teeth", True)),
        ("tooth decay", ("tooth decay", False)),
        ("draining pus from the gum", ("draining pus from the gum", False)),
        ("a cavity", ("a cavity", False)),
    ],
)
def test_aliases_take_their_article(alias: str, phrase: tuple[str, bool]) -> None:
    assert alias_phrase(alias) == phrase


def test_clauses_are_not_used_as_names() -> None:
    assert not is_usable("Crown fell off") and is_usable("gum boil")


def test_wording_files_are_complete() -> None:
    assert wording_errors() == []


def test_each_aspect_has_enough_wordings() -> None:
    for key, groups in phrasings().items():
        train = [template for style in STYLES for template in groups["train"][style]]
        held_out = [
            template for group in ("validation", "test") for style in STYLES for template in groups[group][style]
        ]
        assert len(set(train)) >= 8 and len(set(held_out)) >= 3, key


def test_no_wording_is_shared_between_groups() -> None:
    for key, groups in phrasings().items():
        owner: dict[str, str] = {}
        for group in GROUPS:
            for style in STYLES:
                for template in groups[group][style]:
                    assert owner.setdefault(normalise(template), group) == group, (key, template)


@pytest.mark.parametrize("concept", [ABSCESS, BRACES, PULP, CARIES], ids=lambda concept: concept.name)
@pytest.mark.parametrize("neighbour", [None, BRACES])
def test_every_template_fills(concept: Concept, neighbour: Concept | None) -> None:
    values = concept_slots(concept, neighbour)
    rng = Random(0)
    for group in GROUPS:
        for style in STYLES:
            for aspect in concept.aspects:
                for template in single_templates(concept, aspect, group, style, neighbour is not None):
                    question = render(template, values)
                    assert concept.name in question and "{" not in question and question[0].isupper()
            for size in (2, 3):
                for aspects in combinations(concept.aspects, size):
                    question = part_question(concept, aspects, group, style, values, rng)
                    assert "{" not in question and concept.name in question


def test_one_aspect_is_no_joined_question() -> None:
    with pytest.raises(ValueError, match="2 or 3 aspects, not 1"):
        part_question(CARIES, ("causes",), "train", "exam", concept_slots(CARIES), Random(0))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [("What is it?", "what is it?"), ("I have pain.", "I have pain."), ("CBCT is what?", "CBCT is what?")],
)
def test_decapitalise(sentence: str, expected: str) -> None:
    assert decapitalise(sentence) == expected


def test_framed_keeps_the_question() -> None:
    for group in GROUPS:
        for kind in ("passage", "case", "brief"):
            assert "hat causes decay?" in framed(kind, group, "What causes decay?", {}, Random(2))
