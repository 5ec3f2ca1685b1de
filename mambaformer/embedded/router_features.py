# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What the router looks at (paper, routing features a to c; plus its own past).

A feature group is a function from `RouterInputs` to a tensor `(batch, positions, width)` and its width. To add one,
write the function and enter it in `FEATURE_GROUPS`; `MambaFormerConfig.router_features` then names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class RouterInputs:
    """
    All that is known before ET5 is touched, for positions t of a batch; B rows, T positions, R the router's rank.

    Attributes:
        projected: `(B, T, R)`, low-rank projection of EMamba's final hidden state h_t.
        entropy: `(B, T)`, of EMamba's next-token distribution, in nats over log(vocabulary): in [0, 1].
        top_probability: `(B, T)`, of EMamba's likeliest next token.
        embedding_distance: `(B, T)`, one minus the cosine of the current embedding and the mean of its context.
        source_length: `(B,)`, tokens over `max_source_length`.
        position: `(T,)` or `(B, T)`, target positions over `max_target_length`.
        token_domain: `(B, T)`, domain weight of the current token.
        source_domain: `(B,)`, mean domain weight of the source.
        answer_domain: `(B, T)`, running mean of the domain weight over the answer so far.
    """

    projected: torch.Tensor
    entropy: torch.Tensor
    top_probability: torch.Tensor
    embedding_distance: torch.Tensor
    source_length: torch.Tensor
    position: torch.Tensor
    token_domain: torch.Tensor
    source_domain: torch.Tensor
    answer_domain: torch.Tensor


@dataclass(frozen=True)
class FeatureGroup:
    """`width(router_rank)` columns, computed by `compute`; `None` for the past, which the router itself unrolls."""

    width: Callable[[int], int]
    compute: Callable[[RouterInputs], torch.Tensor] | None


def complexity(inputs: RouterInputs) -> torch.Tensor:
    """Contextual complexity (a): `(B, T, R + 3)`."""
    scalars = torch.stack([inputs.entropy, inputs.top_probability, inputs.embedding_distance], dim=-1)  # (B, T, 3)
    return torch.cat([inputs.projected, scalars], dim=-1)  # (B, T, R + 3)


def length(inputs: RouterInputs) -> torch.Tensor:
    """Normalised length (b): `(B, T, 2)`."""
    source = inputs.source_length[:, None].expand_as(inputs.entropy)  # (B, T)
    return torch.stack([source, inputs.position.expand_as(source)], dim=-1)  # (B, T, 2)


def domain(inputs: RouterInputs) -> torch.Tensor:
    """Domain (c): `(B, T, 3)`."""
    source = inputs.source_domain[:, None].expand_as(inputs.entropy)  # (B, T)
    return torch.stack([inputs.token_domain, source, inputs.answer_domain], dim=-1)  # (B, T, 3)


FEATURE_GROUPS: dict[str, FeatureGroup] = {
    "complexity": FeatureGroup(lambda rank: rank + 3, complexity),
    "length": FeatureGroup(lambda rank: 2, length),
    "domain": FeatureGroup(lambda rank: 3, domain),
    "past": FeatureGroup(lambda rank: 2, None),
}


def past_features(previous: torch.Tensor, gap: torch.Tensor, max_target_length: int) -> torch.Tensor:
    """
    The router's own past: the previous choice (0 or 1) and the gap since ET5 last spoke, log-scaled to about [0, 1].

    Args:
        previous, gap: `(...)`, float and integer.

    Returns:
        `(..., 2)` float.
    """
    scaled = torch.log1p(gap.float()) / math.log1p(max_target_length)
    return torch.stack([previous.float(), scaled], dim=-1)


def distribution_scalars(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Entropy over log(vocabulary), in [0, 1], and top-1 probability of next-token logits `(B, T, V)`; both `(B, T)`.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (B, T, V)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1) / math.log(logits.shape[-1])  # (B, T)
    return entropy, p.amax(-1)
