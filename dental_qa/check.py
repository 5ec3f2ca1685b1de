# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`python -m mambaformer.dental_qa.check`: every check of the sources and of the data.

Exit code 1 when one fails.

The comparisons with other text (8-gram overlap, spelling) need MedQuAD and PubMedQA as local files and are skipped,
with a line that says so, where these are absent.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from .dataset import DATA, build_rows, read_rows
from .fact_checks import check_facts
from .grammar import is_usable
from .loading import CONCEPTS, PACKAGE, load_concepts
from .overlap import N, shared_ngrams
from .reference_text import REFERENCE, medquad_texts, missing, pubmedqa_texts
from .row_checks import check_rows
from .schema import SPLITS, Concept, Problem
from .spelling import known_words, read_terms, unknown_words
from .splitting import choose_held_out, read_held_out
from .wording import wording_errors

#: Own sentences that are no facts: every YAML file of the package but the lists of words.
WORDINGS = ("phrasings.yaml", "parts.yaml", "contexts.yaml")


def own_texts(concepts: list[Concept]) -> dict[str, str]:
    """Place -> text for everything that was written for the data set."""
    texts = {
        f"{concept.field}.yaml:{fact_id}": sentence
        for concept in concepts
        for fact_id, sentence in concept.all_facts.items()
    }
    for concept in concepts:
        texts[f"{concept.field}.yaml:{concept.id}"] = " ; ".join([concept.name, *filter(is_usable, concept.aliases)])
    return texts


def all_problems(
    concepts_dir: Path = CONCEPTS, data: Path = DATA, reference: Path = REFERENCE
) -> Iterator[Problem | str]:
    """Problems as they are found; a plain string says what was skipped and why."""
    concepts, problems = load_concepts(concepts_dir)
    yield from problems
    yield from (Problem("wordings", *error.split(" ", 1)) for error in wording_errors())
    yield from check_facts(concepts)
    held_out = (read_held_out() if concepts_dir == CONCEPTS else None) or choose_held_out(concepts)
    known = {concept.id for concept in concepts}
    yield from (Problem("held out", "held_out.yaml", f"{i!r} is no concept.") for i in held_out if i not in known)
    expected, _ = build_rows(concepts, held_out)
    if all((data / f"{split}.parquet").exists() for split in SPLITS):
        if read_rows(data) != expected:
            yield Problem(
                "data", str(data), "is not what the sources give; run `python -m mambaformer.dental_qa.build`."
            )
    else:
        yield Problem("data", str(data), "has not been built; run `python -m mambaformer.dental_qa.build`.")
    yield from check_rows(concepts, expected, held_out)
    yield from compare_with_reference(concepts, reference)


def compare_with_reference(concepts: list[Concept], reference: Path = REFERENCE) -> Iterator[Problem | str]:
    """Overlap and spelling."""
    absent = missing(reference)
    if absent:
        yield f"skipped overlap and spelling: {', '.join(map(str, absent))} not found"
        return
    texts = own_texts(concepts)
    wordings = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in WORDINGS}
    others = list(chain(medquad_texts(reference), pubmedqa_texts(reference)))
    for gram, places in shared_ngrams({**texts, **wordings}, others).items():
        yield Problem("overlap", ", ".join(dict.fromkeys(places)), f"shares these {N} words with other text: {gram!r}")
    for word, places in unknown_words(texts, known_words(others, read_terms())).items():
        yield Problem("spelling", places[0], f"{word!r} is not a known word; mend it or add it to dental_terms.yaml.")


def main(argv: list[str] | None = None) -> int:
    """Prints the problems and a count for each check; returns 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m mambaformer.dental_qa.check", description=__doc__)
    parser.add_argument("--concepts", type=Path, default=CONCEPTS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="folder with medquad/ and pubmedqa/")
    args = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    for problem in all_problems(args.concepts, args.data, args.reference):
        print(problem)
        if isinstance(problem, Problem):
            counts[problem.check] += 1
    print("; ".join(f"{check}: {count}" for check, count in counts.items()) or "no problem found")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
