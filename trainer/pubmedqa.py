# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
PubMedQA's 1,000 expert-labelled questions (arXiv 1909.06146), with the official test set, from a file or from the Hub.

The official half is named by its PubMed ids in `pubmedqa_test.yaml`, since the Hub's copy has one split only. Of the
rest, the last `VALIDATION` ids are `validation` and the others `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import yaml
from datasets import Dataset, load_dataset

from .decisions import with_decision
from .reading import check_utf8

HUB_ID = "qiaojin/PubMedQA"
LABELED = "pqa_labeled"
FILE = "ori_pqal.json"
VALIDATION = 50
FIELDS = ("QUESTION", "CONTEXTS", "LONG_ANSWER", "final_decision")


def is_pubmedqa(name_or_path: str, config_name: str | None = None) -> bool:
    """Whether this names the expert-labelled set: its own file, or the Hub id (with no other configuration)."""
    return Path(name_or_path).name == FILE or (name_or_path == HUB_ID and config_name in (None, LABELED))


def read_pubmedqa(name_or_path: str | Path, split: str) -> Dataset:
    """
    One split, with the columns `id` (PubMed's), `question`, `context`, `answer` (`yes. <long answer>`, so that the
    decision is learned and can be scored), `long_answer` and `decision` (yes, no or maybe).

    Args:
        name_or_path: `qiaojin/PubMedQA`, or the path of `ori_pqal.json`.
        split: `train` (450 rows), `validation` (50) or `test` (the official 500).

    Raises:
        FileNotFoundError, ConnectionError: the file does not exist, or the Hub is out of reach.
        ValueError: for another split, a file that is not UTF-8 or not PubMedQA's, or one that lacks test questions.
    """
    if name_or_path == HUB_ID:
        table = load_dataset(HUB_ID, LABELED, split="train")
        rows = {
            str(row["pubid"]): (row["question"], row["context"]["contexts"], row["long_answer"], row["final_decision"])
            for row in table
        }
    else:
        rows = read_records(Path(name_or_path))
    splits = split_ids(rows, str(name_or_path))
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist; PubMedQA has {', '.join(splits)}.")
    chosen = [rows[key] for key in splits[split]]
    return Dataset.from_dict(
        {
            "id": splits[split],
            "question": [question for question, *_ in chosen],
            "context": [" ".join(contexts) for _, contexts, *_ in chosen],
            "answer": [with_decision(decision, answer) for *_, answer, decision in chosen],
            "long_answer": [answer for *_, answer, _ in chosen],
            "decision": [decision for *_, decision in chosen],
        }
    )


def read_records(path: Path) -> dict[str, tuple]:
    """Question, contexts, long answer and decision by PubMed id."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: fetch PubMedQA's {FILE}, or give {HUB_ID}.")
    check_utf8(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} could not be read as json: {error}") from error
    if not isinstance(records, dict):
        raise ValueError(f"{path} holds a {type(records).__name__}: PubMedQA's {FILE} maps PubMed ids to questions.")
    for key, record in records.items():
        missing = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{path}: question {key} has no {', '.join(missing)}: give PubMedQA's {FILE} as it is.")
    return {key: tuple(record[name] for name in FIELDS) for key, record in records.items()}


@lru_cache(maxsize=1)
def test_ids() -> frozenset[str]:
    """PubMed ids of the official test set."""
    text = Path(__file__).with_name("pubmedqa_test.yaml").read_text(encoding="utf-8")
    return frozenset(map(str, yaml.safe_load(text)))


def split_ids(ids: Iterable[str], name: str) -> dict[str, list[str]]:
    """Ids of `train`, `validation` and `test`, each sorted as text."""
    known = set(ids)
    lacking = len(test_ids() - known)
    if lacking:
        raise ValueError(f"{name} lacks {lacking} of the {len(test_ids())} official test questions: fetch it whole.")
    rest = sorted(known - test_ids())
    return {"train": rest[:-VALIDATION], "validation": rest[-VALIDATION:], "test": sorted(test_ids())}
