# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Many wordings of a question, so that a tiny model learns to look for the concept and the aspects in it.

Trained on a few fixed phrasings, a model of a few million parameters learns those by heart and mistakes the concept in
any other. Here each question is put together at random from `question_wordings.yaml`, thousands of ways, under the
concept's name or one of its aliases, and asks for one, two or three aspects. Left to the held-out splits are the
wordings that DentalQA keeps for them (the file was written without sight of those; what it shares with them by chance
is not used) and the combinations of aspects that they ask for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from ..dental_qa.grammar import alias_slots, capitalise, concept_slots, is_usable
from ..dental_qa.loading import ambiguous_names, read_yaml
from ..dental_qa.schema import Concept
from ..dental_qa.splitting import plan
from ..dental_qa.wording import held_out_wordings, normalised, variant

ASPECT_COUNTS = {1: 0.45, 2: 0.45, 3: 0.10}
"""How often a question asks for so many aspects."""
ALIAS_SHARE = 0.35
FULL_SHARE = 0.4
AROUND_SHARE = 0.4


@cache
def wordings() -> dict[str, Any]:
    """`question_wordings.yaml` (aspects, frames, triples, singles, around) without what DentalQA holds out."""
    held_out = held_out_wordings()

    def free(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: free(value) for key, value in entry.items()}
        return [text for text in entry if text == "{q}" or normalised(text) not in held_out]

    return free(read_yaml(Path(__file__).with_name("question_wordings.yaml")))


def reworded(concept: Concept, aspects: tuple[str, ...], values: dict[str, str], rng: random.Random) -> str:
    """
    A random question about one to three `aspects` of `concept`, in their canonical order.

    Args:
        values: the slots of its name (`grammar.concept_slots` or `alias_slots`).
    """
    parts = [variant(wordings()["aspects"], concept, aspect, bool(values["y"])) for aspect in aspects]
    if len(aspects) == 1 and rng.random() < FULL_SHARE:
        question = rng.choice(parts[0]["full"]).format_map(values)
    else:
        lead, about = (rng.choice(parts[0][kind]).format_map(values) for kind in ("lead", "about"))
        follows = [rng.choice(part["follow"]).format_map(values) for part in parts[1:]] or [""]
        nouns = [rng.choice(part["noun"]).format_map(values) for part in parts]
        frame = rng.choice(wordings()[{1: "singles", 2: "frames", 3: "triples"}[len(aspects)]])
        filled = {
            **values,
            "lead": lead,
            "Lead": capitalise(lead),
            "about": about,
            "follow": follows[0],
            "Follow": capitalise(follows[0]),
            "follow2": follows[-1],
            **dict(zip("abc", nouns, strict=False)),
        }
        question = frame.format_map(filled)
    question = capitalise(question)
    if rng.random() < AROUND_SHARE:
        question = rng.choice(wordings()["around"]).format_map({**values, "q": question})
    return question


def training_combinations(concept: Concept) -> dict[int, list[tuple[str, ...]]]:
    """The aspects, pairs and triples of aspects that no held-out split asks for; size -> combinations."""
    pairs = plan(concept, held_out=False).pairs["train"]
    free = set(pairs)
    found: dict[int, list[tuple[str, ...]]] = {1: [(aspect,) for aspect in concept.aspects], 2: pairs}
    found[3] = [t for t in combinations(concept.aspects, 3) if all(pair in free for pair in combinations(t, 2))]
    return found


def reworded_rows(concepts: list[Concept], trained: Iterable[str], each: int, seed: int) -> list[tuple[str, str]]:
    """
    About `each` random questions for every aspect of the concepts whose ids are in `trained`, with their answers.

    Args:
        concepts: all concepts; neighbours and ambiguous aliases are looked up in them.
    """
    rng = random.Random(seed)
    known = {concept.id: concept for concept in concepts}
    ambiguous = ambiguous_names(concepts)
    made: list[tuple[str, str]] = []
    for concept in (known[name] for name in sorted(set(trained))):
        neighbour = known.get(concept.neighbour or "")
        aliases = [a for a in concept.aliases if a.lower() not in ambiguous and is_usable(a)]
        allowed = {size: found for size, found in training_combinations(concept).items() if found}
        for _ in range(each * len(concept.aspects)):
            size = rng.choices(list(allowed), [ASPECT_COUNTS[n] for n in allowed])[0]
            aspects = rng.choice(allowed[size])
            if aliases and rng.random() < ALIAS_SHARE:
                values = alias_slots(rng.choice(aliases), neighbour)
            else:
                values = concept_slots(concept, neighbour)
            answer = " ".join(fact for aspect in aspects for fact in concept.facts[aspect])
            made.append((reworded(concept, aspects, values, rng), answer))
    return made
