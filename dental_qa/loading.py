# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Reads `concepts/*.yaml` into `Concept`s and says what is wrong with what it could not read.

A concept that breaks the schema is left out of the data, and is always reported: the caller gets the
problems next to the concepts and must show them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .schema import ASPECTS, ID_PATTERN, Concept, Problem

PACKAGE = Path(__file__).resolve().parent
CONCEPTS = PACKAGE / "concepts"
MIN_ASPECTS = 5
CONCEPT_KEYS = {"id", "name", "plural", "aliases", "neighbour", "facts"}


def read_yaml(path: Path) -> Any:
    """Parses one YAML file, with libyaml where PyYAML was built with it (ten times faster)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as handle:
        return yaml.load(handle, Loader=loader)


def load_concepts(folder: Path = CONCEPTS) -> tuple[list[Concept], list[Problem]]:
    """All valid concepts of the folder, sorted by field file and place in it, and the problems of the others.

    Raises:
        FileNotFoundError: the folder holds no `*.yaml`.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.yaml concept file; pass the folder that does.")
    concepts: list[Concept] = []
    problems: list[Problem] = []
    for path in paths:
        found, wrong = _load_file(path)
        concepts += found
        problems += wrong
    return _check_across(concepts, problems)


def _load_file(path: Path) -> tuple[list[Concept], list[Problem]]:
    try:
        document = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [], [Problem("schema", path.name, f"is not readable YAML: {' '.join(str(error).split())}")]
    if not isinstance(document, dict) or not isinstance(document.get("concepts"), list):
        return [], [
            Problem("schema", path.name, "must be a mapping with the keys field, title and concepts (a list).")
        ]
    problems = []
    if document.get("field") != path.stem:
        problems.append(
            Problem("schema", path.name, f"field is {document.get('field')!r}; it must be the file's name.")
        )
    if not isinstance(document.get("title"), str):
        problems.append(Problem("schema", path.name, "title is missing."))
    concepts = []
    for number, entry in enumerate(document["concepts"], start=1):
        place = f"{path.name}:{entry.get('id', f'concept {number}') if isinstance(entry, dict) else number}"
        errors = _entry_errors(entry)
        if errors:
            problems += [Problem("schema", place, error) for error in errors]
        else:
            concepts.append(_concept(entry, path.stem))
    return concepts, problems


def _concept(entry: dict[str, Any], field: str) -> Concept:
    return Concept(
        id=entry["id"],
        field=field,
        name=entry["name"],
        plural=entry.get("plural", False),
        aliases=tuple(entry.get("aliases") or ()),
        neighbour=entry.get("neighbour"),
        facts={aspect: tuple(sentences) for aspect, sentences in entry["facts"].items()},
    )


def _entry_errors(entry: Any) -> list[str]:
    """What makes one entry unusable; an empty list when it fits the schema."""
    if not isinstance(entry, dict):
        return [f"is {entry!r}, not a mapping."]
    errors = [f"has the unknown key {key!r}." for key in sorted(set(entry) - CONCEPT_KEYS, key=str)]
    if not isinstance(entry.get("id"), str) or not ID_PATTERN.fullmatch(entry["id"]):
        errors.append(f"id {entry.get('id')!r} is not snake_case.")
    if not isinstance(entry.get("name"), str) or not entry["name"].strip():
        errors.append(f"name is {entry.get('name')!r}; a non-empty string is needed.")
    if not isinstance(entry.get("plural", False), bool):
        errors.append(f"plural is {entry['plural']!r}; true or false is needed.")
    aliases = entry.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        errors.append(f"aliases is {aliases!r}; a list of non-empty strings is needed.")
    if not isinstance(entry.get("neighbour"), str | None):
        errors.append(f"neighbour is {entry['neighbour']!r}; the id of a concept is needed.")
    facts = entry.get("facts")
    if not isinstance(facts, dict):
        return [*errors, f"facts is {facts!r}; a mapping from aspect to sentences is needed."]
    errors += [
        f"has the unknown aspect {aspect!r}; known are {', '.join(ASPECTS)}."
        for aspect in facts
        if aspect not in ASPECTS
    ]
    for aspect, sentences in facts.items():
        ok = isinstance(sentences, list) and sentences and all(isinstance(s, str) and s.strip() for s in sentences)
        if not ok or len(sentences) > 2:
            errors.append(f"{aspect} must be a list of one or two sentences, not {sentences!r}.")
    if "definition" not in facts:
        errors.append("has no definition.")
    if len(facts) < MIN_ASPECTS:
        errors.append(f"fills {len(facts)} aspects; at least {MIN_ASPECTS} are needed.")
    return errors


def _check_across(concepts: list[Concept], problems: list[Problem]) -> tuple[list[Concept], list[Problem]]:
    """Drops concepts whose id is taken, and reports unknown neighbours and names that mean two concepts."""
    by_id: dict[str, Concept] = {}
    for concept in concepts:
        if concept.id in by_id:
            place = f"{concept.field}.yaml:{concept.id}"
            problems.append(Problem("schema", place, f"the id is already used in {by_id[concept.id].field}.yaml."))
        else:
            by_id[concept.id] = concept
    owner = {concept.name.lower(): concept.id for concept in by_id.values()}
    names: dict[str, str] = {}
    for concept in by_id.values():
        place = f"{concept.field}.yaml:{concept.id}"
        if concept.neighbour is not None and concept.neighbour not in by_id:
            problems.append(Problem("neighbour", place, f"the neighbour {concept.neighbour!r} is no concept."))
        if concept.neighbour == concept.id:
            problems.append(Problem("neighbour", place, "the concept is its own neighbour."))
        if concept.name.lower() in names:
            problems.append(
                Problem("names", place, f"the name {concept.name!r} is also {names[concept.name.lower()]}'s.")
            )
        names[concept.name.lower()] = concept.id
    seen: dict[str, str] = {}
    for concept in by_id.values():
        for alias in concept.aliases:
            other = owner.get(alias.lower()) or seen.get(alias.lower())
            if other:
                place = f"{concept.field}.yaml:{concept.id}"
                problems.append(
                    Problem("names", place, f"the alias {alias!r} also means {other}; it asks two questions.")
                )
            seen[alias.lower()] = concept.id
    return list(by_id.values()), problems


def ambiguous_names(concepts: list[Concept]) -> set[str]:
    """Lower-cased aliases and names that stand for more than one concept; questions must not use them."""
    owners: dict[str, set[str]] = {}
    for concept in concepts:
        for name in (concept.name, *concept.aliases):
            owners.setdefault(name.lower(), set()).add(concept.id)
    return {name for name, ids in owners.items() if len(ids) > 1}
