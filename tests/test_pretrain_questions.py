# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Random wordings: the concept is named, answers are its facts, nothing held out is used, a seed gives the same."""

from __future__ import annotations

import pytest

from mambaformer.dental_qa import load_dental_qa
from mambaformer.dental_qa.loading import load_concepts
from mambaformer.dental_qa.schema import ASPECTS
from mambaformer.dental_qa.splitting import read_held_out
from mambaformer.dental_qa.wording import held_out_wordings, normalised, parts, phrasings
from mambaformer.trainer.pretrain_questions import reworded_rows, training_combinations, wordings

KINDS = ("lead", "follow", "noun", "about", "full")


@pytest.fixture(scope="module")
def concepts():
    return load_concepts()[0]


@pytest.fixture(scope="module")
def trained(concepts):
    held_out = set(read_held_out())
    return [concept for concept in concepts if concept.id not in held_out]


@pytest.fixture(scope="module")
def pairs(concepts, trained):
    return reworded_rows(concepts, [concept.id for concept in trained], 3, 0)


def leaves(entry):
    if isinstance(entry, dict):
        return [text for value in entry.values() for text in leaves(value)]
    return list(entry)


def test_every_aspect_has_wordings_left():
    table = wordings()["aspects"]
    assert set(ASPECTS) <= set(table)
    assert all(len(table[aspect][kind]) >= 8 for aspect in table for kind in KINDS)


def test_no_wording_is_held_out():
    held_out = held_out_wordings()
    assert normalised(phrasings()["causes"]["test"]["patient"][0]) in held_out
    assert normalised(parts()["frames"]["validation"]["exam"][0]) in held_out
    assert normalised(phrasings()["causes"]["train"]["patient"][0]) not in held_out
    assert not held_out & {normalised(text) for text in leaves(wordings()) if text != "{q}"}


def test_questions_name_the_concept_and_leave_no_slot(pairs):
    assert len({question for question, _ in pairs}) > 0.95 * len(pairs)
    for question, answer in pairs:
        assert "{" not in question and "  " not in question and answer.endswith(".")


def test_answers_are_facts_of_the_concept(concepts, trained):
    concept = trained[0]
    made = {answer for _, answer in reworded_rows(concepts, [concept.id], 40, 1)}
    allowed = [combination for found in training_combinations(concept).values() for combination in found]
    assert made <= {" ".join(f for aspect in chosen for f in concept.facts[aspect]) for chosen in allowed}
    assert len(made) > len(concept.aspects)


@pytest.mark.parametrize("split", ["validation", "test_phrasing", "test_concept", "test_long"])
def test_no_held_out_answer_or_question_is_made(split, concepts, trained):
    made = reworded_rows(concepts, [concept.id for concept in trained], 8, 0)
    rows = load_dental_qa(split)
    assert not set(rows["answer"]) & {answer for _, answer in made}
    assert not {q.lower() for q in rows["question"]} & {question.lower() for question, _ in made}


def test_a_seed_gives_the_same(concepts, trained, pairs):
    names = [concept.id for concept in trained]
    assert reworded_rows(concepts, names, 3, 0) == pairs
    assert reworded_rows(concepts, names, 3, 4) != pairs
