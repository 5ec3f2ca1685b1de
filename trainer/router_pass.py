# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The router over whole gold or generated answers, with EMamba for its features and without ET5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_mambaformer.emamba_stream import head_logits, read_together
from ..modeling_mambaformer.outputs_mambaformer import EMAMBA, ENDED, ET5
from ..modeling_mambaformer.router import RouterState, past_of
from ..modeling_mambaformer.router_features import RouterInputs
from ..modeling_mambaformer.router_inputs import first_state, router_inputs, source_scalars
from ..modeling_mambaformer.sources import Sources

ROUNDS = 16
"""Rounds in which all positions are judged at once, before the router goes position by position."""


@dataclass
class RouterPass:
    """
    What the router said of T decoder positions of B rows.

    Attributes:
        encoded: `(B, T, H)`, the router's first layer before its own past is added.
        state: the router's state before the first position.
        margin: `(B, T)`, differentiable. expert, gap: `(B, T)` long, as in `RouteTrace`, without an end.
        gate_logit: `(B,)`, differentiable.
    """

    encoded: torch.Tensor
    state: RouterState
    margin: torch.Tensor
    expert: torch.Tensor
    gap: torch.Tensor
    gate_logit: torch.Tensor


@dataclass
class Reading:
    """
    What EMamba makes of B sources and T decoder positions each; nothing of it needs a router's choices.

    Attributes:
        hidden: `(B, T, D)`, final hidden states. logits: `(B, T, V)` float. at_source_end: `(B, D)`.
        state: a router's state before the first position. scalars: the sources' length and domain, `(B,)` each.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    at_source_end: torch.Tensor
    state: RouterState
    scalars: tuple[torch.Tensor, torch.Tensor]


def run_router(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    decoder_input_ids: torch.Tensor,
    threshold: float,
    ended: torch.Tensor | None = None,
) -> RouterPass:
    """
    Let EMamba read sources `(B, S)` and decoder inputs `(B, T)` without gradients, and the router judge each position.

    The router's past is its own: it unrolls its choices at `threshold`, as it will when it generates.

    Args:
        ended: `(B, T)` bool, positions that are not part of an answer, never routed.
    """
    reading = read_answers(model, input_ids, attention_mask, decoder_input_ids)
    return judge(model, reading, decoder_input_ids, threshold, ended)


@torch.no_grad()
def read_answers(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
) -> Reading:
    """Let EMamba read sources `(B, S)` and decoder inputs `(B, T)`, for any router to judge."""
    emamba = model.emamba
    sources = Sources.build(input_ids, attention_mask, model.config.vocab_size)
    hidden, at_source_end = read_together(emamba, sources, decoder_input_ids, None)  # (B, T, D), (B, D)
    state = first_state(emamba, model.router, sources)
    scalars = source_scalars(model.router, model.config, sources)  # (B,), (B,)
    return Reading(hidden, head_logits(emamba, hidden), at_source_end, state, scalars)


def inputs_of(model: nn.Module, reading: Reading, decoder_input_ids: torch.Tensor) -> RouterInputs:
    """What a router sees of a reading."""
    inputs, _ = router_inputs(
        model.emamba,
        model.router,
        model.config,
        reading.hidden,
        reading.logits,
        decoder_input_ids,
        reading.state,
        reading.scalars,
    )
    return inputs


def judge(
    model: nn.Module,
    reading: Reading,
    decoder_input_ids: torch.Tensor,
    threshold: float,
    ended: torch.Tensor | None = None,
    inputs: RouterInputs | None = None,
) -> RouterPass:
    """
    What `model.router` says of each position of a reading; see `run_router`.

    Args:
        inputs: of `inputs_of`, where several routers share them.
    """
    router, scalars, state = model.router, reading.scalars, reading.state
    inputs = inputs_of(model, reading, decoder_input_ids) if inputs is None else inputs
    encoded = router.encode(inputs)  # (B, T, H)
    expert, gap = unroll(model, encoded, state, threshold, ended)
    previous, _ = past_of(expert, state)
    dtype = model.gate.hidden_proj.weight.dtype
    gate_logit = model.gate(reading.at_source_end.to(dtype), scalars[0].to(dtype), scalars[1].to(dtype))  # (B,)
    return RouterPass(encoded, state, router.margin(encoded, previous, gap), expert, gap, gate_logit)


@torch.no_grad()
def unroll(
    model: nn.Module,
    encoded: torch.Tensor,
    state: RouterState,
    threshold: float,
    ended: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's choices and gaps, both `(B, T)` long, at `threshold`, in rows whose gate is `allowed` `(B,)`."""
    if ended is None:
        ended = torch.zeros(encoded.shape[:2], dtype=torch.bool, device=encoded.device)
    expert = torch.full(ended.shape, EMAMBA, device=ended.device)
    rows = (~ended.all(1) if allowed is None else allowed & ~ended.all(1)).nonzero().flatten()  # (R,)
    if rows.numel():
        expert[rows] = settle(model.router, encoded[rows], state.select(rows), threshold, ended[rows])
    return expert.masked_fill(ended, ENDED), past_of(expert, state)[1]


def settle(
    router: nn.Module, encoded: torch.Tensor, state: RouterState, threshold: float, ended: torch.Tensor
) -> torch.Tensor:
    """
    Choices `(R, T)`, 0 where ended, each of which follows from those before it.

    All positions are judged at once, given the choices of the round before, until nothing changes. A round puts at
    least one more position right for good, and mostly nearly all; where that takes long, the router goes position by
    position.
    """
    expert = torch.full(ended.shape, EMAMBA, device=ended.device)
    for _ in range(ROUNDS):
        previous, gap = past_of(expert, state)
        found = torch.where((router.margin(encoded, previous, gap) > threshold) & ~ended, ET5, EMAMBA)
        if torch.equal(found, expert):
            return expert
        expert = found
    every = torch.ones(len(encoded), dtype=torch.bool, device=encoded.device)
    return router.choose(encoded, state, threshold, None, every, ended)[0].clamp(min=EMAMBA)
