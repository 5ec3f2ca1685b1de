# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""One cache for `generate`: both experts' states, the router's state, and the record of what was run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .configuration_mambaformer import ROUTING_MODES, MambaFormerConfig, is_number
from .lazy_et5 import LazyET5State
from .outputs_mambaformer import ENDED, RouteTrace
from .router import RouterState
from .sources import Sources


@dataclass
class RoutingRequest:
    """
    How one request is routed.

    Attributes:
        routing: `auto`, `et5`, `emamba` or `soft`.
        threshold: margin above which a token is routed. gate_threshold: `None` for a gate that is always open.
        cap: the most tokens that ET5 may write, or `None`.
        first_new: the first decoder position whose token is the model's own and counts against `cap`; those before it
            predict tokens that the caller gave.
    """

    routing: str
    threshold: float
    gate_threshold: float | None
    cap: int | None
    first_new: int = 0

    @classmethod
    def build(
        cls,
        config: MambaFormerConfig,
        routing: str | None = None,
        expert_budget: float | None = None,
        max_new_tokens: int | None = None,
        first_new: int = 0,
    ) -> RoutingRequest:
        """
        Settle a call's routing from its arguments and the configuration.

        Args:
            expert_budget: largest share of the tokens that ET5 may write, default `config.expert_budget`. It moves the
                threshold along the calibrated table and caps ET5 at `floor(expert_budget * max_new_tokens)` tokens.
            max_new_tokens: the request's limit; `None` (plain forward calls) sets no cap, but for a budget of 0, which
                never asks ET5.

        Raises:
            ValueError: for an unknown `routing`, or a budget outside [0, 1].
        """
        routing = config.routing if routing is None else routing
        budget = config.expert_budget if expert_budget is None else expert_budget
        if routing not in ROUTING_MODES:
            raise ValueError(f"routing is {routing!r}: choose one of {list(ROUTING_MODES)}.")
        if not (is_number(budget) and 0 <= budget <= 1):
            raise ValueError(f"expert_budget is {budget!r}: give a share of tokens between 0 and 1.")
        threshold = config.router_threshold if expert_budget is None else config.threshold_for(budget)
        if budget == 0:
            cap = 0
        elif budget == 1 or max_new_tokens is None:
            cap = None
        else:  # the small constant keeps 0.29 * 100 from losing a token to binary rounding
            cap = int(budget * max_new_tokens + 1e-9)
        return cls(routing, threshold, config.gate_threshold, cap, first_new)

    def threshold_at(self, position: int) -> float:
        """The margin above which the token after decoder position `position` is routed."""
        return self.threshold

    def allows(self, gate_logit: torch.Tensor) -> torch.Tensor:
        """Which rows may ask ET5 at all, `(B,)` bool, by the sequence gate's logits `(B,)`."""
        if self.gate_threshold is None:
            return torch.ones_like(gate_logit, dtype=torch.bool)
        return gate_logit > self.gate_threshold


