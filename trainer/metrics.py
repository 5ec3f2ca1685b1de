# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Scores of generated answers against references: exact match, token F1, ROUGE-L and, where a scorer is given, BERTScore.

All are means over answers in [0, 1]. To add a metric, write a function of predictions and references and enter it in
`METRICS` and, one score an answer, in `METRICS_EACH`. The packages behind ROUGE and BERTScore are called directly, and
imported when they are used.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import numpy as np

from .bertscore import BertScore
from .decisions import decision_of, score_decisions

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (SQuAD, arXiv 1606.05250)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match_each(predictions: list[str], references: list[str]) -> np.ndarray:
    """1 where an answer equals its reference once both are normalised, else 0; `(n,)` float."""
    return np.array([float(normalise(p) == normalise(r)) for p, r in zip(predictions, references, strict=True)])


def token_f1_each(predictions: list[str], references: list[str]) -> np.ndarray:
    """F1 of the words that answer and reference share, counted with repetition, after normalising; `(n,)` float."""
    pairs = zip(predictions, references, strict=True)
    return np.array([words_f1(normalise(p).split(), normalise(r).split()) for p, r in pairs])


def words_f1(predicted: list[str], wanted: list[str]) -> float:
    """F1 of two lists of words; 1 where both are empty, 0 where one is."""
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted))


def rouge_l_each(predictions: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-L F-measure with stemming (Lin, 2004); `(n,)` float."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)])


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Share of answers equal to their reference once both are normalised."""
    return mean(exact_match_each(predictions, references))


def token_f1(predictions: list[str], references: list[str]) -> float:
    """Mean of `token_f1_each`."""
    return mean(token_f1_each(predictions, references))


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean of `rouge_l_each`."""
    return mean(rouge_l_each(predictions, references))


METRICS: dict[str, Callable[[list[str], list[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}
METRICS_EACH: dict[str, Callable[[list[str], list[str]], np.ndarray]] = {
    "exact_match": exact_match_each,
    "token_f1": token_f1_each,
    "rouge_l": rouge_l_each,
}
"""The same, one score an answer: what a bootstrap over questions needs."""


def mean(values) -> float:
    """Mean of numbers, 0 of none."""
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def score_answers(
    predictions: list[str], references: list[str], bert_score: BertScore | None = None
) -> dict[str, float | str]:
    """
    All of `METRICS`, and BERTScore's F1 with its encoder's name where a scorer is given.

    Where every reference begins with yes, no or maybe, as PubMedQA's do, also `score_decisions`, each figure's name
    after `decision_`.

    Raises:
        ValueError: where there are not as many predictions as references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: give one for each.")
    scores: dict[str, float | str] = {name: metric(predictions, references) for name, metric in METRICS.items()}
    if bert_score is not None:
        scores["bert_score"] = bert_score(predictions, references)
        scores["bert_score_model"] = bert_score.name
    wanted = [decision for decision in map(decision_of, references) if decision is not None]
    if wanted and len(wanted) == len(references):
        found = score_decisions([decision_of(text) for text in predictions], wanted)
        scores |= {f"decision_{name}": value for name, value in found.items()}
    return scores


def metrics_for(tokenizer, bert_score: BertScore | None = None) -> Callable:
    """A `compute_metrics` for the trainer with `predict_with_generate`: decodes answers and labels, scores them."""

    def compute(prediction) -> dict[str, float]:
        texts = []
        for ids in (prediction.predictions, prediction.label_ids):
            ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
            texts.append([text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)])
        scores = score_answers(*texts, bert_score)
        return {name: value for name, value in scores.items() if not isinstance(value, str)}

    return compute
