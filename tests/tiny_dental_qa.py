# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A small made-up set of concept files: two fields, sixteen concepts, sentences that share few words."""

from __future__ import annotations

from pathlib import Path
from random import Random

import yaml

ASPECTS = ("definition", "causes", "symptoms", "diagnosis", "treatment", "prognosis")
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


def word(rng: Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def sentence(name: str, rng: Random) -> str:
    return f"A {name} is " + " ".join(word(rng) for _ in range(9)) + "."


def concept(name: str, rng: Random) -> dict:
    return {
        "id": name,
        "name": name,
        "plural": False,
        "aliases": [f"{word(rng)} lump"],
        "facts": {aspect: [sentence(name, rng) for _ in range(1 + (aspect == "causes"))] for aspect in ASPECTS},
    }


def documents() -> dict[str, dict]:
    """File name -> content of one field."""
    rng = Random(5)
    found = {}
    for field in ("northern", "southern"):
        concepts = [concept(word(rng) + field[:2] + "itis", rng) for _ in range(8)]
        concepts[0]["neighbour"] = concepts[1]["id"]
        concepts[0]["facts"]["comparison"] = [
            f"A {concepts[0]['name']} is larger than a {concepts[1]['name']} by far."
        ]
        found[field] = {"field": field, "title": field.title(), "concepts": concepts}
    return found


def write(folder: Path, content: dict[str, dict] | None = None) -> Path:
    """Writes the concept files into the folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for field, document in (content or documents()).items():
        (folder / f"{field}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return folder
