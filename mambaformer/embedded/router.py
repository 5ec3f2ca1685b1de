# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The token-level router and the sequence gate (paper, token-level guided routing).

The router gives each decoder position a margin m_t = z_ET5 - z_EMamba before ET5 is touched. With two experts every
balancing rule is a threshold on this margin, so choosing is `margin > threshold`, within the request's cap.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from .configuration_mambaformer import MambaFormerConfig
from .outputs_mambaformer import EMAMBA, ENDED, ET5
from .router_features import FEATURE_GROUPS, RouterInputs, past_features


@dataclass
class RouterState:
    """
    What the router carries from one decoder position to the next, one row each; `(B,)` unless said.

    `previous`: the last choice (0 or 1). `since`: positions since ET5 last spoke. `spent`: tokens ET5 has written.
    `domain_sum`: sum of the answer's domain weights. `embedding_sum` `(B, D)` and `seen`: the context's embeddings.
    `position`: decoder positions done, the same for all rows (an integer).
    """

    previous: torch.Tensor
    since: torch.Tensor
    spent: torch.Tensor
    domain_sum: torch.Tensor
    embedding_sum: torch.Tensor
    seen: torch.Tensor
    position: int = 0

    def select(self, rows: torch.Tensor) -> RouterState:
        """The state of `rows`, which may repeat or reorder."""
        chosen = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "position"}
        return replace(self, **chosen)


class TokenRouter(nn.Module):
    """
    A small MLP from the active feature groups to one margin a position.

    Args:
        config: reads `router_features`, `router_rank`, `router_hidden_size` and `max_target_length`.

    Raises:
        ValueError: for a feature group that does not exist.
    """

    def __init__(self, config: MambaFormerConfig):
        super().__init__()
        unknown = [name for name in config.router_features if name not in FEATURE_GROUPS]
        if unknown:
            raise ValueError(f"router_features {unknown} do not exist: choose from {list(FEATURE_GROUPS)}.")
        self.groups = [name for name in config.router_features if FEATURE_GROUPS[name].compute is not None]
        self.uses_past = "past" in config.router_features
        self.max_target_length = config.max_target_length
        width = sum(FEATURE_GROUPS[name].width(config.router_rank) for name in self.groups)
        self.hidden_proj = nn.Linear(config.emamba.hidden_size, config.router_rank, bias=False)
        self.feature_proj = nn.Linear(width, config.router_hidden_size)
        self.past_proj = nn.Linear(
            FEATURE_GROUPS["past"].width(config.router_rank), config.router_hidden_size, bias=False
        )
        self.act = nn.GELU()
        self.score = nn.Linear(config.router_hidden_size, 1)
        self.register_buffer("domain_weight", torch.zeros(config.vocab_size), persistent=True)

    def encode(self, inputs: RouterInputs) -> torch.Tensor:
        """First layer of all that does not depend on past choices: `(B, T, H)`."""
        if not self.groups:
            return self.feature_proj.bias.expand(*inputs.entropy.shape, -1)
        features = torch.cat([FEATURE_GROUPS[name].compute(inputs) for name in self.groups], dim=-1)  # (B, T, F)
        return self.feature_proj(features)  # (B, T, H)

    def margin(self, encoded: torch.Tensor, previous: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Margins `(...)` from `encoded` `(..., H)`, the previous choices and the gaps, both `(...)`."""
        if self.uses_past:
            past = past_features(previous, gap, self.max_target_length).to(encoded.dtype)
            encoded = encoded + self.past_proj(past)
        return self.score(self.act(encoded)).squeeze(-1)

    @torch.no_grad()
    def choose(
        self,
        encoded: torch.Tensor,
        state: RouterState,
        threshold: float,
        cap: int | None,
        allowed: torch.Tensor,
        ended: torch.Tensor,
        first_new: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RouterState]:
        """
        Unroll the choice over the positions of `encoded` `(B, T, H)`: each sees the choices before it.

        Args:
            threshold: route to ET5 where the margin exceeds it.
            cap: the most tokens that ET5 may write in this request, `None` for no cap.
            allowed: `(B,)` bool, the sequence gate.
            ended: `(B, T)` bool, positions after the end of an answer.
            first_new: positions before this one predict given tokens, which do not count against `cap`.

        Returns:
            experts `(B, T)` long (0, 1, or -1 where ended), gaps `(B, T)` long, margins `(B, T)`, and the state after
            the last position.
        """
        previous, since, spent = state.previous, state.since, state.spent
        experts, gaps, margins = [], [], []
        for t in range(encoded.shape[1]):
            gap = since + 1  # (B,)
            margin = self.margin(encoded[:, t], previous, gap)  # (B,)
            routed = (margin > threshold) & allowed & ~ended[:, t]  # (B,)
            if cap is not None:
                routed &= spent < cap
            previous = routed.to(previous.dtype)
            since = torch.where(routed, torch.zeros_like(since), gap)
            if state.position + t >= first_new:
                spent = spent + routed
            experts.append(torch.where(ended[:, t], ENDED, torch.where(routed, ET5, EMAMBA)))
            gaps.append(gap)
            margins.append(margin)
        state = replace(state, previous=previous, since=since, spent=spent)
        return torch.stack(experts, dim=1), torch.stack(gaps, dim=1), torch.stack(margins, dim=1), state


def past_of(experts: torch.Tensor, state: RouterState) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Previous choices and gaps at each of the positions of `experts` `(B, T)`, both `(B, T)`, given `state` before them.
    """
    routed = experts == ET5
    previous = torch.cat([state.previous[:, None], routed[:, :-1].to(state.previous.dtype)], dim=1)  # (B, T)
    position = torch.arange(experts.shape[1], device=experts.device).expand_as(experts)
    last = torch.where(routed, position, -1 - state.since[:, None]).cummax(dim=1).values  # (B, T), last ET5 position
    before = torch.cat([(-1 - state.since)[:, None], last[:, :-1]], dim=1)  # (B, T), last ET5 position before t
    return previous, position - before


class SequenceGate(nn.Module):
    """
    Decides from the source alone whether this request may ask ET5 at all.

    `forward(hidden (B, D), source_length (B,), source_domain (B,)) -> logit (B,)`; `hidden` is EMamba's final hidden
    state at the last source token, the other two are the router's scalars.
    """

    def __init__(self, config: MambaFormerConfig):
        super().__init__()
        self.hidden_proj = nn.Linear(config.emamba.hidden_size, config.router_rank, bias=False)
        self.feature_proj = nn.Linear(config.router_rank + 2, config.router_hidden_size)
        self.act = nn.GELU()
        self.score = nn.Linear(config.router_hidden_size, 1)

    def forward(self, hidden: torch.Tensor, source_length: torch.Tensor, source_domain: torch.Tensor) -> torch.Tensor:
        scalars = torch.stack([source_length, source_domain], dim=-1)  # (B, 2)
        features = torch.cat([self.hidden_proj(hidden), scalars], dim=-1)  # (B, R + 2)
        return self.score(self.act(self.feature_proj(features))).squeeze(-1)  # (B,)
