# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Many wordings of a question, so that a tiny model learns to look for the concept and the aspects in it.

Trained on a few fixed phrasings, a model of a few million parameters learns those by heart and mistakes the concept in
any other. Here each question is put together at random from `question_wordings.yaml`, thousands of ways, under the
concept's name or one of its aliases, and asks for one, two or three aspects. Left to the held-out splits are the
wordings that DentalQA keeps for them (the file was written without sight of those; what it shares with them by chance
is not used) and the combinations of aspects that they ask for.

One wording in `RESERVED_EACH` is reserved: the experts never meet it, so that the router can be distilled and
calibrated on questions that are as new to them as a user's (`router_questions`).
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from ..dental_qa.contexts import passage
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
DISGUISED_SHARE = 0.5
RESERVED_EACH = 8
"""One wording in so many is reserved."""


def is_reserved(wording: str) -> bool:
    """Whether the experts are never asked in this wording; a property of its text."""
    return wording != "{q}" and zlib.crc32(normalised(wording).encode()) % RESERVED_EACH == 0


@cache
def wordings(reserved: bool = False) -> dict[str, Any]:
    """
    `question_wordings.yaml` (aspects, frames, triples, singles, around) without what DentalQA holds out.

    Args:
        reserved: the wordings kept from the experts, or all the others.
    """
    held_out = held_out_wordings()

    def free(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: free(value) for key, value in entry.items()}
        known = [text for text in entry if text == "{q}" or normalised(text) not in held_out]
        return [text for text in known if text == "{q}" or is_reserved(text) == reserved]

    return free(read_yaml(Path(__file__).with_name("question_wordings.yaml")))


def reworded(
    concept: Concept, aspects: tuple[str, ...], values: dict[str, str], rng: random.Random, reserved: bool = False
) -> str:
    """
    A random question about one to three `aspects` of `concept`, in their canonical order.

    Args:
        values: the slots of its name (`grammar.concept_slots` or `alias_slots`). reserved: as in `wordings`.
    """
    table = wordings(reserved)
    parts = [variant(table["aspects"], concept, aspect, bool(values["y"])) for aspect in aspects]
    if len(aspects) == 1 and rng.random() < FULL_SHARE:
        question = rng.choice(parts[0]["full"]).format_map(values)
    else:
        lead, about = (rng.choice(parts[0][kind]).format_map(values) for kind in ("lead", "about"))
        follows = [rng.choice(part["follow"]).format_map(values) for part in parts[1:]] or [""]
        nouns = [rng.choice(part["noun"]).format_map(values) for part in parts]
        frame = rng.choice(table[{1: "singles", 2: "frames", 3: "triples"}[len(aspects)]])
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
        question = rng.choice(table["around"]).format_map({**values, "q": question})
    return question


def training_combinations(concept: Concept) -> dict[int, list[tuple[str, ...]]]:
    """The aspects, pairs and triples of aspects that no held-out split asks for; size -> combinations."""
    pairs = plan(concept, held_out=False).pairs["train"]
    free = set(pairs)
    found: dict[int, list[tuple[str, ...]]] = {1: [(aspect,) for aspect in concept.aspects], 2: pairs}
    found[3] = [t for t in combinations(concept.aspects, 3) if all(pair in free for pair in combinations(t, 2))]
    return found


