# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The domain lexicon: signs, shrinkage, scale, and silence for special tokens."""

from __future__ import annotations

import math

import pytest
import torch

from mambaformer.tokenizer.domain_lexicon import domain_log_odds, domain_weights
from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from mambaformer.trainer.train_tokenizer import train_tokenizer

DENTAL = ["the gums bleed and the teeth ache", "plaque on the teeth and the gums"] * 40
GENERAL = ["the lungs and the heart ache", "blood flows from the heart to the lungs"] * 40
ROWS = 800


@pytest.fixture(scope="module")
def tokenizer() -> MambaFormerTokenizer:
    return MambaFormerTokenizer(tokenizer_object=train_tokenizer(DENTAL + GENERAL, 600))


def value(weights: torch.Tensor, tokenizer: MambaFormerTokenizer, piece: str) -> float:
    index = tokenizer.convert_tokens_to_ids(piece)
    assert index != tokenizer.unk_token_id, piece
    return weights[index].item()


def test_log_odds_tell_the_corpora_apart(tokenizer: MambaFormerTokenizer) -> None:
    weights = domain_log_odds(DENTAL, GENERAL, tokenizer, ROWS)
    assert weights.shape == (ROWS,) and weights.dtype == torch.float32
    assert weights.abs().max() <= 1
    assert value(weights, tokenizer, "▁gums") > 0.3
    assert value(weights, tokenizer, "▁heart") < -0.3
    assert abs(value(weights, tokenizer, "▁the")) < 0.05
    assert torch.all(weights[tokenizer.all_special_ids] == 0)
    assert torch.all(weights[len(tokenizer) :] == 0)
    assert value(weights, tokenizer, "<0x41>") == 0


def test_log_odds_are_antisymmetric(tokenizer: MambaFormerTokenizer) -> None:
    forth = domain_log_odds(DENTAL, GENERAL, tokenizer, ROWS)
    back = domain_log_odds(GENERAL, DENTAL, tokenizer, ROWS)
    torch.testing.assert_close(forth, -back)


def test_a_small_prior_gives_the_plain_log_odds(tokenizer: MambaFormerTokenizer) -> None:
    """Against a hand count: both texts spell "ache" once in two sentences."""
    weights = domain_log_odds(DENTAL, GENERAL, tokenizer, ROWS, prior=1e-9)
    totals = [
        sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) for texts in (DENTAL, GENERAL)
    ]
    index = tokenizer.convert_tokens_to_ids("▁the")
    counts = [
        sum(ids.count(index) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        for texts in (DENTAL, GENERAL)
    ]
    odds = [count / (total - count) for count, total in zip(counts, totals, strict=True)]
    assert value(weights, tokenizer, "▁the") == pytest.approx(math.log(odds[0] / odds[1]) / 5, abs=1e-5)


def test_the_prior_shrinks_rare_tokens(tokenizer: MambaFormerTokenizer) -> None:
    once = [*DENTAL, "heart"]
    strong = domain_log_odds(["heart", *DENTAL[:1]], GENERAL, tokenizer, ROWS, prior=0.01)
    weak = domain_log_odds(["heart", *DENTAL[:1]], GENERAL, tokenizer, ROWS, prior=50.0)
    assert abs(value(weak, tokenizer, "▁teeth")) < 0.2 * abs(value(strong, tokenizer, "▁teeth"))
    assert value(domain_log_odds(once, GENERAL, tokenizer, ROWS), tokenizer, "▁heart") < 0


def test_corpora_may_be_generators(tokenizer: MambaFormerTokenizer) -> None:
    listed = domain_log_odds(DENTAL, GENERAL, tokenizer, ROWS)
    assert torch.equal(domain_log_odds(iter(DENTAL), (text for text in GENERAL), tokenizer, ROWS), listed)


def test_lexicon_spreads_over_pieces(tokenizer: MambaFormerTokenizer) -> None:
    weights = domain_weights(tokenizer, {"gums": 3.0, "heart": -8.0, "gumsx": 4.0}, ROWS)
    assert value(weights, tokenizer, "▁gums") == pytest.approx(0.6)
    assert value(weights, tokenizer, "▁heart") == -1.0
    assert value(weights, tokenizer, "x") == pytest.approx(4.0 / 5 / 5)
    assert torch.all(weights[tokenizer.all_special_ids] == 0)
    assert torch.all(domain_weights(tokenizer, {}, ROWS) == 0)


def test_bad_input_is_named(tokenizer: MambaFormerTokenizer) -> None:
    with pytest.raises(ValueError, match="domain_texts holds no tokens"):
        domain_log_odds([], GENERAL, tokenizer, ROWS)
    with pytest.raises(ValueError, match="general_texts holds no tokens"):
        domain_log_odds(DENTAL, [" "], tokenizer, ROWS)
    with pytest.raises(ValueError, match="prior=0"):
        domain_log_odds(DENTAL, GENERAL, tokenizer, ROWS, prior=0)
    with pytest.raises(ValueError, match="rows=3 is too small"):
        domain_weights(tokenizer, {"gums": 1.0}, 3)
    with pytest.raises(ValueError, match="'gums' the value nan"):
        domain_weights(tokenizer, {"gums": float("nan")}, ROWS)
