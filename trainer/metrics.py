# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Scores of generated answers against references: exact match, token F1, ROUGE-L and, where a scorer is given, BERTScore.

All are means over answers in [0, 1]. To add a metric, write a function of predictions and references and enter it in
`METRICS`. The packages behind ROUGE and BERTScore are called directly and imported when they are used.
"""

from __future__ import annotations

import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (SQuAD, arXiv 1606.05250)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Share of answers equal to their reference once both are normalised."""
    return mean(float(normalise(p) == normalise(r)) for p, r in zip(predictions, references, strict=True))


def token_f1(predictions: list[str], references: list[str]) -> float:
    """Mean F1 of the words that answer and reference share, counted with repetition, after normalising."""
    return mean(
        words_f1(normalise(p).split(), normalise(r).split()) for p, r in zip(predictions, references, strict=True)
    )


def words_f1(predicted: list[str], wanted: list[str]) -> float:
    """F1 of two lists of words; 1 where both are empty, 0 where one is."""
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted))


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean ROUGE-L F-measure with stemming (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return mean(scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True))


METRICS: dict[str, Callable[[list[str], list[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def mean(values) -> float:
    """Mean of numbers, 0 of none."""
    values = list(values)
    return float(np.mean(values)) if values else 0.0


class BertScore:
    """
    BERTScore (arXiv 1904.09675) with a named encoder; scores of different encoders are not comparable.

    Args:
        model: Hub id or folder of an encoder. num_layers: which layer to use, needed for encoders that bert-score does
            not know. baseline: a .tsv for rescaling, which bert-score reads as its own format.

    An empty answer or reference scores 0.
    """

    def __init__(self, model: str, num_layers: int | None = None, baseline: str | None = None):
        from bert_score import BERTScorer

        folder = Path(model)
        self.name = folder.name if folder.is_dir() else model
        self._alias = None
        if folder.is_dir() and "t5" in str(folder).lower():
            # bert-score takes any path with these letters for a T5, and loads an encoder with random weights.
            self._alias = tempfile.TemporaryDirectory(prefix="encoder-")
            model = str(Path(self._alias.name) / "model")
            Path(model).symlink_to(folder.resolve(), target_is_directory=True)
        self.scorer = BERTScorer(
            model_type=model,
            num_layers=num_layers,
            rescale_with_baseline=baseline is not None,
            baseline_path=baseline,
            lang="en" if baseline is not None else None,
        )
        if self.scorer._tokenizer.model_max_length > 1 << 30:  # an endless limit overflows the fast tokenizer
            self.scorer._tokenizer.model_max_length = 512

    def __call__(self, predictions: list[str], references: list[str]) -> float:
        """Mean F1."""
        scores = np.zeros(len(predictions))
        filled = [i for i, (p, r) in enumerate(zip(predictions, references, strict=True)) if p.strip() and r.strip()]
        if filled:
            _, _, f1 = self.scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
            scores[filled] = f1.numpy()
        return mean(scores)


def score_answers(
    predictions: list[str], references: list[str], bert_score: BertScore | None = None
) -> dict[str, float | str]:
    """
    All of `METRICS`, and BERTScore's F1 with its encoder's name where a scorer is given.

    Raises:
        ValueError: where there are not as many predictions as references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: give one for each.")
    scores: dict[str, float | str] = {name: metric(predictions, references) for name, metric in METRICS.items()}
    if bert_score is not None:
        scores["bert_score"] = bert_score(predictions, references)
        scores["bert_score_model"] = bert_score.name
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
