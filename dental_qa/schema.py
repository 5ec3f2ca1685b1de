# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The data model of DentalQA: concepts, their facts and the rows composed from them.

Nothing here reads files; `loading` does.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property

#: Every aspect a concept may have, in the order in which an answer tells them.
ASPECTS = (
    "definition",
    "function",
    "uses",
    "causes",
    "symptoms",
    "diagnosis",
    "procedure",
    "treatment",
    "prevention",
    "complications",
    "prognosis",
    "aftercare",
    "urgent_care",
    "comparison",
)
STYLES = ("patient", "clinician", "exam")
LENGTH_CLASSES = ("short_simple", "short_complex", "long")
DIFFICULTIES = ("easy", "medium", "hard")
SPLITS = ("train", "validation", "test_phrasing", "test_concept", "test_long")
COLUMNS = (
    "id",
    "question",
    "context",
    "answer",
    "concept",
    "field",
    "aspect",
    "style",
    "length_class",
    "difficulty",
    "facts",
    "split",
)
#: An id is snake_case and begins with a letter.
ID_PATTERN = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Concept:
    """One thing that DentalQA knows about, as written in `concepts/<field>.yaml`.

    Attributes:
        facts: aspect -> sentences. Fact ids are `<concept>.<aspect>.<n>`, counted from 1.
        neighbour: id of the concept that the comparison aspect speaks of, or `None`.
    """

    id: str
    field: str
    name: str
    plural: bool
    aliases: tuple[str, ...]
    neighbour: str | None
    facts: dict[str, tuple[str, ...]] = dataclasses.field(hash=False)

    @property
    def aspects(self) -> list[str]:
        """The filled aspects in the order of `ASPECTS`."""
        return [aspect for aspect in ASPECTS if aspect in self.facts]

    def fact_ids(self, aspect: str) -> list[str]:
        return [f"{self.id}.{aspect}.{n}" for n in range(1, len(self.facts[aspect]) + 1)]

    @cached_property
    def all_facts(self) -> dict[str, str]:
        """Fact id -> sentence, in the order of `ASPECTS`."""
        return {
            fact_id: sentence
            for aspect in self.aspects
            for fact_id, sentence in zip(self.fact_ids(aspect), self.facts[aspect], strict=True)
        }


@dataclass(frozen=True)
class Problem:
    """Something wrong in the sources or in the data, with the place where it can be mended."""

    check: str
    place: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.place}: {self.message}"


@dataclass(frozen=True)
class Row:
    """One question with its answer; the fields are `COLUMNS`. `facts` holds fact ids in the order of the answer."""

    id: str
    question: str
    context: str
    answer: str
    concept: str
    field: str
    aspect: str
    style: str
    length_class: str
    difficulty: str
    facts: tuple[str, ...]
    split: str

    def as_dict(self) -> dict[str, object]:
        return {name: list(self.facts) if name == "facts" else getattr(self, name) for name in COLUMNS}
