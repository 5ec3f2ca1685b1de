# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Judging answers by DentalQA's facts: gold answers are perfect, a neighbour's is off the topic, noise is unsound."""

from __future__ import annotations

import pytest

from mambaformer.benchmarks.answer_content import Content
from mambaformer.dental_qa import load_dental_qa


@pytest.fixture(scope="module")
def content():
    return Content()


@pytest.fixture(scope="module")
def rows():
    return load_dental_qa("test_phrasing").select(range(0, 200, 20))


def test_the_gold_answer_is_right(content, rows):
    for row in rows:
        assert content.judge(row["answer"], row["concept"], row["facts"]) == {
            "right_concept": 1.0,
            "facts_found": 1.0,
            "sentences_sound": 1.0,
        }


def test_half_an_answer_finds_half_the_facts(content, rows):
    row = next(row for row in rows if len(row["facts"]) == 2)
    half = content.facts[row["facts"][1]]
    assert content.judge(half, row["concept"], row["facts"])["facts_found"] == 0.5


def test_another_concepts_answer_is_off_the_topic(content, rows):
    other = content.concepts["gingivitis"]
    judged = content.judge(other.facts["definition"][0], "dental_implant", ["dental_implant.definition.1"])
    assert judged["right_concept"] == 0.0 and judged["facts_found"] == 0.0 and judged["sentences_sound"] == 1.0


def test_noise_is_unsound(content):
    judged = content.judge("The the of a bleeding. Longer longer patients.", "gingivitis", ["gingivitis.causes.1"])
    assert judged == {"right_concept": 0.0, "facts_found": 0.0, "sentences_sound": 0.0}
    assert content.judge("", "gingivitis", ["gingivitis.causes.1"])["sentences_sound"] == 0.0
