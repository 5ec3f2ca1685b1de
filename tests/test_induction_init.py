# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The heads that copy look where they should before any training, and leave the other heads as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mambaformer.trainer.induction_init import initialise_induction

WIDTH, KEYS, HEADS, LAYERS, VOCAB = 256, 64, 4, 3, 300


def new_t5(**changes) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": KEYS,
        "d_ff": 64,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
        "attn_implementation": "eager",
    }
    return T5ForConditionalGeneration(T5Config(**{**config, **changes})).eval()


@pytest.fixture(scope="module")
def started():
    plain = new_t5()
    ready = copy.deepcopy(plain)
    initialise_induction(ready, seed=3)
    return plain, ready


def attended(model: T5ForConditionalGeneration, layer: int, head: int, source: torch.Tensor, said: torch.Tensor):
    """Where this head of the cross-attention looks most, after each token of `said` `(1, T)`."""
    with torch.no_grad():
        output = model(input_ids=source, decoder_input_ids=said, output_attentions=True)
    return output.cross_attentions[layer][0, head].argmax(-1)


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_the_heads_look_at_what_follows_the_last_token(started, layer, head):
    """A rough start: far more often than chance (1 in 40), and for training to refine."""
    plain, ready = started
    torch.manual_seed(1)
    source = torch.randperm(VOCAB - 1)[None, :40] + 1
    follows = torch.arange(1, 40)  # token i was written last: look at i + 1
    hits = (attended(ready, layer, head, source, source[:, :-1]) == follows).float().mean()
    assert hits > 0.2
    assert (attended(plain, layer, head, source, source[:, :-1]) == follows).float().mean() < 0.1


def test_other_heads_and_layers_are_left(started):
    plain, ready = started
    changed = {
        name.split(".layer.")[0]
        for (name, before), after in zip(plain.named_parameters(), ready.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert changed == {f"encoder.block.{n}" for n in range(LAYERS)} | {f"decoder.block.{n}" for n in range(LAYERS)}
    last = slice(3 * KEYS, None)
    for before, after in zip(plain.encoder.block, ready.encoder.block, strict=True):
        for name in ("q", "k", "v"):
            old, new = (getattr(block.layer[0].SelfAttention, name).weight for block in (before, after))
            assert torch.equal(old[last], new[last])


@pytest.mark.parametrize("changes", [{"num_heads": 2}, {"d_model": 128}])
def test_what_is_too_small_is_refused(changes):
    with pytest.raises(ValueError, match="need 3 heads or more and d_model >= 4"):
        initialise_induction(new_t5(**changes))
