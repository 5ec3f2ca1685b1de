# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The wordings of questions: reads `phrasings.yaml` and `parts.yaml` and fills them for a concept.

Wordings come in three groups, `train`, `validation` and `test`; which split uses which group is decided in
`compose`. A group is never borrowed from another, so that a held-out wording stays unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Any

from .grammar import base_of, capitalise, kind_of, render
from .loading import PACKAGE, read_yaml
from .schema import ASPECTS, STYLES, Concept

GROUPS = ("train", "validation", "test")
PART_KINDS = ("lead", "follow", "noun")


@cache
def phrasings() -> dict[str, dict[str, dict[str, list[str]]]]:
    """aspect (or `aspect@means`, `comparison@alone`) -> group -> style -> templates."""
    return read_yaml(PACKAGE / "phrasings.yaml")


@cache
def parts() -> dict[str, Any]:
    return read_yaml(PACKAGE / "parts.yaml")


def variant(table: dict[str, Any], concept: Concept, aspect: str, has_neighbour: bool) -> Any:
    """The entry of a table of wordings that fits the concept's kind: `aspect@kind`, or the nearest there is."""
    if aspect == "comparison" and not has_neighbour:
        return table["comparison@alone"]
    kind = kind_of(concept)
    base = base_of(kind)
    for key in (f"{aspect}@{kind}", f"{aspect}@{base}", *([] if base == "condition" else [f"{aspect}@means"])):
        if key in table:
            return table[key]
    return table[aspect]


def single_templates(concept: Concept, aspect: str, group: str, style: str, has_neighbour: bool) -> list[str]:
    """The templates for a question about one aspect."""
    return variant(phrasings(), concept, aspect, has_neighbour)[group][style]


def part_question(
    concept: Concept, aspects: tuple[str, ...], group: str, style: str, values: dict[str, str], rng: Random
) -> str:
    """One question about two or three aspects, in their canonical order.

    Raises:
        ValueError: other than two or three aspects.
    """
    if len(aspects) not in (2, 3):
        raise ValueError(f"a joined question takes 2 or 3 aspects, not {len(aspects)}: {aspects!r}.")
    has_neighbour = bool(values["y"])
    chosen = [variant(parts()["aspects"], concept, aspect, has_neighbour)[group] for aspect in aspects]
    lead = rng.choice(chosen[0]["lead"]).format_map(values)
    follows = [rng.choice(part["follow"]).format_map(values) for part in chosen[1:]]
    nouns = [rng.choice(part["noun"]).format_map(values) for part in chosen]
    frame = rng.choice(parts()["frames" if len(aspects) == 2 else "triples"][group][style])
    filled = {
        **values,
        "lead": lead,
        "Lead": capitalise(lead),
        "follow": follows[0],
        "Follow": capitalise(follows[0]),
        "follow2": follows[-1],
        **dict(zip("abc", nouns, strict=False)),
    }
    return render(frame, filled)


def framed(kind: str, group: str, question: str, values: dict[str, str], rng: Random) -> str:
    """A question put in relation to a passage or a case, or asked for in one sentence (`brief`)."""
    template = rng.choice(parts()[kind][group])
    before = template.split("{q}")[0].rstrip()
    if before.endswith((",", ":")):
        question = decapitalise(question)
    return render(template, {**values, "q": question})


def decapitalise(sentence: str) -> str:
    """The sentence as it stands behind a comma; "I" and acronyms keep their capital."""
    first = sentence.split()[0]
    return sentence if first == "I" or not first[1:].islower() else sentence[0].lower() + sentence[1:]


def is_one_sentence(question: str) -> bool:
    return not any(mark in question[:-1] for mark in ("? ", ". ", ": ", "! "))


def normalised(template: str) -> str:
    """A wording by its words alone: small letters, no punctuation, the concept's name as one slot."""
    text = re.sub(r"\{[nx]\}", "_", template.lower())
    return " ".join(re.sub(r"[^a-z_ ]", "", text).split())


def held_out_wordings() -> frozenset[str]:
    """Every wording under validation and test, `normalised`: what a model that is to be tested must not train on."""
    return frozenset(map(normalised, _texts(phrasings(), GROUPS[1:]))) | set(
        map(normalised, _texts(parts(), GROUPS[1:]))
    )


def _texts(entry: Any, groups: Sequence[str], inside: bool = False) -> Iterator[str]:
    """The wordings of a table that stand under one of `groups`."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from _texts(value, groups, inside or key in groups)
    elif inside:
        yield from entry


def wording_errors() -> list[str]:
    """What is missing or empty in the wording files, for the checks."""
    errors = []
    for key, groups in phrasings().items():
        for group in GROUPS:
            for style in STYLES:
                templates = groups.get(group, {}).get(style, [])
                if not templates:
                    errors.append(f"phrasings.yaml {key}.{group}.{style} has no wording.")
                errors += [
                    f"phrasings.yaml {key}: {t!r} does not name the concept." for t in templates if not _names(t)
                ]
    for key, groups in parts()["aspects"].items():
        for group in GROUPS:
            errors += [
                f"parts.yaml {key}.{group}.{kind} has no wording."
                for kind in PART_KINDS
                if not groups[group].get(kind)
            ]
    held_out = held_out_wordings()
    for name, table in (("phrasings.yaml", phrasings()), ("parts.yaml", parts())):
        errors += [
            f"{name}: the training wording {text!r} is held out elsewhere."
            for text in _texts(table, ("train",))
            if text != "{q}" and normalised(text) in held_out
        ]
    errors += [f"phrasings.yaml lacks {aspect}." for aspect in ASPECTS if aspect not in phrasings()]
    errors += [f"parts.yaml lacks {aspect}." for aspect in ASPECTS if aspect not in parts()["aspects"]]
    return errors


def _names(template: str) -> bool:
    return "{x}" in template or "{n}" in template
