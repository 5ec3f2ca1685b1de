# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The three mergers against their formulas, alone and inside the model."""

from __future__ import annotations

import pytest
import torch
from mixed_routing import ET5, mixed_model, random_targets
from tiny_experts import random_batch

from mambaformer.configuration.configuration_mambaformer import MERGERS
from mambaformer.modeling_mambaformer.merger import MERGER_FUNCTIONS, merge


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(3, 5, 17, generator=generator) * 4 for _ in range(2))


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(-1)


def test_every_merger_is_registered():
    assert tuple(MERGER_FUNCTIONS) == MERGERS


def test_select_is_et5_untouched(logits):
    emamba, et5 = logits
    assert merge("select", emamba, et5, torch.zeros(3, 5), 0.3) is et5


@pytest.mark.parametrize("margin", [-3.0, -0.5, 0.0, 2.0])
def test_mix_is_the_gated_mixture(logits, margin):
    emamba, et5 = logits
    phi = torch.sigmoid(torch.tensor(margin, dtype=torch.double))
    expected = phi * probabilities(et5) + (1 - phi) * probabilities(emamba)
    mixed = merge("mix", emamba, et5, torch.full((3, 5), margin), 0.3)
    torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(3, 5))


def test_limits_of_the_mixture(logits):
    emamba, et5 = logits
    for margin, expert in ((200.0, et5), (-200.0, emamba)):
        mixed = merge("mix", emamba, et5, torch.full((3, 5), margin), 0.3)
        assert mixed.isfinite().all()
        torch.testing.assert_close(mixed, expert.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kappa", [0.25, 1.0, 2.0])
def test_complement_is_the_weighted_product(logits, kappa):
    emamba, et5 = logits
    product = probabilities(et5) * probabilities(emamba) ** kappa
    merged = merge("complement", emamba, et5, torch.zeros(3, 5), kappa)
    torch.testing.assert_close(probabilities(merged), product / product.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)


def test_complement_without_weight_is_select(logits):
    emamba, et5 = logits
    merged = merge("complement", emamba, et5, torch.zeros(3, 5), 0.0)
    torch.testing.assert_close(merged, et5.log_softmax(-1))


@pytest.mark.parametrize("name", ["mix", "complement"])
def test_half_precision_is_merged_in_single(logits, name):
    emamba, et5 = (x.bfloat16() for x in logits)
    margin = torch.tensor(0.7).bfloat16().expand(3, 5)
    merged = merge(name, emamba, et5, margin, 0.25)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, merge(name, emamba.float(), et5.float(), margin.float(), 0.25))


@torch.no_grad()
@pytest.mark.parametrize("name", MERGERS)
def test_inside_the_model(et5_folder, emamba_folder, name):
    """Routed positions hold the merged logits, all others EMamba's own; with and without a cache."""
    model = mixed_model(et5_folder, emamba_folder, merger=name, complement_weight=0.6)
    batch, ids = random_batch([7, 3, 11, 5], seed=1), random_targets(4, 8)
    output = model(**batch, decoder_input_ids=ids, use_cache=False)
    routed = output.route_trace.expert == ET5
    assert routed.any() and not routed.all()
    emamba = model(**batch, decoder_input_ids=ids, use_cache=False, routing="emamba").logits
    et5 = model(**batch, decoder_input_ids=ids, use_cache=False, routing="et5").logits
    expected = merge(name, emamba, et5, output.margin, 0.6)
    torch.testing.assert_close(output.logits, torch.where(routed[..., None], expected, emamba), atol=1e-4, rtol=0)
    cached = model(**batch, decoder_input_ids=ids, use_cache=True)
    torch.testing.assert_close(cached.logits, output.logits, atol=1e-4, rtol=0)
    answers = [model.generate(**batch, max_new_tokens=8, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*answers)
