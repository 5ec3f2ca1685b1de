# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Random wordings: the concept is named, the answer untouched, no cue left open, and the same seed gives the same."""

from __future__ import annotations

from mambaformer.dental_qa.schema import ASPECTS, Concept
from mambaformer.trainer.pretrain_questions import CUES, reworded_rows


def concept(identity: str, plural: bool = False, neighbour: str | None = None) -> Concept:
    """A concept without facts, which wordings do not look at."""
    name = identity.replace("_", " ")
    return Concept(id=identity, name=name, plural=plural, aliases=(), neighbour=neighbour, facts={}, field="f")


CONCEPTS = {
    "dry_socket": concept("dry_socket", neighbour="root_fractures"),
    "root_fractures": concept("root_fractures", True),
}
ROWS = [
    {"concept": "dry_socket", "aspect": "causes+comparison", "answer": "A.", "context": ""},
    {"concept": "root_fractures", "aspect": "definition", "answer": "B.", "context": ""},
    {"concept": "root_fractures", "aspect": "definition", "answer": "B.", "context": ""},
    {"concept": "root_fractures", "aspect": "treatment", "answer": "C.", "context": "A passage."},
]


def test_every_aspect_has_cues():
    assert set(CUES) == set(ASPECTS)


def test_rewordings_name_the_concept_and_leave_no_slot():
    pairs = reworded_rows(ROWS, CONCEPTS, 50, 0)
    assert len(pairs) == 2 * 50 + 50  # the second row once, and none for the row with a context
    for question, answer in pairs:
        assert ("dry socket" if answer == "A." else "root fractures") in question.lower()
        assert "{" not in question and "  " not in question
    assert len({question for question, _ in pairs}) > 120


def test_rewordings_are_deterministic():
    assert reworded_rows(ROWS, CONCEPTS, 5, 3) == reworded_rows(ROWS, CONCEPTS, 5, 3)
    assert reworded_rows(ROWS, CONCEPTS, 5, 3) != reworded_rows(ROWS, CONCEPTS, 5, 4)
