# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Tiny random checkpoints whose outputs are far from uniform, so that a wrong state cannot hide below a tolerance."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

VOCAB = 96
END = 1
ET5_KINDS = ("v1.0", "v1.1", "untied")


def tiny_et5(kind: str = "v1.1", seed: int = 0, encoder_layers: int = 2, decoder_layers: int = 3, width: int = 8):
    """A random T5: `v1.0` (relu, scaled tied head), `v1.1` (gated) or `untied` (gated, own head as flan's)."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=width,
        d_ff=48,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        feed_forward_proj="relu" if kind == "v1.0" else "gated-gelu",
        tie_word_embeddings=kind == "v1.0",
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
        model.shared.weight.mul_(0.05)  # a tied head would else answer each token with itself
        model.decoder.final_layer_norm.weight.mul_(4 if kind != "v1.0" else 4 * 32**0.5)
        if kind == "untied":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32) / 4)
        model.lm_head.weight[END] *= 0.1  # the end is hardly ever the likeliest
    return model


def tiny_emamba(seed: int = 0, layers: int = 2, vocab: int = VOCAB, tied: bool = True):
    """A random Mamba with amplified dt, A and x_proj, whose state matters; its head tied to the embedding or not."""
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=vocab,
        hidden_size=24,
        state_size=8,
        num_hidden_layers=layers,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.x_proj.weight.mul_(4)
            block.mixer.dt_proj.bias.add_(2)
            block.mixer.A_log.sub_(1)
            block.mixer.out_proj.weight.mul_(4)
        model.backbone.embeddings.weight.mul_(0.2)  # a tied head would else answer each token with itself
        model.backbone.norm_f.weight.mul_(25)
        if not tied:
            model.lm_head.weight.normal_(std=0.02)
        model.lm_head.weight[END] *= 0.1  # the end is hardly ever the likeliest
    return model


def save_tiny_et5(folder: Path, kind: str) -> Path:
    """Save `tiny_et5(kind)` as a checkpoint."""
    tiny_et5(kind).save_pretrained(folder)
    return folder


def save_tiny_emamba(folder: Path) -> Path:
    """Save `tiny_emamba()` as a checkpoint."""
    tiny_emamba().save_pretrained(folder)
    return folder


def random_batch(lengths: list[int], seed: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Random sources of these lengths, ending in eos (1) and padded with 0 on `side`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        tokens[-1] = 1
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}
