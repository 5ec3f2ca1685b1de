# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Composes the rows: for each concept the questions of every kind, with the answers put together from its facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from . import contexts
from .grammar import alias_slots, concept_slots, is_usable, render
from .loading import ambiguous_names
from .schema import SPLITS, STYLES, Concept, Row
from .splitting import Plan, plan, seeded
from .wording import framed, is_one_sentence, part_question, single_templates

#: Which group of wordings a split uses; test_concept mixes known and unseen wordings.
GROUPS = {
    "train": ("train",),
    "validation": ("validation",),
    "test_phrasing": ("test",),
    "test_concept": ("train", "test"),
    "test_long": ("test",),
    "probe": ("test",),
}
#: Rows for one single aspect, two-sentence aspect in brief, pair and triple of aspects.
SINGLES = {"train": 5, "test_concept": 2}
BRIEFS = {"train": 2, "validation": 1, "test_phrasing": 1, "test_concept": 1}
PAIRS = {"train": 1, "validation": 1, "test_phrasing": 1, "test_concept": 1}
TRIPLES = {"train": 1, "test_phrasing": 1, "test_concept": 1}
MAX_TRAIN_PAIRS = 6
#: Long rows of one training concept, by split; a held-out concept asks each of its pairs kept for test_long once.
LONG = {"train": 4, "validation": 1, "test_long": 1}
ALIAS_SHARE = 0.4