class MambaFormerCache:
    """
    State of a batch between decoder positions; created by the model, handed back as `past_key_values`.

    B0 sources give B rows, `expand` each (beams or returned sequences). `reorder_cache` follows beam search.

    Args:
        sources: the B0 source texts.
        request: how to route.
        expand: rows a source.
        beams: rows that compete for one answer; their ET5 costs are counted together.
        keep_states: `False` recomputes from the first position at each call (`use_cache=False`), and keeps the record.
    """

    is_compileable = False
    is_croppable = False
    STEP_FIELDS = ("expert", "margin", "gap", "log_p_emamba", "log_p_et5")

    def __init__(
        self, sources: Sources, request: RoutingRequest, expand: int = 1, beams: int = 1, keep_states: bool = True
    ):
        count = sources.input_ids.shape[0]
        device = sources.input_ids.device
        self.sources = sources
        self.request = request
        self.keep_states = keep_states
        self.prompt_length = request.first_new + 1  # decoder tokens that were given, not generated
        self.row_group = torch.arange(count * expand, device=device) // beams  # (B,), rows that are counted together
        self.et5 = LazyET5State(sources, torch.arange(count, device=device).repeat_interleave(expand))
        self.emamba: DynamicCache | None = None
        self.router: RouterState | None = None
        self.look_ahead: Any = None  # a `LookAhead`, where `generate` was asked for it
        self.gate_logit: torch.Tensor | None = None  # (B0,)
        self.source_scalars: tuple[torch.Tensor, torch.Tensor] | None = None  # (B0,), (B0,)
        self.decoder_ids = sources.input_ids.new_zeros(count * expand, 0)  # (B, t)
        self.ends_at = torch.full_like(self.row_source, torch.iinfo(torch.long).max)  # (B,), tokens of ended rows
        self.group_of: list[int] = self.row_group.tolist()
        self.passes, self.tokens, self.encodings = ([0] * (self.group_of[-1] + 1) for _ in range(3))  # of each group
        self.steps: list[dict[str, torch.Tensor]] = []  # (B, n) each, of generated positions, rows as they stood then

    @property
    def row_source(self) -> torch.Tensor:
        """The source of each row, `(B,)` long."""
        return self.et5.row_source

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Decoder positions seen."""
        return self.decoder_ids.shape[1]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows `beam_idx` `(B,)`, as beam search chose them."""
        beam_idx = beam_idx.to(self.decoder_ids.device)
        self.decoder_ids = self.decoder_ids[beam_idx]
        self.ends_at = self.ends_at[beam_idx]
        self.et5.reorder(beam_idx)
        if self.emamba is not None:
            self.emamba.reorder_cache(beam_idx)
        if self.router is not None:
            self.router = self.router.select(beam_idx)

    def rewind(self) -> None:
        """Forget all states but the encoder's; the record stays."""
        self.emamba = self.router = None
        self.decoder_ids = self.decoder_ids[:, :0]
        self.et5.rewind()

    def finish(self, done: torch.Tensor, length: int) -> None:
        """Note that the rows `done` `(B,)` have ended, if they had not, with their `length`-th decoder token."""
        self.ends_at = torch.where(done & (self.ends_at > length), length, self.ends_at)

    def ended(self, new_ids: torch.Tensor) -> torch.Tensor:
        """Which of the new positions come after the end of their answer, `(B, T)` bool."""
        seen = self.get_seq_length()
        tokens = torch.arange(seen + 1, seen + 1 + new_ids.shape[1], device=new_ids.device)  # (T,), known at each
        return tokens >= self.ends_at[:, None]

    def row_scalars(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The sources' router scalars, per row."""
        if self.source_scalars is None:
            return None
        return tuple(scalar[self.row_source] for scalar in self.source_scalars)

    def counts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Passes, positions and encoder runs so far, of the group each row belongs to, three times `(B,)`."""
        return self._counts_of(self.row_group)

    def _counts_of(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Passes, positions and encoder runs so far of `groups` `(n,)`."""
        counts = torch.tensor([self.passes, self.tokens, self.encodings], device=groups.device)  # (3, groups)
        return tuple(counts[:, groups])

    def count_encodings(self, sources: Iterable[int], rows: list[int]) -> None:
        """Book one encoder run for each of `sources`, on the first of `rows` that asked for it."""
        for source in sources:
            row = next(row for row in rows if self.et5.source_of[row] == source)
            self.encodings[self.group_of[row]] += 1

    def count_pass(self, rows: list[int], positions: int) -> None:
        """Book one decoder pass of `positions` positions for each of `rows`."""
        groups = [self.group_of[row] for row in rows]
        for group in set(groups):
            self.passes[group] += 1
        for group in groups:
            self.tokens[group] += positions

    def trace(self, new_tokens: int, beam_indices: torch.Tensor | None = None) -> RouteTrace:
        """
        The record of a whole generation.

        Args:
            new_tokens: generated positions. beam_indices: `(answers, new_tokens)`, as beam search returns them.
        """
        columns = {
            name: torch.cat([step[name] for step in self.steps], dim=1)[:, :new_tokens] for name in self.STEP_FIELDS
        }
        if beam_indices is None:
            groups = self.row_group
        else:
            index = beam_indices[:, :new_tokens].long().to(self.row_group.device)  # (A, new_tokens)
            missing = index < 0
            columns = {name: value.gather(0, index.clamp(min=0)) for name, value in columns.items()}
            columns["expert"] = columns["expert"].masked_fill(missing, ENDED)
            for name in ("margin", "log_p_emamba", "log_p_et5"):
                columns[name] = columns[name].masked_fill(missing, float("nan"))
            columns["gap"] = columns["gap"].masked_fill(missing, 0)
            groups = self.row_group[index[:, 0].clamp(min=0)]
        passes, tokens, encodings = self._counts_of(groups)
        return RouteTrace(**columns, et5_passes=passes, et5_tokens=tokens, encoder_calls=encodings)
