# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Puts a concept's name into a sentence: article, number, pronoun, capital.

A phrasing is a string with these slots, for the concept `x` and its neighbour `y`:

    {x} {y}   the noun phrase with its article: "a dental abscess", "gingivitis", "the pulp"
    {n}       the bare name
    {is} {does} {has} {was}   agreeing with x;  {s} and {es} end another verb ("occur{s}")
    {it} {them} {its} {itself}  the pronoun for x

The article of a name is not stored: the concept's own definition shows it, because its first sentence
begins with the name as running text uses it. Aliases take theirs from `grammar.yaml`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from .loading import PACKAGE, read_yaml
from .schema import Concept

ARTICLES = ("a", "an", "the")
PREPOSITIONS = (
    *(
        "of",
        "in",
        "on",
        "at",
        "with",
        "from",
        "for",
        "to",
        "after",
        "before",
        "around",
        "between",
        "under",
        "behind",
        "over",
    ),
    *(
        "inside",
        "that",
        "caused",
        "near",
        "by",
        "during",
        "without",
        "where",
        "when",
        "due",
        "against",
        "as",
        "around",
        "while",
    ),
)


@cache
def rules() -> dict[str, Any]:
    return read_yaml(PACKAGE / "grammar.yaml")


def indefinite(phrase: str) -> str:
    """`a` or `an` for the phrase, by its sound: "an X-ray", "a unit", "an MRI scan"."""
    word = re.split(r"[\s-]", phrase, maxsplit=1)[0]
    if word.isupper() and len(word) <= 4:
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    lower = phrase.lower()
    if lower.startswith(("uni", "use", "usu", "eu", "one", "ute", "uvu")):
        return "a"
    if lower.startswith(("hour", "x-", "x ", "8", "11", "18")):
        return "an"
    return "an" if lower[0] in "aeiou" else "a"


def article_of(concept: Concept) -> str:
    """`a`, `the` or an empty string, as the concept's own sentences use the name."""
    if concept.plural:
        prefix = re.search(rf"\bthe {re.escape(concept.name)}", concept.facts["definition"][0], re.IGNORECASE)
        return "the" if prefix and prefix.start() == 0 else ""
    for sentence in (concept.facts["definition"][0], *(s for group in concept.facts.values() for s in group)):
        match = re.search(rf"(?:\b(a|an|the) )?\b{re.escape(concept.name)}\b", sentence, re.IGNORECASE)
        if match:
            article = (match.group(1) or "").lower()
            return "a" if article in ("a", "an") else article
    return ""


def with_article(article: str, name: str) -> str:
    if not article:
        return name
    return f"{indefinite(name) if article == 'a' else article} {name}"


def is_usable(alias: str) -> bool:
    """Whether the alias is a noun phrase that a question can hold."""
    return alias.lower() not in rules()["unusable"]


def alias_phrase(alias: str) -> tuple[str, bool]:
    """An alias as a noun phrase, and whether it is plural: "gum boil" -> ("a gum boil", False)."""
    known, lower = rules(), alias.lower()
    if lower in known["none"] or lower.split()[0] in (*ARTICLES, *known["gerunds"]):
        return alias, False
    for key, article, plural in (
        ("the", "the", False),
        ("the_plural", "the", True),
        ("a", "a", False),
        ("plural", "", True),
    ):
        if lower in known[key]:
            return with_article(article, alias), plural
    head = head_word(alias)
    if head in known["heads"]["plural"]:
        return alias, True
    return with_article("a" if head in known["heads"]["a"] else "", alias), False


def kind_of(concept: Concept) -> str:
    """Which wordings fit: a kind of `grammar.yaml`, `condition`, `tissue`, or `means` (procedures, materials)."""
    for kind, ids in rules()["kinds"].items():
        if concept.id in ids:
            return kind
    if (
        "uses" not in concept.facts
        and "function" not in concept.facts
        and ({"symptoms", "causes"} & set(concept.facts))
    ):
        return "condition"
    return "tissue" if concept.field in rules()["tissue_fields"] else "means"


def base_of(kind: str) -> str:
    """The kind whose wordings serve where `kind` has none of its own; most kinds are their own base."""
    return rules()["bases"].get(kind, kind)


def head_word(phrase: str) -> str:
    """The noun that carries the phrase: the last word before a preposition."""
    return re.split(rf"\s(?:{'|'.join(PREPOSITIONS)})\b", phrase, maxsplit=1)[0].split()[-1].lower()


def slots(phrase: str, plural: bool, bare: str, neighbour: str = "") -> dict[str, str]:
    """The values for the slots of a phrasing."""
    return {
        "x": phrase,
        "y": neighbour,
        "n": bare,
        "is": "are" if plural else "is",
        "does": "do" if plural else "does",
        "has": "have" if plural else "has",
        "was": "were" if plural else "was",
        "s": "" if plural else "s",
        "es": "" if plural else "es",
        "itself": "themselves" if plural else "itself",
        "it": "they" if plural else "it",
        "them": "them" if plural else "it",
        "its": "their" if plural else "its",
    }


def concept_slots(concept: Concept, neighbour: Concept | None = None) -> dict[str, str]:
    """Slots for a concept under its own name."""
    other = with_article(article_of(neighbour), neighbour.name) if neighbour else ""
    return slots(with_article(article_of(concept), concept.name), concept.plural, concept.name, other)


def alias_slots(alias: str, neighbour: Concept | None = None) -> dict[str, str]:
    """Slots for a concept under one of its aliases."""
    phrase, plural = alias_phrase(alias)
    other = with_article(article_of(neighbour), neighbour.name) if neighbour else ""
    return slots(phrase, plural, alias, other)


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def render(template: str, values: dict[str, str]) -> str:
    """Fills the slots and begins with a capital.

    Raises:
        KeyError: the template names a slot that does not exist.
    """
    return capitalise(template.format_map(values))
