# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Small heads that propose, from EMamba's last hidden state, the tokens after the next one (Medusa, arXiv 2401.10774).

Look-ahead decoding verifies what they propose, so that they decide how fast an answer comes and never what it says.
They propose only tokens that answers use often (as FR-Spec, arXiv 2502.14856, does), whose rows they have for
themselves: the vocabulary's own head would cost as much as a part of the step that they are to save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rounded_weight import RoundedWeight

if TYPE_CHECKING:
    from .configuration_mambaformer import MambaFormerConfig


class LookAheadHeads(nn.Module):
    """
    Head i of H proposes the token i + 1 after the one that EMamba's own head gives.

    Args:
        heads (`int`): H. hidden_size (`int`): D, EMamba's. candidates (`int`): R, how many tokens they may propose.

    Attributes:
        proj: `(H, D, D)`, zero at first. rows: `(R, D)`. tokens: `(R,)` long, the ids of the rows.
    """

    def __init__(self, heads: int, hidden_size: int, candidates: int):
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(heads, hidden_size, hidden_size))
        self.rows = nn.Parameter(torch.zeros(candidates, hidden_size))
        self.register_buffer("tokens", torch.arange(candidates))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `(N, H, R)` of final hidden states `(N, D)`."""
        hidden = hidden.to(self.rows.dtype)
        changed = torch.einsum("hij,nj->nhi", self.proj, hidden)  # (N, H, D)
        return (hidden[:, None] + F.silu(changed)) @ self.rows.T

    @torch.no_grad()
    def propose(self, hidden: Tensor) -> list[int]:
        """H token ids, from the final hidden state `(D,)` whose next token is known."""
        return self.tokens[self(hidden[None])[0].argmax(-1)].tolist()


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
    model.look_ahead_heads = made = make_heads(config).to(weight.device, weight.dtype)
    made.tokens.copy_(counts.topk(config.look_ahead_candidates).indices)
    made.rows.copy_(weight[made.tokens])
    return made
