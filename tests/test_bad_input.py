# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Bad input ends in a `ValueError` that names the value and the remedy; unusual input just works."""

from __future__ import annotations

import pytest
import torch
from mixed_routing import mixed_model, random_targets
from tiny_experts import VOCAB, random_batch
from transformers import DynamicCache

LENGTHS = [7, 3, 11, 5]


@pytest.fixture(scope="module")
def mixed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return random_batch(LENGTHS, seed=1)


def called(model, how: str, source: dict, **options):
    """Both ways into the model."""
    if how == "generate":
        return model.generate(**source, max_new_tokens=3, **options)
    return model(**source, decoder_input_ids=random_targets(len(source["input_ids"]), 3), **options)


BAD_SOURCES = {
    "empty": (lambda b: {"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\): give source tokens"),
    "flat": (lambda b: {"input_ids": b["input_ids"][0]}, r"shape \(11,\): give source tokens"),
    "all padding": (
        lambda b: {**b, "attention_mask": b["attention_mask"] * torch.tensor([1, 1, 0, 1])[:, None]},
        "all zeros: give every row at least one",
    ),
    "too large": (
        lambda b: {**b, "input_ids": b["input_ids"] + VOCAB},
        f"outside the vocabulary of {VOCAB}: tokenize",
    ),
    "negative": (lambda b: {**b, "input_ids": b["input_ids"] - 5}, "the id -5, outside the vocabulary"),
    "embeddings": (lambda b: {**b, "input_ids": torch.randn(4, 11)}, "torch.float32: give token ids"),
    "short mask": (
        lambda b: {**b, "attention_mask": b["attention_mask"][:, 1:]},
        r"\(4, 10\) but input_ids \(4, 11\)",
    ),
    "low mask": (
        lambda b: {**b, "attention_mask": b["attention_mask"][:2]},
        r"\(2, 11\) but input_ids \(4, 11\)",
    ),
}


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize(("spoil", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_sources(mixed, batch, how, spoil, message):
    with pytest.raises(ValueError, match=message):
        called(mixed, how, spoil(batch))


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "both"}, r"routing is 'both': choose one of \['auto'"),
        ({"expert_budget": 1.01}, "expert_budget is 1.01: give a share of tokens between 0 and 1"),
        ({"expert_budget": -0.5}, "expert_budget is -0.5: give"),
        ({"expert_budget": float("nan")}, "expert_budget is nan: give"),
        ({"expert_budget": "half"}, "expert_budget is 'half': give"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_arguments(mixed, batch, how, options, message):
    with pytest.raises(ValueError, match=message):
        called(mixed, how, batch, **options)


def test_generate_knows_its_arguments(mixed, batch):
    """A misspelt argument is not ignored."""
    with pytest.raises(ValueError, match="exprt_budget"):
        called(mixed, "generate", batch, exprt_budget=0.1)
    states = mixed.et5.encoder(**batch)
    with pytest.raises(ValueError, match="encoder_outputs were given to generate: give input_ids"):
        called(mixed, "generate", batch, encoder_outputs=states)


BAD_TARGETS = {
    "nothing": ({}, "Neither decoder_input_ids nor labels"),
    "no tokens": ({"decoder_input_ids": torch.zeros(4, 0, dtype=torch.long)}, r"\(4, 0\): give at least one token"),
    "other rows": ({"decoder_input_ids": torch.zeros(3, 2, dtype=torch.long)}, "each of the 4 sources"),
    "too large": ({"decoder_input_ids": torch.full((4, 2), VOCAB)}, f"decoder_input_ids hold the id {VOCAB}, outside"),
    "label too large": ({"labels": torch.full((4, 2), VOCAB)}, f"labels hold the id {VOCAB}, outside"),
    "label negative": ({"labels": torch.full((4, 2), -7)}, "labels hold the id -7, outside"),
    "other shape": (
        {"labels": torch.ones(4, 3, dtype=torch.long), "decoder_input_ids": torch.zeros(4, 2, dtype=torch.long)},
        r"labels have shape \(4, 3\) but decoder_input_ids \(4, 2\)",
    ),
    "cached experts": (
        {"decoder_input_ids": random_targets(4, 3), "output_experts": True, "use_cache": True},
        "pass use_cache=False",
    ),
    "cached padding": (
        {
            "decoder_input_ids": random_targets(4, 3),
            "decoder_attention_mask": torch.tensor([[1, 1, 0]] * 4),
            "use_cache": True,
        },
        "call with use_cache=False",
    ),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("options", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
def test_targets(mixed, batch, options, message, use_cache):
    with pytest.raises(ValueError, match=message):
        mixed(**batch, **{"use_cache": use_cache, **options})


def test_decoder_prompt_of_generate(mixed, batch):
    with pytest.raises(ValueError, match="decoder_input_ids hold the id 500, outside"):
        mixed.generate(**batch, decoder_input_ids=torch.tensor([[0, 500]] * 4), max_new_tokens=3)


@pytest.mark.parametrize(("routing", "part"), [("et5", "et5"), ("emamba", "emamba"), ("auto", "emamba")])
def test_weights_spoilt_in_memory(et5_folder, emamba_folder, batch, routing, part):
    """A model whose weights went wrong after loading says so at its first token, and does not answer nonsense."""
    model = mixed_model(et5_folder, emamba_folder)
    getattr(model, part).get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="first logits are not finite in torch.float32: the weights hold NaN"):
        model.generate(**batch, routing=routing, max_new_tokens=3)


@pytest.mark.parametrize("routing", ["auto", "et5", "emamba", "soft"])
def test_longer_than_the_configured_maximum(mixed, routing):
    """Lengths in the configuration normalise features; they cut nothing."""
    mixed.config.max_source_length, mixed.config.max_target_length = 8, 4
    try:
        source = random_batch([40, 25], seed=3)
        options = {"max_new_tokens": 9, "eos_token_id": None, "routing": routing}
        answers = mixed.generate(**source, **options)
        assert answers.shape == (2, 10)
        shorter = {name: value[:, :24] for name, value in source.items()}
        assert not torch.equal(mixed.generate(**shorter, **options), answers)
    finally:
        mixed.config.max_source_length, mixed.config.max_target_length = 512, 128


@torch.no_grad()
def test_unusual_but_right(mixed, batch):
    """One token, other integer and mask types, and a mask with holes are all sources."""
    expected = called(mixed, "generate", batch)
    for mask_type in (torch.bool, torch.float32, torch.int32):
        retyped = {**batch, "attention_mask": batch["attention_mask"].to(mask_type)}
        assert torch.equal(called(mixed, "generate", retyped), expected)
    assert torch.equal(called(mixed, "generate", {**batch, "input_ids": batch["input_ids"].int()}), expected)
    one = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    assert called(mixed, "generate", one).shape[0] == 1
    holes = {name: value[2:3].clone() for name, value in batch.items()}
    holes["attention_mask"][0, 4] = 0
    without = {name: torch.cat([value[2:3, :4], value[2:3, 5:]], dim=1) for name, value in batch.items()}
    ids = random_targets(1, 4)
    torch.testing.assert_close(
        mixed(**holes, decoder_input_ids=ids, routing="emamba", use_cache=False).logits,
        mixed(**without, decoder_input_ids=ids, routing="emamba", use_cache=False).logits,
        atol=1e-5,
        rtol=0,
    )
