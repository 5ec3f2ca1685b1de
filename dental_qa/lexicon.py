# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`python -m mambaformer.dental_qa.lexicon`: how dental a word is, computed from the training split against MedQuAD.

The weight of a word is its log-odds ratio between the two texts under a symmetric Dirichlet prior (Monroe, Colaresi
and Quinn, "Fightin' Words", Political Analysis 16:372, 2008, section 3.3). With counts y of n words over a
vocabulary of V words,

    weight(w) = log((y1 + a1) / (n1 + a1 V - y1 - a1)) - log((y2 + a2) / (n2 + a2 V - y2 - a2)),   a2 = a1 n2 / n1

The prior counts of the two texts stand to each other as the texts' lengths, so a word that both use equally often,
or that is too rare to tell, weighs about 0, and one sighting says little. Positive: dental. The answers' sentences
count once each, so the builder's repetitions and the wordings of questions have no say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .dataset import DATA, load_dental_qa
from .loading import CONCEPTS, PACKAGE, load_concepts
from .reference_text import REFERENCE, medquad_texts
from .similarity import words

LEXICON = PACKAGE / "lexicon.json"
#: Prior count of each word in the dental text.
PRIOR = 1.0
#: A word needs this many occurrences, in either text, to be listed.
MIN_DENTAL, MIN_GENERAL = 2, 400


def counts(texts: Iterable[str]) -> Counter[str]:
    """Words (no numbers) and how often they occur."""
    return Counter(word for text in texts for word in words(text) if not any(map(str.isdigit, word)))


def log_odds(dental: Counter[str], general: Counter[str], prior: float = PRIOR) -> dict[str, float]:
    """Word -> weight for every word that either text uses often enough, sorted by word.

    Raises:
        ValueError: one of the texts is empty.
    """
    n1, n2 = dental.total(), general.total()
    if not n1 or not n2:
        raise ValueError(f"both texts need words; they have {n1} and {n2}.")
    vocabulary = sorted(dental.keys() | general.keys())
    prior1, prior2 = prior, prior * n2 / n1
    total1, total2 = n1 + prior1 * len(vocabulary), n2 + prior2 * len(vocabulary)
    weights = {}
    for word in vocabulary:
        if dental[word] >= MIN_DENTAL or general[word] >= MIN_GENERAL:
            weight = _logit(dental[word] + prior1, total1) - _logit(general[word] + prior2, total2)
            weights[word] = round(weight, 3)
    return weights


def _logit(part: float, whole: float) -> float:
    return math.log(part / (whole - part))


def training_sentences(data: Path = DATA, concepts_dir: Path = CONCEPTS) -> list[str]:
    """The distinct sentences of the training answers."""
    concepts, _ = load_concepts(concepts_dir)
    facts = {fact_id: sentence for concept in concepts for fact_id, sentence in concept.all_facts.items()}
    used = {fact for row in load_dental_qa("train", data)[:]["facts"] for fact in row}
    return sorted({facts[fact] for fact in used if fact in facts})


def load_lexicon(path: Path = LEXICON) -> dict[str, float]:
    """Word (lower case) -> weight, as the command below wrote it."""
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Writes the lexicon; returns 1 where the text to compare with is missing."""
    parser = argparse.ArgumentParser(prog="python -m mambaformer.dental_qa.lexicon", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=LEXICON)
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="folder with medquad/")
    args = parser.parse_args(argv)
    try:
        general = counts(medquad_texts(args.reference))
        weights = log_odds(counts(training_sentences(args.data)), general)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = ",\n".join(f"{json.dumps(word, ensure_ascii=False)}: {weight}" for word, weight in weights.items())
    args.out.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    ranked = sorted(weights, key=weights.__getitem__)
    print(f"{len(weights)} words, written to {args.out}")
    print("most dental:", ", ".join(reversed(ranked[-15:])))
    print("most general:", ", ".join(ranked[:15]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
