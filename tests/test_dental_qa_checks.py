# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Each check of DentalQA finds what it is there for, and lets the rest pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from tiny_dental_qa import write

from mambaformer.dental_qa.dataset import build_rows
from mambaformer.dental_qa.fact_checks import banned_forms, check_facts, form_errors
from mambaformer.dental_qa.loading import load_concepts
from mambaformer.dental_qa.overlap import shared_ngrams
from mambaformer.dental_qa.row_checks import check_rows, leaks
from mambaformer.dental_qa.similarity import jaccard, near_duplicates, normalise, shingles
from mambaformer.dental_qa.spelling import known_words, unknown_words
from mambaformer.dental_qa.splitting import choose_held_out


@pytest.mark.parametrize(
    "sentence",
    [
        "Adults take 500 mg three times a day.",
        "The usual dose is 200 to 400 mg every 4 to 6 hours.",
        "A gel with 1.1% fluoride is given as a dose of 5 ml.",
        "The dose is one tablet, and 2 of 10 patients feel sick.",
        "Vitamin B12 has no fixed dose here.",
    ],
)
def test_amounts_with_units_pass(sentence: str) -> None:
    assert list(banned_forms(sentence, "treatment")) == []


@pytest.mark.parametrize(
    ("sentence", "found"),
    [("The usual dose is 500.", "500"), ("Adults take 400 mg, with a maximum of 1200.", "1200")],
)
def test_an_amount_without_a_unit_is_found(sentence: str, found: str) -> None:
    assert list(banned_forms(sentence, "definition")) == [f"gives {found} without a unit."]


def test_always_needs_a_qualifier_in_advice_only() -> None:
    sentence = "The tooth is always extracted."
    assert list(banned_forms(sentence, "treatment")) == ["says 'always' without a qualifier."]
    assert list(banned_forms(sentence, "definition")) == []
    assert list(banned_forms("The tooth is not always extracted.", "treatment")) == []


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("Too short.", "has 2 words"),
        ("word " * 50 + "end.", "has 51 words"),
        ("this begins with a small letter here.", "does not begin with a capital"),
        ("This has no full stop at all", "does not end with a full stop"),
        ("This is one sentence. This is another one.", "more than one sentence"),
        ("This is a a slip of the pen.", "repeats the word 'a'"),
        ("This  has a gap in the middle.", "stray white space"),
        ("This has an odd sign → in it.", "unusual characters"),
    ],
)
def test_form_errors(sentence: str, message: str) -> None:
    assert any(message in error for error in form_errors(sentence))


def test_a_plain_sentence_has_no_form_error() -> None:
    assert list(form_errors("Gingivitis is an inflammation of the gums, e.g. from plaque (about 2 mm).")) == []


def test_shared_ngrams_are_found_with_their_places() -> None:
    ours = {"a": "One two three, four five six seven eight nine.", "b": "one two three"}
    assert shared_ngrams(ours, ["zero ONE two three four five six seven eight ten"]) == {
        "one two three four five six seven eight": ["a"]
    }
    assert shared_ngrams(ours, ["one two three four five six seven nine"]) == {}


def test_unknown_words_are_found() -> None:
    known = known_words(["the gum bleeds"] * 3 + ["rarely"], {"dentine"})
    assert unknown_words({"x": "The gum's dentien bleeds 5mm.", "y": "Dentine, rarely."}, known) == {
        "dentien": ["x"],
        "rarely": ["y"],
    }


def test_near_duplicates_equal_brute_force() -> None:
    rng = Random(1)
    base = [[rng.choice("abcdefghij") for _ in range(rng.randint(2, 14))] for _ in range(60)]
    texts = [
        " ".join(rng.choice("abcdefghij") if rng.random() < 0.08 else w for w in rng.choice(base)) for _ in range(300)
    ]
    groups = [texts[:100], texts[100:180], texts[180:]]
    for threshold in (0.5, 0.8, 1.0):
        expected = {
            (late, right, early, left)
            for (early, one), (late, two) in combinations(enumerate(map(set, groups)), 2)
            for left in one
            for right in two
            if jaccard(shingles(left), shingles(right)) >= threshold
        }
        assert {hit[:4] for hit in near_duplicates(groups, threshold)} == expected
        assert expected


def test_normalise_forgets_case_and_punctuation() -> None:
    assert normalise("What IS a “post-and-core”?") == normalise("what is a post and core") == "what is a post and core"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    concepts, _ = load_concepts(write(tmp_path_factory.mktemp("concepts")))
    held_out = choose_held_out(concepts)
    return concepts, held_out, build_rows(concepts, held_out)[0]


def swapped(rows, index: int, **changes):
    return [*rows[:index], replace(rows[index], **changes), *rows[index + 1 :]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "poet"}, "style is 'poet'"),
        ({"question": "How is {x} treated?"}, "has '{'"),
        ({"question": "What is a the tooth?"}, "has 'a the'"),
        ({"question": "What is a abscess?"}, "has 'a abscess'"),
        ({"answer": "Something else."}, "is not its facts"),
        ({"context": "word " * 1501}, "over 1500"),
        ({"aspect": "cost"}, "aspect is 'cost'"),
    ],
)
def test_a_spoilt_row_is_found(sound, changes, message: str) -> None:
    concepts, held_out, rows = sound
    assert any(message in str(problem) for problem in check_rows(concepts, swapped(rows, 0, **changes), held_out))


def test_an_unused_fact_is_found(sound) -> None:
    concepts, held_out, rows = sound
    fact = next(row.facts[0] for row in rows if row.split == "test_concept")
    fewer = [row for row in rows if fact not in row.facts]
    assert any(fact in str(p) and "answers no row" in str(p) for p in check_rows(concepts, fewer, held_out))


def test_a_held_out_concept_in_training_is_found(sound) -> None:
    concepts, held_out, rows = sound
    asked = next(row for row in rows if row.split == "test_concept")
    problems = list(map(str, check_rows(concepts, [replace(asked, split="train"), *rows], held_out)))
    assert any("does not belong into train" in problem for problem in problems)
    assert any("stands in training" in problem for problem in problems)


@pytest.mark.parametrize("part", ["question", "answer"])
@pytest.mark.parametrize("change", [str.upper, lambda text: f"{text} indeed"], ids=["same", "nearly"])
def test_a_leak_is_found(sound, part: str, change) -> None:
    rows = sound[2]
    assert list(leaks(rows)) == []
    index = next(i for i, row in enumerate(rows) if row.split == "test_phrasing")
    trained = next(getattr(row, part) for row in rows if row.split == "train" and len(getattr(row, part).split()) > 10)
    found = list(map(str, leaks(swapped(rows, index, **{part: change(trained)}))))
    assert found and all(f"{part}s with similarity" in problem and "test_phrasing" in problem for problem in found)


def test_facts_that_repeat_or_do_not_name_the_concept_are_found(sound) -> None:
    concepts = sound[0]
    first = concepts[0]
    facts = {
        **first.facts,
        "symptoms": first.facts["definition"],
        "prognosis": ("It gets better in most people soon.",),
    }
    messages = list(map(str, check_facts([replace(first, facts=facts)])))
    assert any("repeats" in message for message in messages)
    assert any("does not name" in message for message in messages)
