# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""General medical text to compare with: MedQuAD and PubMedQA as local files. Not part of the data set.

Expected in the folder: `medquad/medquad.jsonl.xz` (lines with question and answer) and `pubmedqa/ori_pqal.json`.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from .loading import PACKAGE

#: Beside the repository; `--reference` of the commands says otherwise.
REFERENCE = PACKAGE.parent.parent / "shared" / "data"
MEDQUAD = Path("medquad") / "medquad.jsonl.xz"
PUBMEDQA = Path("pubmedqa") / "ori_pqal.json"


def missing(folder: Path = REFERENCE) -> list[Path]:
    """The expected files that are not there."""
    return [folder / name for name in (MEDQUAD, PUBMEDQA) if not (folder / name).exists()]


def medquad_texts(folder: Path = REFERENCE) -> Iterator[str]:
    """Every question and every answer.

    Raises:
        FileNotFoundError: the file is not there.
    """
    path = folder / MEDQUAD
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the folder that holds {MEDQUAD} with --reference.")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["question"]
            yield record["answer"]


def pubmedqa_texts(folder: Path = REFERENCE) -> Iterator[str]:
    """Every question, abstract section and long answer.

    Raises:
        FileNotFoundError: the file is not there.
    """
    path = folder / PUBMEDQA
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the folder that holds {PUBMEDQA} with --reference.")
    for record in json.loads(path.read_text(encoding="utf-8")).values():
        yield from (record["QUESTION"], *record["CONTEXTS"], record["LONG_ANSWER"])
