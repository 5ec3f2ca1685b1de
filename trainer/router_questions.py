# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Questions for the embedded default's router: what its experts know, asked in wordings that they have never met.

    python -m mambaformer.trainer.router_questions runs/router_questions

Writes `distil.jsonl` and `validation.jsonl` (question, context, answer), to train the router on and to set its
threshold on. Where experts are asked as in their training they are nearly always right, and a router learns little;
where users ask, wordings are new. No wording, question or combination of aspects of DentalQA's test splits is used.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ..dental_qa import load_dental_qa
from ..dental_qa.loading import load_concepts
from .pretrain_questions import reworded_contexts, reworded_rows

CONTEXT_SHARE = 0.1
DISTIL, VALIDATION = 6000, 600
"""Questions of the embedded default."""


def router_questions(count: int, longest_words: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `question`, `context`, `answer` in reserved wordings; `CONTEXT_SHARE` of them with a passage."""
    concepts = load_concepts()[0]
    trained = set(load_dental_qa("train")["concept"])
    long = round(CONTEXT_SHARE * count)
    rows = [
        {"question": question, "context": context, "answer": answer}
        for question, context, answer in reworded_contexts(concepts, trained, long, longest_words, seed, True, 0.0)
    ]
    seen = {row["question"] for row in rows}
    asked = reworded_rows(concepts, trained, 4, seed, reserved=True)
    rng = random.Random(seed)
    rng.shuffle(asked)
    for question, answer in asked:
        if len(rows) < count and question not in seen:
            seen.add(question)
            rows.append({"question": question, "context": "", "answer": answer})
    rng.shuffle(rows)
    return rows


def write_router_questions(
    folder: Path, distil: int = DISTIL, validation: int = VALIDATION, longest_words: int = 220, seed: int = 0
) -> None:
    """Write both files into `folder`; no question stands in both."""
    rows = router_questions(distil + validation, longest_words, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", rows[:validation]), ("distil", rows[validation:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--distil", type=int, default=DISTIL, help="questions to train on (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="to calibrate on (default: %(default)s)")
    arguments = parser.parse_args()
    write_router_questions(arguments.folder, arguments.distil, arguments.validation)
    print(f"saved: {arguments.folder}")


if __name__ == "__main__":
    main()