class Composer:
    """Makes the rows of every concept.

    Args:
        concepts: all valid concepts.
        held_out: ids whose rows go to test_concept and test_long only.
    """

    def __init__(self, concepts: list[Concept], held_out: list[str]) -> None:
        self.concepts = {concept.id: concept for concept in concepts}
        self.held_out = set(held_out)
        self.ambiguous = ambiguous_names(concepts)
        self.training = [concept for concept in concepts if concept.id not in self.held_out]
        self.by_field: dict[str, list[Concept]] = {}
        for concept in self.training:
            self.by_field.setdefault(concept.field, []).append(concept)

    def rows(self) -> Iterator[Row]:
        for concept in self.concepts.values():
            yield from _numbered(self._concept_rows(concept))

    def probe(self, count: int) -> list[Row]:
        """Single questions of training concepts in wordings of the test, with the answers that training has.

        They belong to no split, because their answers stand in training: they show whether a model understands a
        known question in new words.
        """
        pairs = [(concept, aspect) for concept in self.training for aspect in concept.aspects]
        picked = seeded("probe").sample(pairs, min(count, len(pairs)))
        return [next(self._singles(concept, aspect, "probe", 1)) for concept, aspect in picked]

    def _concept_rows(self, concept: Concept) -> Iterator[Row]:
        chosen = plan(concept, concept.id in self.held_out)
        for split in SPLITS:
            yield from self._short_rows(concept, chosen, split)
            yield from self._long_rows(concept, chosen, split)

    def _short_rows(self, concept: Concept, chosen: Plan, split: str) -> Iterator[Row]:
        for aspect in chosen.singles.get(split, []):
            yield from self._singles(concept, aspect, split, SINGLES[split])
        for aspect in chosen.briefs.get(split, []):
            yield from self._briefs(concept, aspect, split)
        pairs = chosen.pairs.get(split, [])
        if split in PAIRS:
            for pair in pairs[:MAX_TRAIN_PAIRS] if split == "train" else pairs:
                yield from self._joined(concept, pair, split, PAIRS[split])
        for triple in chosen.triples.get(split, []):
            yield from self._joined(concept, triple, split, TRIPLES[split])

    def _singles(self, concept: Concept, aspect: str, split: str, count: int) -> Iterator[Row]:
        rng = seeded("single", split, concept.id, aspect)
        styles = [*STYLES, "patient", rng.choice(STYLES)] if count > len(STYLES) else rng.sample(STYLES, count)
        asked: set[str] = set()
        for number, style in enumerate(styles):
            group = GROUPS[split][number % len(GROUPS[split])]
            question = self._single_question(concept, aspect, group, style, rng, asked)
            if question is not None:
                asked.add(question)
                yield self._row(concept, (aspect,), split, style, question)

    def _briefs(self, concept: Concept, aspect: str, split: str) -> Iterator[Row]:
        rng = seeded("brief row", split, concept.id, aspect)
        asked: set[str] = set()
        for style in rng.sample(STYLES, BRIEFS[split]):
            group = GROUPS[split][-1]
            question = self._single_question(concept, aspect, group, style, rng, asked, one_sentence=True)
            if question is not None:
                asked.add(question)
                question = framed("brief", group, question, {}, rng)
                yield self._row(concept, (aspect,), split, style, question, brief=True)

    def _joined(self, concept: Concept, aspects: tuple[str, ...], split: str, count: int) -> Iterator[Row]:
        rng = seeded("joined", split, concept.id, *aspects)
        for number, style in enumerate(rng.sample(STYLES, count)):
            group = GROUPS[split][(number + rng.randint(0, 1)) % len(GROUPS[split])]
            values = self._values(concept, style, rng)
            question = part_question(concept, aspects, group, style, values, rng)
            yield self._row(concept, aspects, split, style, question)

    def _long_rows(self, concept: Concept, chosen: Plan, split: str) -> Iterator[Row]:
        held_out = concept.id in self.held_out
        pairs = chosen.pairs.get(split, [])
        rng = seeded("long", split, concept.id)
        if split == "train" and not held_out:
            singles = [(aspect,) for aspect in rng.sample(concept.aspects, min(3, len(concept.aspects)))]
            asked = [*singles, *pairs[:1]][: LONG["train"]]
        elif split in ("validation", "test_long"):
            asked = pairs if held_out else pairs[: LONG[split]]
        else:
            return
        for number, aspects in enumerate(asked):
            yield from self._long(concept, aspects, split, number)

    def _long(self, concept: Concept, aspects: tuple[str, ...], split: str, number: int) -> Iterator[Row]:
        rng = seeded("long row", split, concept.id, *aspects)
        style = rng.choice(STYLES)
        group = GROUPS[split][-1]
        values = concept_slots(concept, self._neighbour(concept))
        kind = "case" if contexts.can_be_case(concept) and "symptoms" not in aspects and number % 2 else "passage"
        if len(aspects) == 1:
            question = self._single_question(
                concept, aspects[0], group, style, rng, set(), one_sentence=True, alias=False
            )
        else:
            question = part_question(concept, aspects, group, style, values, rng)
        if question is None:
            return
        others = self._others(concept, rng)
        if kind == "case":
            with_answer = split != "train" or rng.random() < 0.5
            context = contexts.case(concept, aspects, others, values, rng, with_answer)
        else:
            words = contexts.draw_words(rng, test=split == "test_long")
            context = contexts.passage(concept, aspects, others, values, rng, words)
        if is_one_sentence(question):
            question = framed(kind, group, question, values, rng)
        yield self._row(concept, aspects, split, style, question, context=context)

    def _others(self, concept: Concept, rng: Random) -> list[Concept]:
        """Training concepts to fill a context with: those of the same field first."""
        near = [other for other in self.by_field.get(concept.field, []) if other.id != concept.id]
        far = [other for other in self.training if other.field != concept.field]
        return rng.sample(near, min(8, len(near))) + rng.sample(far, min(40, len(far)))

    def _neighbour(self, concept: Concept) -> Concept | None:
        return self.concepts.get(concept.neighbour) if concept.neighbour else None

    def _values(self, concept: Concept, style: str, rng: Random, alias: bool = True) -> dict[str, str]:
        """Slots under the concept's name or, for patients, often under an alias that means this concept alone."""
        aliases = [name for name in concept.aliases if name.lower() not in self.ambiguous and is_usable(name)]
        neighbour = self._neighbour(concept)
        if alias and aliases and style == "patient" and rng.random() < ALIAS_SHARE:
            return alias_slots(rng.choice(aliases), neighbour)
        return concept_slots(concept, neighbour)

    def _single_question(
        self,
        concept: Concept,
        aspect: str,
        group: str,
        style: str,
        rng: Random,
        asked: set[str],
        one_sentence: bool = False,
        alias: bool = True,
    ) -> str | None:
        """A question not yet asked, or `None` when the style has no other wording left."""
        templates = single_templates(concept, aspect, group, style, self._neighbour(concept) is not None)
        for template in rng.sample(templates, len(templates)):
            if one_sentence and not is_one_sentence(template):
                continue
            question = render(template, self._values(concept, style, rng, alias))
            if question not in asked:
                return question
        return None

    def _row(
        self,
        concept: Concept,
        aspects: tuple[str, ...],
        split: str,
        style: str,
        question: str,
        context: str = "",
        brief: bool = False,
    ) -> Row:
        known = concept.all_facts
        facts = [fact for aspect in aspects for fact in concept.fact_ids(aspect)[: 1 if brief else None]]
        if context:
            length_class = "long"
        else:
            length_class = "short_simple" if len(aspects) == 1 else "short_complex"
        return Row(
            id=f"{concept.id}.{'+'.join(aspects)}.{style}",
            question=question,
            context=context,
            answer=" ".join(known[fact] for fact in facts),
            concept=concept.id,
            field=concept.field,
            aspect="+".join(aspects),
            style=style,
            length_class=length_class,
            difficulty=_difficulty(aspects, context),
            facts=tuple(facts),
            split=split,
        )


def _difficulty(aspects: tuple[str, ...], context: str) -> str:
    """Easy: one aspect. Medium: two, a comparison, or one within a context of up to 400 words. Hard: the rest."""
    points = len(aspects) - 1 + (aspects == ("comparison",))
    if context:
        points += 1 if contexts.word_count(context) <= 400 else 2
    return ("easy", "medium")[points] if points < 2 else "hard"


def _numbered(rows: Iterator[Row]) -> Iterator[Row]:
    """Makes ids unique by a running number."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.id] += 1
        yield replace(row, id=f"{row.id}.{seen[row.id]}")