class QuestionMaker:
    """
    Random questions about the concepts whose ids are in `trained`, and the facts that answer them.

    Args:
        concepts: all concepts; neighbours and ambiguous aliases are looked up in them.
        reserved: ask in the wordings that the experts never meet, or in all the others.
    """

    def __init__(self, concepts: list[Concept], trained: Iterable[str], seed: int, reserved: bool = False):
        self.rng, self.reserved = random.Random(seed), reserved
        self.known = {concept.id: concept for concept in concepts}
        self.ambiguous = ambiguous_names(concepts)
        self.concepts = [self.known[name] for name in sorted(set(trained))]
        self.combinations = {
            concept.id: {size: found for size, found in training_combinations(concept).items() if found}
            for concept in self.concepts
        }

    def aspects_of(self, concept: Concept) -> tuple[str, ...]:
        """A random training combination of aspects."""
        allowed = self.combinations[concept.id]
        size = self.rng.choices(list(allowed), [ASPECT_COUNTS[n] for n in allowed])[0]
        return self.rng.choice(allowed[size])

    def slots_of(self, concept: Concept) -> dict[str, str]:
        """The slots of the concept's name or of one of its aliases."""
        neighbour = self.known.get(concept.neighbour or "")
        aliases = [a for a in concept.aliases if a.lower() not in self.ambiguous and is_usable(a)]
        if aliases and self.rng.random() < ALIAS_SHARE:
            return alias_slots(self.rng.choice(aliases), neighbour)
        return concept_slots(concept, neighbour)

    def question(self, concept: Concept) -> tuple[str, str]:
        """A question and its answer."""
        aspects, values = self.aspects_of(concept), self.slots_of(concept)
        return reworded(concept, aspects, values, self.rng, self.reserved), answer_of(concept, aspects)

    def plain_question(self, concept: Concept) -> tuple[str, str]:
        """The bare question about one random aspect, with nothing around it, and its answer."""
        aspect, values = self.rng.choice(concept.aspects), self.slots_of(concept)
        leads = variant(wordings(self.reserved)["aspects"], concept, aspect, bool(values["y"]))["lead"]
        return capitalise(self.rng.choice(leads).format_map(values)) + "?", answer_of(concept, (aspect,))

    def with_context(self, longest_words: int, disguise: float) -> tuple[str, str, str]:
        """
        A question about a random concept, a passage of up to about `longest_words` words, the answer in it.

        With probability `disguise` the facts stand there under another concept's name: only who reads can answer.
        """
        rng = self.rng
        concept = rng.choice(self.concepts)
        aspects = self.aspects_of(concept)
        near = [other for other in self.concepts if other.field == concept.field]
        others = rng.sample(near, min(len(near), 12)) + rng.sample(self.concepts, min(len(self.concepts), 12))
        values = self.slots_of(concept)
        told = disguised(concept, rng.choice(self.concepts)) if rng.random() < disguise else None
        if told is not None:
            values = concept_slots(told, self.known.get(concept.neighbour or ""))
        else:
            told = concept
        others = [o for o in dict.fromkeys(others) if o.id != concept.id and o.name != told.name]
        context = passage(told, aspects, others, {"n": told.name}, rng, rng.randint(50, longest_words))
        return reworded(told, aspects, values, rng, self.reserved), context, answer_of(told, aspects)


def disguised(concept: Concept, other: Concept) -> Concept | None:
    """`concept` under the name of `other`; `None` where the names do not stand alike in a sentence."""
    alike = concept.plural == other.plural and has_article(concept) == has_article(other)
    if not alike or concept.id == other.id:
        return None
    name = other.name
    old = re.compile(rf"\b(?:(?P<article>an?) )?(?P<name>{re.escape(concept.name)})\b", re.IGNORECASE)

    def swap(match: re.Match) -> str:
        if match["article"] is None:
            return name if match["name"][0] == concept.name[0] else capitalise(name)
        return f"{match['article'][0]}{'n' if name[0].lower() in 'aeiou' else ''} {name}"

    facts = {aspect: tuple(old.sub(swap, fact) for fact in found) for aspect, found in concept.facts.items()}
    return replace(concept, name=name, aliases=(), facts=facts)


def has_article(concept: Concept) -> bool:
    """Whether running text puts an article before the name."""
    return concept_slots(concept)["x"] != concept.name


def answer_of(concept: Concept, aspects: tuple[str, ...]) -> str:
    """The facts of these aspects, in their order."""
    return " ".join(fact for aspect in aspects for fact in concept.facts[aspect])


def reworded_rows(concepts: list[Concept], trained: Iterable[str], each: int, seed: int) -> list[tuple[str, str]]:
    """About `each` random questions for every aspect of the concepts in `trained`, with their answers."""
    maker = QuestionMaker(concepts, trained, seed)
    return [maker.question(concept) for concept in maker.concepts for _ in range(each * len(concept.aspects))]


def reworded_contexts(
    concepts: list[Concept], trained: Iterable[str], count: int, longest_words: int, seed: int
) -> list[tuple[str, str, str]]:
    """`count` random questions with a passage that holds the answer: question, context, answer."""
    maker = QuestionMaker(concepts, trained, seed)
    return [maker.with_context(longest_words, DISGUISED_SHARE) for _ in range(count)]
