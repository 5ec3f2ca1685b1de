# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What an answer to a DentalQA question says: is it about the right concept, and does it state the facts asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ..dental_qa.loading import load_concepts
from ..dental_qa.schema import Concept
from ..trainer.metrics import token_f1
from ..trainer.pretrain_tasks import split_sentences

SAME_FACT = 0.8
"""Token F1 from which a sentence states a fact."""


class Content:
    """
    Judges answers by DentalQA's own facts.

    A sentence *states* the fact that it shares most words with, of all facts of the data set, where their token F1 is
    at least `SAME_FACT`. So an answer whose sentence states no fact is vague or garbled, and one that states another
    concept's fact is off the topic.
    """

    def __init__(self) -> None:
        self.concepts: dict[str, Concept] = {concept.id: concept for concept in load_concepts()[0]}
        self.facts = {fact: text for concept in self.concepts.values() for fact, text in concept.all_facts.items()}
        self.words = {fact: set(text.lower().split()) for fact, text in self.facts.items()}

    def stated(self, sentence: str) -> str | None:
        """Id of the fact that `sentence` states, or `None`."""
        words = set(sentence.lower().split())
        near = sorted(self.words, key=lambda fact: -len(words & self.words[fact]) / len(words | self.words[fact]))[:5]
        score, best = max((token_f1([sentence], [self.facts[fact]]), fact) for fact in near)
        return best if score >= SAME_FACT else None

    def judge(self, answer: str, concept: str, facts: Sequence[str]) -> dict[str, float]:
        """
        Shares between 0 and 1 of one answer.

        Returns:
            `right_concept`: 1 where the first sentence states a fact of `concept`, or names it; `facts_found`: share
            of `facts` that some sentence states; `sentences_sound`: share of sentences that state some fact.
        """
        sentences = split_sentences(answer)
        stated = [self.stated(sentence) for sentence in sentences]
        wanted = self.concepts[concept]
        first = sentences[0].lower() if sentences else ""
        named = any(name.lower() in first for name in (wanted.name, *wanted.aliases))
        own = bool(stated) and stated[0] is not None and stated[0].split(".")[0] == concept
        return {
            "right_concept": float(own or named),
            "facts_found": sum(fact in stated for fact in facts) / len(facts),
            "sentences_sound": sum(fact is not None for fact in stated) / max(1, len(stated)),
        }
