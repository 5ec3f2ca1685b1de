# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The larger EMamba on which speed is measured: it says what the smaller one says, and is as large as asked."""

from __future__ import annotations

import copy

import pytest
import torch
from mixed_routing import mixed_model
from test_look_ahead import question
from tiny_experts import VOCAB

from mambaformer.benchmarks.enlarged import enlarged
from mambaformer.modeling_mambaformer.look_ahead_heads import add_heads


@pytest.fixture(scope="module")
def models(et5_folder, emamba_folder):
    small = copy.deepcopy(mixed_model(et5_folder, emamba_folder, seed=3))
    add_heads(small, 3, torch.arange(VOCAB), 20)
    with torch.no_grad():
        small.look_ahead_heads.out_proj.weight.normal_()
    small.generation_config.max_new_tokens = 24
    sizes = small.config.emamba
    return small, enlarged(small, 3 * sizes.hidden_size, sizes.num_hidden_layers + 2)


def test_it_is_as_large_as_asked(models):
    small, large = (model.config.emamba for model in models)
    assert large.hidden_size == 3 * small.hidden_size and large.intermediate_size == 3 * small.intermediate_size
    assert len(models[1].emamba.base_model.layers) == large.num_hidden_layers == small.num_hidden_layers + 2
    assert sum(map(torch.numel, models[1].emamba.parameters())) > 3 * sum(
        map(torch.numel, models[0].emamba.parameters())
    )


@pytest.mark.parametrize("routing", ["auto", "emamba", "et5"])
def test_answers_routes_and_margins_are_those_of_the_small_one(models, routing):
    for seed in range(4):
        found, expected = (
            model.generate(**question(seed), routing=routing, return_dict_in_generate=True, output_logits=True)
            for model in reversed(models)
        )
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.route_trace.expert, expected.route_trace.expert)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            found.route_trace.margin, expected.route_trace.margin, atol=1e-4, rtol=1e-4, equal_nan=True
        )


def test_heads_say_the_same(models):
    small, large = models
    width = small.config.emamba.hidden_size
    hidden, ids = torch.randn(5, width), torch.randint(VOCAB, (5, 3))
    wide = torch.nn.functional.pad(hidden, (0, 2 * width))
    expected = small.look_ahead_heads(hidden, small.emamba.get_input_embeddings()(ids))
    found = large.look_ahead_heads(wide, large.emamba.get_input_embeddings()(ids))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(small.look_ahead_heads.tokens, large.look_ahead_heads.tokens)


def test_less_than_there_is_is_refused(models):
    sizes = models[0].config.emamba
    with pytest.raises(ValueError, match="give at least"):
        enlarged(models[0], sizes.hidden_size - 1, sizes.num_hidden_layers)
