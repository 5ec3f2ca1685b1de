# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
A small network that proposes tokens from EMamba's last hidden state and what was said since.

It is one recurrent step, taken once for each token to propose, each time with the token before, as Hydra (arXiv
2402.05109) and EAGLE (arXiv 2401.15077) have it. Look-ahead decoding verifies what it proposes, so that it decides how
fast an answer comes and never what it says. It proposes only tokens that answers use often (as FR-Spec, arXiv
2502.14856, does), whose rows it has for itself: the vocabulary's own head would cost as much as a part of the step
that it is to save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draft_weights import Drafter
from .rounded_weight import RoundedWeight

if TYPE_CHECKING:
    from .configuration_mambaformer import MambaFormerConfig


class LookAheadHeads(nn.Module):
    """
    With s_0 EMamba's final hidden state and e_i the embedding of the i-th token after it, for i from 1 on:

        s_i = s_{i-1} + out_proj(silu(in_proj [s_{i-1}, sqrt(D) e_i]))      logits_i = rows s_i

    are those of the token after the i-th.

    Args:
        heads (`int`): H, the most tokens to propose at a time. hidden_size (`int`): D, EMamba's.
        candidates (`int`): R, how many tokens may be proposed.

    Attributes:
        tokens: `(R,)` long, the ids of the rows. drafter: runs the network in compiled code.
    """

    def __init__(self, heads: int, hidden_size: int, candidates: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rows = nn.Linear(hidden_size, candidates, bias=False)
        self.register_buffer("tokens", torch.arange(candidates))
        self.drafter = Drafter()

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Logits `(N, T, R)` by final hidden states `(N, D)` and embeddings `(N, T, D)` of the tokens after them."""
        dtype = self.rows.weight.dtype
        state, embeddings = hidden.to(dtype), embeddings.to(dtype) * hidden.shape[-1] ** 0.5
        logits = []
        for token in embeddings.unbind(1):
            state = state + self.out_proj(F.silu(self.in_proj(torch.cat([state, token], -1))))  # (N, D)
            logits.append(self.rows(state))
        return torch.stack(logits, 1)


def make_heads(config: MambaFormerConfig) -> LookAheadHeads | None:
    """The heads that a configuration asks for, or `None`."""
    if not config.look_ahead_heads:
        return None
    return LookAheadHeads(config.look_ahead_heads, config.emamba.hidden_size, config.look_ahead_candidates)


@torch.no_grad()
def add_heads(model: nn.Module, heads: int, counts: Tensor, candidates: int) -> LookAheadHeads:
    """
    Give `model` untrained heads, which at first propose what EMamba's own head does.

    Args:
        counts: `(V,)`, how often each token is used; the `candidates` most frequent may be proposed.
    """
    head = model.emamba.get_output_embeddings()
    weight = head.dequantize() if isinstance(head, RoundedWeight) else head.weight
    config = model.config
    config.look_ahead_heads, config.look_ahead_candidates = heads, min(candidates, len(counts))
    model.look_ahead_heads = made = make_heads(config).to(weight.device, weight.dtype).train(model.training)
    made.tokens.copy_(counts.topk(config.look_ahead_candidates).indices)
    made.rows.weight.copy_(weight[made.tokens])
    nn.init.zeros_(made.out_proj.weight)
    return made
