# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba as a stream: `[source] [decoder_start] [target ...]` read as one causal sequence.

Its hidden state at decoder position t predicts the token that ET5's decoder predicts at t. Sources are left-padded and
masked, so that padding never reaches the state.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from .sources import Sources

STEPWISE_FAMILIES = ("falcon_mamba",)
"""Families whose transformers code restarts its state when several tokens follow a cached state: fed one by one."""


def read_together(
    emamba: PreTrainedModel, sources: Sources, decoder_ids: torch.Tensor, decoder_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One differentiable pass over source and target.

    Args:
        decoder_ids: `(B, T)` long. decoder_mask: `(B, T)`, zeros on padding, or `None`.

    Returns:
        final hidden states at the decoder positions `(B, T, D)`, and at the last source token `(B, D)`.
    """
    ids = torch.cat([sources.left_ids, decoder_ids], dim=1)  # (B, S + T)
    mask = None
    if sources.padded() or decoder_mask is not None:
        tail = torch.ones_like(decoder_ids) if decoder_mask is None else decoder_mask.to(sources.left_mask.dtype)
        mask = torch.cat([sources.left_mask, tail], dim=1)  # (B, S + T)
    hidden = emamba.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, S + T, D)
    start = sources.left_ids.shape[1]
    return hidden[:, start:], hidden[:, start - 1]


def read_source(emamba: PreTrainedModel, sources: Sources) -> tuple[DynamicCache, torch.Tensor]:
    """Read sources into a fresh state; returns it and the final hidden state at the last source token, `(B, D)`."""
    mask = sources.left_mask if sources.padded() else None
    cache = DynamicCache(config=emamba.config)
    output = emamba.base_model(sources.left_ids, attention_mask=mask, cache_params=cache, use_cache=True)
    return cache, output.last_hidden_state[:, -1]


def read_on(emamba: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    """Read `ids` `(B, T)` on from the state in `cache`, which is updated; returns hidden states `(B, T, D)`."""
    chunks = ids.split(1, dim=1) if emamba.config.model_type in STEPWISE_FAMILIES else (ids,)
    hidden = [emamba.base_model(chunk, cache_params=cache, use_cache=True).last_hidden_state for chunk in chunks]
    return torch.cat(hidden, dim=1)  # (B, T, D)


def head_logits(emamba: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """EMamba's next-token logits `(B, T, V)` in float32, from hidden states `(B, T, D)`."""
    head = emamba.get_output_embeddings()
    return head(hidden.to(head.weight.dtype)).float()
