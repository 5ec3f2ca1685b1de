# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Decides what is held out: whole concepts for `test_concept`, combinations of aspects for the other splits.

Every choice is drawn from a hash of the concept's id, so adding a concept moves no other one. Which concepts are held
out is frozen in `held_out.yaml` once chosen: a model trained on an earlier build then stays untouched by the test.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from .loading import PACKAGE, read_yaml
from .schema import Concept

HELD_OUT = PACKAGE / "held_out.yaml"
CONCEPT_SHARE = 0.08
#: A field with fewer concepts than this gives none away.
MIN_FIELD = 6
#: How many aspect pairs of each training concept are reserved; the rest is for training.
RESERVED_PAIRS = {"validation": 1, "test_phrasing": 2, "test_long": 1}
#: Of the first sentences of two-sentence aspects ("in one sentence: ..."), the share for each split.
BRIEF_SHARES = (("test_phrasing", 0.35), ("validation", 0.5), ("train", 1.0))


def seeded(*key: str) -> Random:
    """A random generator that depends on the key alone."""
    return Random(int.from_bytes(hashlib.sha256("/".join(key).encode()).digest()[:8], "big"))


def mentions(concepts: list[Concept]) -> dict[str, set[str]]:
    """Concept id -> ids of the other concepts whose facts or names hold its name, or which have it as neighbour."""
    named: dict[str, set[str]] = defaultdict(set)
    texts = {c.id: " ; ".join([c.name, *c.aliases, *c.all_facts.values()]).lower() for c in concepts}
    for concept in concepts:
        stem = concept.name.lower().removesuffix("s")
        pattern = re.compile(rf"\b{re.escape(stem)}(s|es)?\b")
        named[concept.id] |= {
            other for other, text in texts.items() if other != concept.id and stem in text and pattern.search(text)
        }
        if concept.neighbour in texts:
            named[concept.neighbour].add(concept.id)
    return named


def choose_held_out(concepts: list[Concept], keep: Sequence[str] = (), share: float = CONCEPT_SHARE) -> list[str]:
    """Ids for `test_concept`, spread over the fields, that no training concept's facts name.

    Two concepts that name each other and nobody else does may be held out together.

    Args:
        keep: ids chosen earlier, which stay as long as they exist and nothing in training names them.
    """
    named = mentions(concepts)
    fields: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        fields[concept.field].append(concept)
    earlier = {concept.id for concept in concepts} & set(keep)
    chosen: list[str] = []
    for _, members in sorted(fields.items()):
        if len(members) < MIN_FIELD:
            continue
        quota = max(1, round(share * len(members)))
        own = {concept.id for concept in members}
        taken = [concept.id for concept in members if concept.id in earlier and named[concept.id] <= earlier]
        for concept in sorted(members, key=lambda c: seeded("held out", c.id).random()):
            group = {concept.id} | named[concept.id]
            closed = group <= own and all(named[other] <= group for other in group)
            if closed and len(group) <= min(2, quota - len(taken)) and not group & set(taken):
                taken += sorted(group)
        chosen += taken
    return sorted(chosen)


def read_held_out(path: Path = HELD_OUT) -> list[str] | None:
    """The frozen choice, or `None` where there is none yet."""
    return list(read_yaml(path)["test_concept"]) if path.exists() else None


def write_held_out(ids: list[str], path: Path = HELD_OUT) -> None:
    lines = [
        "# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.",
        "# Concepts that no training row speaks of. Frozen by `python -m mambaformer.dental_qa.build --freeze`.",
        "test_concept:",
        *(f"  - {concept_id}" for concept_id in ids),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """Which compositions of one concept's aspects belong to which split; split -> aspects (in canonical order)."""

    singles: dict[str, list[str]]
    briefs: dict[str, list[str]]
    pairs: dict[str, list[tuple[str, ...]]]
    triples: dict[str, list[tuple[str, ...]]]


def plan(concept: Concept, held_out: bool) -> Plan:
    """Reserves compositions so that no answer can stand in two splits."""
    rng = seeded("plan", concept.id)
    pairs: list[tuple[str, ...]] = list(combinations(concept.aspects, 2))
    triples: list[tuple[str, ...]] = list(combinations(concept.aspects, 3))
    rng.shuffle(pairs)
    rng.shuffle(triples)
    two_sentences = [aspect for aspect in concept.aspects if len(concept.facts[aspect]) > 1]
    if held_out:
        half = len(pairs) // 2
        return Plan(
            singles={"test_concept": concept.aspects},
            briefs={"test_concept": two_sentences},
            pairs={"test_concept": pairs[:half], "test_long": pairs[half:]},
            triples={"test_concept": triples[:2]},
        )
    owned: dict[str, list[tuple[str, ...]]] = {}
    start = 0
    for split, count in RESERVED_PAIRS.items():
        owned[split] = pairs[start : start + count]
        start += count
    owned["train"] = pairs[start:]
    briefs: dict[str, list[str]] = defaultdict(list)
    for aspect in two_sentences:
        draw = seeded("brief", concept.id, aspect).random()
        briefs[next(split for split, limit in BRIEF_SHARES if draw < limit)].append(aspect)
    train_pairs = set(owned["train"])
    seen = [triple for triple in triples if all(pair in train_pairs for pair in combinations(triple, 2))]
    unseen = [triple for triple in triples if not any(pair in train_pairs for pair in combinations(triple, 2))]
    return Plan(
        singles={"train": concept.aspects},
        briefs=dict(briefs),
        pairs=owned,
        triples={"train": seen[:1], "test_phrasing": unseen[: rng.randint(0, 1)]},
    )
