# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""ET5's position bias from distances: transformers' own values, states, gradients and weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_experts import random_batch, tiny_et5
from transformers import MT5Config, MT5ForConditionalGeneration, T5ForConditionalGeneration

from mambaformer.modeling_mambaformer.relative_bias import KINDS, DistanceBiasMT5Attention, use_distance_bias


@pytest.fixture(scope="module")
def pair() -> tuple[T5ForConditionalGeneration, T5ForConditionalGeneration]:
    """transformers' own model, and a copy with our bias; the distances of its buckets are within a few tokens."""
    torch.manual_seed(0)
    plain = tiny_et5().eval()
    ours = copy.deepcopy(plain)
    attentions = sum(type(module) in KINDS for module in plain.modules())
    assert use_distance_bias(ours) == attentions > 0 and use_distance_bias(ours) == 0
    return plain, ours


def biased(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if getattr(module, "has_relative_attention_bias", False)]


@pytest.mark.parametrize(
    ("queries", "keys", "past"), [(1, 1, 0), (5, 5, 0), (300, 300, 0), (1, 9, 8), (4, 12, 8), (7, 3, 0)]
)
def test_values_are_those_of_all_pairs(pair, queries, keys, past):
    for plain, ours in zip(*map(biased, pair), strict=True):
        for seen in (past, torch.tensor(past)):
            found = ours.compute_bias(queries, keys, past_seen_tokens=seen)
            assert torch.equal(found, plain.compute_bias(queries, keys, past_seen_tokens=seen))
            assert found.is_contiguous()  # attention would copy it otherwise, in every layer


@pytest.mark.parametrize("lengths", [(150,), (9, 4)], ids=["one", "padded"])
def test_states_logits_and_gradients(pair, lengths):
    batch = random_batch(lengths)
    labels = torch.randint(3, 90, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    outputs = [model(**batch, labels=labels) for model in pair]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].encoder_last_hidden_state, outputs[1].encoder_last_hidden_state)
    for model, output in zip(pair, outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    for plain, ours in zip(*map(biased, pair), strict=True):
        gradients = [x.relative_attention_bias.weight.grad for x in (plain, ours)]
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(*gradients)


def test_weights_keep_their_names(pair):
    plain, ours = pair
    assert list(plain.state_dict()) == list(ours.state_dict())


def test_mt5_too():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    plain = MT5ForConditionalGeneration(MT5Config(**sizes)).eval()
    ours = copy.deepcopy(plain)
    use_distance_bias(ours)
    assert any(type(module) is DistanceBiasMT5Attention for module in ours.modules())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain.encoder(ids)[0], ours.encoder(ids)[0])
