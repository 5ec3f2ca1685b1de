# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""How much each token speaks for the domain: the router's domain feature, a vector over the vocabulary.

The scale is that of log-odds between the domain and general text (Monroe et al., 2008, "Fightin' Words", section 3.3),
clipped to [-5, 5] nats and divided by 5: +1 is a token of the domain, 0 says nothing, -1 is a token of elsewhere.
Special tokens and rows beyond the tokenizer are 0. Counting is all that this file does; nothing is learnt here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LARGEST_LOG_ODDS = 5.0  # nats; weights are log-odds over this
TEXTS_AT_ONCE = 256


def domain_weights(tokenizer: PreTrainedTokenizerFast, lexicon: Mapping[str, float], rows: int) -> Tensor:
    """Spread the log-odds of words over the tokens that spell them.

    A word that is one token gives it its value. A piece of longer words gets the mean, over those words, of the
    word's value times the share of its characters that the piece spells: a piece that spells little says little.
    Each word counts as written and with a capital.

    Args:
        tokenizer: the shared tokenizer.
        lexicon: word -> log-odds in nats, positive for the domain.
        rows: length of the result, that of the embedding.

    Returns:
        FloatTensor (rows,), values in [-1, 1].

    Raises:
        ValueError: if a value is not finite, or if the tokenizer's ids do not fit into `rows`.
    """
    _check_rows(tokenizer, rows)
    whole: dict[int, float] = {}
    partial: dict[int, list[float]] = {}
    for word, value in lexicon.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"the lexicon gives {word!r} the value {value}; log-odds must be finite numbers.")
        for form in dict.fromkeys((word, word[:1].upper() + word[1:])):
            ids = tokenizer(form, add_special_tokens=False, truncation=False)["input_ids"]
            lengths = [len(piece.strip("▁Ġ")) for piece in tokenizer.convert_ids_to_tokens(ids)]
            letters = sum(lengths)
            for index, length in zip(ids, lengths, strict=True):
                if length and length == letters:
                    whole[index] = value
                elif length:
                    partial.setdefault(index, []).append(value * length / letters)
    values = {index: sum(found) / len(found) for index, found in partial.items()} | whole
    log_odds = torch.zeros(rows)
    if values:
        log_odds[torch.tensor(list(values))] = torch.tensor(list(values.values()), dtype=torch.float32)
    return _scaled(log_odds, tokenizer)


def domain_log_odds(
    domain_texts: Iterable[str],
    general_texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    rows: int,
    prior: float = 5.0,
) -> Tensor:
    """Measure the log-odds of each token between two corpora.

    Each corpus' rate of a token is shrunk towards the rate of both together by `prior` pseudo-occurrences at that
    rate, so that a token seen twice is not taken for a term of the domain. A token seen in neither is 0.

    Args:
        domain_texts: texts of the domain; read once.
        general_texts: texts to tell them from; read once.
        tokenizer: the shared tokenizer.
        rows: length of the result, that of the embedding.
        prior: strength of the shrinkage, in occurrences; positive.

    Returns:
        FloatTensor (rows,), values in [-1, 1].

    Raises:
        ValueError: if a corpus has no tokens, if `prior` is not positive, or if the tokenizer's ids do not fit.
    """
    _check_rows(tokenizer, rows)
    if not prior > 0:
        raise ValueError(f"prior={prior} must be positive; it counts pseudo-occurrences (5.0 is the default).")
    domain = _count(domain_texts, tokenizer, rows)
    general = _count(general_texts, tokenizer, rows)
    for name, counts in (("domain_texts", domain), ("general_texts", general)):
        if counts.sum() == 0:
            raise ValueError(f"{name} holds no tokens; pass at least one text with words.")
    pooled = (domain + general) / (domain.sum() + general.sum())  # (rows,)
    seen = pooled > 0
    log_odds = torch.zeros(rows, dtype=torch.float64)
    log_odds[seen] = _logit(domain, pooled, prior)[seen] - _logit(general, pooled, prior)[seen]
    return _scaled(log_odds, tokenizer)


def _logit(counts: Tensor, pooled: Tensor, prior: float) -> Tensor:
    """Return the logit of each token's shrunk rate; meaningless where `pooled` is 0."""
    rate = pooled * (counts + prior) / (counts.sum() * pooled + prior)  # (rows,)
    return torch.logit(rate, eps=1e-12)


def _count(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, rows: int) -> Tensor:
    """Return how often each token occurs, special tokens left out, as a float64 tensor (rows,)."""
    counts = torch.zeros(rows, dtype=torch.float64)
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ids = torch.tensor([index for row in encoded for index in row], dtype=torch.long)
        counts += torch.bincount(ids, minlength=rows).double()
    counts[_special_ids(tokenizer)] = 0.0
    return counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, TEXTS_AT_ONCE)):
        yield batch


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return sorted(set(tokenizer.all_special_ids))


def _check_rows(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    needed = max(tokenizer.get_vocab().values()) + 1
    if rows < needed:
        raise ValueError(f"rows={rows} is too small: the tokenizer has ids up to {needed - 1}; use >= {needed} rows.")


def _scaled(log_odds: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Clip, scale to [-1, 1] and silence the special tokens."""
    weights = (log_odds.clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS) / LARGEST_LOG_ODDS).float()
    weights[_special_ids(tokenizer)] = 0.0
    return weights
