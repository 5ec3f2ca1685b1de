# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Training of a Unigram vocabulary (Kudo, 2018, "Subword Regularization", section 3.2) that repeats itself exactly.

Every count is an integer and every order is fixed, so equal words give equal pieces and equal scores. Substrings are
counted with the frequency of the words that they stand in, so a frequent word is a candidate even if no other word
contains it. Expectations use the best segmentation of each word (Viterbi training), not all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

from tokenizers import models

SEED_FACTOR = 12  # candidates at the start, relative to the wanted number of pieces
SHRINKING = 0.65  # share of the pieces that a pruning round keeps
EM_STEPS = 2  # re-estimations before each pruning round
LONGEST_PIECE = 16  # characters


def train_unigram(words: Mapping[str, int], alphabet: Collection[str], size: int) -> dict[str, float]:
    """Choose pieces and their log-probabilities.

    Args:
        words: how often each word occurs in the training text; a piece never crosses a word.
        alphabet: single characters that always stay; words with other characters are cut there.
        size: number of pieces to end with, the alphabet included.

    Returns:
        Piece -> natural logarithm of its probability, rounded to 6 decimals; fewer than `size` where the words have
        no more useful pieces.

    Raises:
        ValueError: if `size` is smaller than the alphabet.
    """
    if size < len(alphabet):
        raise ValueError(f"size={size} is smaller than the alphabet ({len(alphabet)} characters); use a larger size.")
    kept = set(alphabet)
    parts = _within_alphabet(words, kept)
    counts = _seed(parts, kept, SEED_FACTOR * size)
    while len(kept.union(counts)) > size:
        for _ in range(EM_STEPS):
            counts = _recount(parts, _scores(counts, kept))
        wanted = max(size - len(kept), int(len(counts) * SHRINKING))
        counts = _prune(counts, _scores(counts, kept), kept, wanted)
    final = _recount(parts, _scores(counts, kept))
    scores = _scores({piece: final.get(piece, 1) for piece in counts}, kept)
    return {piece: round(score, 6) for piece, score in scores.items()}


def _within_alphabet(words: Mapping[str, int], alphabet: set[str]) -> list[tuple[str, int]]:
    """Cut every word at characters outside the alphabet; return the parts with their counts in a fixed order."""
    parts: Counter[str] = Counter()
    for word, count in words.items():
        part = ""
        for character in word:
            if character in alphabet:
                part += character
            elif part:
                parts[part] += count
                part = ""
        if part:
            parts[part] += count
    return sorted(parts.items())


def _seed(parts: list[tuple[str, int]], alphabet: set[str], most: int) -> dict[str, int]:
    """Return the substrings that cover most characters, each with its count, and the whole alphabet."""
    counts: Counter[str] = Counter()
    for part, count in parts:
        for start in range(len(part)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(part)) + 1):
                counts[part[start:end]] += count
    candidates = [piece for piece, count in counts.items() if len(piece) > 1 and count > 1]
    candidates.sort(key=lambda piece: (-counts[piece] * len(piece), piece))
    return {piece: counts[piece] for piece in [*sorted(alphabet), *candidates[:most]]}


def _scores(counts: Mapping[str, int], alphabet: set[str]) -> dict[str, float]:
    """Return log-probabilities from counts, best first; a letter that is not used counts as half an occurrence."""
    weights = {piece: max(counts.get(piece, 0), 0.5) for piece in alphabet}
    weights |= {piece: count for piece, count in counts.items() if piece not in alphabet}
    total = math.log(math.fsum(weights.values()))
    ordered = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return {piece: math.log(weight) - total for piece, weight in ordered}


def _recount(parts: list[tuple[str, int]], scores: Mapping[str, float]) -> dict[str, int]:
    """Count the pieces of every word's best segmentation."""
    model = models.Unigram([("<unk>", 0.0), *scores.items()], unk_id=0, byte_fallback=False)
    counts: Counter[str] = Counter()
    for part, count in parts:
        for token in model.tokenize(part):
            counts[token.value] += count
    return {piece: count for piece, count in sorted(counts.items()) if piece in scores}


def _prune(counts: Mapping[str, int], scores: Mapping[str, float], alphabet: set[str], most: int) -> dict[str, int]:
    """Keep the alphabet and the `most` pieces whose removal would cost the text most log-likelihood."""
    losses = [
        (count * (scores[piece] - _without(piece, scores)), piece)
        for piece, count in counts.items()
        if piece not in alphabet
    ]
    losses.sort(key=lambda item: (-item[0], item[1]))
    return {piece: counts.get(piece, 0) for piece in [*sorted(alphabet), *(piece for _, piece in losses[:most])]}


def _without(piece: str, scores: Mapping[str, float]) -> float:
    """Return the score of the best way to spell `piece` from at least two other pieces."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            if end - start == len(piece):
                continue
            score = scores.get(piece[start:end])
            if score is not None and best[start] + score > best[end]:
                best[end] = best[start] + score
    return best[-1]
