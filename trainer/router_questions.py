# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Questions for the embedded default's router: what its experts know, asked as users ask.

    python -m mambaformer.trainer.router_questions runs/router_questions

Writes `distil.jsonl` and `validation.jsonl` (question, context, answer), to train the router on and to set its
threshold on. Where experts are asked as in their training they are nearly always right, and a router learns little;
where users ask, wordings are new. Most questions here are in wordings that the experts have never met, some with a
passage to read; the rest are the plainest ones ("What causes ...?"), which users ask most and which training, made of
thousands of wordings, seldom asked. No question, held-out wording or combination of aspects of DentalQA's test splits
is used.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ..dental_qa import load_dental_qa
from ..dental_qa.loading import load_concepts
from .pretrain_questions import QuestionMaker

CONTEXT_SHARE, PLAIN_SHARE = 0.2, 0.25
DISGUISED_SHARE = 0.5
"""Of the passages to train on, those that tell the facts of one concept under the name of another."""
DISTIL, VALIDATION = 8000, 800
"""Questions of the embedded default."""


def router_questions(count: int, longest_words: int, seed: int, disguise: float) -> list[dict[str, str]]:
    """
    `count` rows of `question`, `context`, `answer`, no question twice.

    `CONTEXT_SHARE` of them have a passage of up to about `longest_words` words and a reserved wording, `PLAIN_SHARE`
    are plain, and the others are in reserved wordings. Of the passages, the share `disguise` tells the facts of one
    concept under the name of another: neither expert knows them by heart, and only who reads can answer.
    """
    concepts = load_concepts()[0]
    trained = set(load_dental_qa("train")["concept"])
    reserved, known = (QuestionMaker(concepts, trained, seed, kept) for kept in (True, False))
    rng = random.Random(seed)

    def with_context() -> tuple[str, str, str]:
        return reserved.with_context(longest_words, disguise)

    def plain() -> tuple[str, str, str]:
        question, answer = known.plain_question(rng.choice(known.concepts))
        return question, "", answer

    def reworded() -> tuple[str, str, str]:
        question, answer = reserved.question(rng.choice(reserved.concepts))
        return question, "", answer

    rows: dict[str, dict[str, str]] = {}
    parts = (with_context, CONTEXT_SHARE), (plain, CONTEXT_SHARE + PLAIN_SHARE), (reworded, 1.0)
    for ask, up_to in parts:
        while len(rows) < round(up_to * count):
            question, context, answer = ask()
            rows.setdefault(question, {"question": question, "context": context, "answer": answer})
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def write_router_questions(
    folder: Path, distil: int = DISTIL, validation: int = VALIDATION, longest_words: int = 500, seed: int = 0
) -> None:
    """
    Write both files into `folder`; no question stands in both.

    Passages about what the experts cannot know are for training alone: thresholds set on many of them would leave
    little of the budget to questions without a passage.
    """
    kept = router_questions(validation, longest_words, seed + 1, disguise=0.0)
    asked = {row["question"] for row in kept}
    rows = router_questions(distil + validation, longest_words, seed, DISGUISED_SHARE)
    learned = [row for row in rows if row["question"] not in asked][:distil]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", kept), ("distil", learned)):
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
