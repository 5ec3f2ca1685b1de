# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Random wordings: the concept is named, answers are its facts, nothing held out is used, a seed gives the same."""

from __future__ import annotations

import json
import re

import pytest

from mambaformer.dental_qa import load_dental_qa
from mambaformer.dental_qa.loading import load_concepts
from mambaformer.dental_qa.schema import ASPECTS
from mambaformer.dental_qa.splitting import read_held_out
from mambaformer.dental_qa.wording import held_out_wordings, normalised, parts, phrasings
from mambaformer.trainer.pretrain_questions import (
    QuestionMaker,
    disguised,
    has_article,
    is_reserved,
    reworded_contexts,
    reworded_rows,
    training_combinations,
    wordings,
)
from mambaformer.trainer.pretrain_tasks import split_sentences
from mambaformer.trainer.router_questions import CONTEXT_SHARE, write_router_questions

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


def test_reserved_wordings_are_kept_from_the_experts():
    free, reserved = (set(leaves(wordings(kept))) - {"{q}"} for kept in (False, True))
    assert free and reserved and not free & reserved
    assert 0.08 < len(reserved) / len(free | reserved) < 0.17
    assert all(is_reserved(text) for text in reserved) and not any(is_reserved(text) for text in free)
    table = wordings(True)["aspects"]
    assert all(table[aspect][kind] for aspect in table for kind in KINDS)


def test_a_passage_holds_the_answer(concepts, trained):
    for question, context, answer in reworded_contexts(concepts, [c.id for c in trained], 40, 200, 0):
        passage = " ".join(context.split())
        assert all(sentence in passage for sentence in split_sentences(answer)) and "{" not in question
        assert len(context.split()) < 500


def test_a_disguised_concept_keeps_its_facts_under_the_other_name(concepts):
    known = {concept.id: concept for concept in concepts}
    gingivitis, other = known["gingivitis"], known["dental_fluorosis"]
    told = disguised(gingivitis, other)
    assert told.name == other.name and told.id == "gingivitis"
    for aspect, facts in gingivitis.facts.items():
        for before, after in zip(facts, told.facts[aspect], strict=True):
            assert "gingivitis" not in after.lower()
            assert after.lower() == before.lower().replace("gingivitis", other.name.lower())
            assert after[0].isupper()
    assert disguised(gingivitis, gingivitis) is None
    countable = next(concept for concept in concepts if has_article(concept) and not concept.plural)
    assert disguised(gingivitis, countable) is None


def test_an_article_agrees_with_the_other_name(concepts):
    countable = [c for c in concepts if has_article(c) and not c.plural]
    concept = next(c for c in countable if c.facts["definition"][0].startswith("A "))
    vowel = next(c for c in countable if c.name[0] == "a" and c.facts["definition"][0].startswith("An "))
    assert disguised(concept, vowel).facts["definition"][0].startswith(f"An {vowel.name}")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router_questions")
    write_router_questions(folder, distil=150, validation=50)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("distil", "validation")
    }


def test_router_questions_of_one_file_are_not_those_of_the_other(asked):
    assert {name: len(found) for name, found in asked.items()} == {"distil": 150, "validation": 50}
    assert len({row["question"] for found in asked.values() for row in found}) == 200


def test_router_questions_leak_nothing(asked):
    for split in ("test_phrasing", "test_concept", "test_long"):
        held_out = load_dental_qa(split)
        answers, questions = set(held_out["answer"]), {q.lower() for q in held_out["question"]}
        for row in asked["distil"] + asked["validation"]:
            assert row["answer"] not in answers and row["question"].lower() not in questions


def test_router_questions_are_new_to_the_experts_plain_or_about_a_passage(asked, concepts, trained):
    maker = QuestionMaker(concepts, [c.id for c in trained], 0)
    experts = {maker.question(concept)[0] for concept in maker.concepts for _ in range(20)}
    table = wordings()["aspects"]
    plain = {re.sub(r"{.*?}", ".*", lead) for kinds in table.values() for lead in kinds["lead"]}
    is_plain = re.compile(f"({'|'.join(plain)})\\?", re.IGNORECASE)
    rows = asked["distil"] + asked["validation"]
    new = [row["question"] for row in rows if not row["context"] and not is_plain.fullmatch(row["question"])]
    assert sum(bool(row["context"]) for row in rows) / len(rows) == pytest.approx(CONTEXT_SHARE)
    assert 0.4 < len(new) / len(rows) < 0.6
    assert not experts & set(new)
