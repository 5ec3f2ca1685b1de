# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
T5's relative position bias from the distances that occur, instead of from all pairs of positions.

The bias of two positions depends on their distance alone (Raffel et al. 2020, arXiv 1910.10683, section 2.1). So the
network's table is asked once for each distance, and the pairs' matrix is written once, in the order in which attention
reads it; transformers asks for each pair, and has every layer put the result in order again, which takes a long source
longer than its attention does. The values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention


class DistanceBias:
    """What `T5Attention` and `MT5Attention` do differently here."""

    relative_attention_bias: nn.Embedding
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    is_decoder: bool
    _relative_position_bucket: Callable[..., Tensor]

    def compute_bias(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Tensor:
        """Bias of queries at `past_seen_tokens` and after it to keys from 0 on: `(1, heads, queries, keys)`."""
        device = self.relative_attention_bias.weight.device if device is None else device
        distances = torch.arange(1 - query_length, key_length, device=device) - past_seen_tokens  # (Q + K - 1,)
        buckets = self._relative_position_bucket(
            distances,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        values = self.relative_attention_bias(buckets).T.contiguous()  # (heads, Q + K - 1)
        # The last query's distances come first; those of the one before it begin one later.
        return values.unfold(1, key_length, 1).flip(1).contiguous().unsqueeze(0)


class DistanceBiasT5Attention(DistanceBias, T5Attention):
    """`T5Attention` with this bias."""


class DistanceBiasMT5Attention(DistanceBias, MT5Attention):
    """`MT5Attention` with this bias."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    T5Attention: DistanceBiasT5Attention,
    MT5Attention: DistanceBiasMT5Attention,
}


def use_distance_bias(et5: nn.Module) -> int:
    """
    Let every attention inside `et5` make its bias in this way, in place; weights and hooks are untouched.

    Returns:
        how many were adapted by this call.
    """
    adapted = [module for module in et5.modules() if type(module) in KINDS]
    for module in adapted:
        module.__class__ = KINDS[type(module)]
    return len(adapted)
