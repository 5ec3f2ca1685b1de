# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
One pass over some decoder positions: choose who speaks, then merge what the experts say.

The same two steps serve a whole target at once (training, scoring) and one token after another (generation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .cache_mambaformer import MambaFormerCache, RoutingRequest
from .emamba_stream import head_logits
from .et5_pass import BoundET5, ET5Decoder
from .merger import merge
from .outputs_mambaformer import EMAMBA, ENDED, ET5, RouteTrace
from .router import RouterState, past_of
from .router_inputs import router_inputs
from .router_step import bind_router, likeliest


@dataclass
class Choice:
    """
    Who speaks at T positions of B rows.

    Attributes:
        expert, gap: `(B, T)` long, as in `RouteTrace`. margin: `(B, T)` float, NaN where the router was not asked.
        asked: `(B, T)` bool, positions at which ET5's logits are needed.
        emamba_logits: `(B, T, V)`, or `None` where EMamba was not run.
        state: the router's state after the last position, or `None` where it was not run.
        log_top: `(B, T)`, log-probability of EMamba's likeliest token, where it is known already.
    """

    expert: torch.Tensor
    gap: torch.Tensor
    margin: torch.Tensor
    asked: torch.Tensor
    emamba_logits: torch.Tensor | None
    state: RouterState | None
    log_top: torch.Tensor | None = None


def choose(
    model: nn.Module,
    request: RoutingRequest,
    ids: torch.Tensor,
    ended: torch.Tensor,
    hidden: torch.Tensor | None,
    state: RouterState | None,
    scalars: tuple[torch.Tensor, torch.Tensor] | None,
    gate_logit: torch.Tensor | None,
    teacher: torch.Tensor | None = None,
    emamba_logits: torch.Tensor | None = None,
) -> Choice:
    """
    Decide who speaks at decoder positions `ids` `(B, T)`.

    Args:
        ended: `(B, T)` bool, positions after the end of their answer.
        hidden: `(B, T, D)`, EMamba's final hidden states; `None` with `routing="et5"`, which needs neither it nor the
            four that follow.
        state, scalars, gate_logit: the router's state before these positions, the sources' scalars and gate, per row.
        teacher: `(B, T)` long, choices to take as the router's past in place of its own (training on an oracle).
        emamba_logits: `(B, T, V)`, where they came with `hidden`; else EMamba's head is run.
    """
    forced = {"et5": ET5, "emamba": EMAMBA}.get(request.routing)
    logits = emamba_logits  # (B, T, V)
    if logits is None and hidden is not None:
        logits = head_logits(model.emamba, hidden)
    if forced is not None:
        expert = torch.full_like(ids, forced).masked_fill(ended, ENDED)  # (B, T)
        gap = torch.ones_like(ids) if forced == ET5 else torch.zeros_like(ids)
        margin = torch.full(ids.shape, float("nan"), device=ids.device)
        return Choice(expert, gap, margin, expert == ET5, logits, state)

    allowed = request.allows(gate_logit)  # (B,)
    soft = request.routing == "soft"
    limits = (request.threshold_at(state.position), None if soft else request.cap, request.first_new)
    if teacher is None:
        embeddings = model.emamba.get_input_embeddings()
        step = bind_router(model.router, embeddings, ids, hidden, logits, state, scalars, allowed, ended, *limits)
        if step is not None:
            step.run()
            (margin, log_top), (expert, gap) = step.record.levels[0], step.record.choices[0]  # (B, T)
            asked = ~ended if soft else expert == ET5
            return Choice(expert, gap, margin, asked, logits, step.state, log_top)

    inputs, after = router_inputs(model.emamba, model.router, model.config, hidden, logits, ids, state, scalars)
    encoded = model.router.encode(inputs)  # (B, T, H)
    margin = None
    if teacher is None:
        expert, gap, margin, chosen = model.router.choose(
            encoded, state, *limits[:2], allowed, ended, request.first_new
        )
        after.previous, after.since, after.spent = chosen.previous, chosen.since, chosen.spent
    else:
        expert, gap = teacher, past_of(teacher, state)[1]
    if margin is None or torch.is_grad_enabled():
        previous, _ = past_of(expert, state)
        margin = model.router.margin(encoded, previous, gap)  # (B, T), differentiable, given the choices before
    asked = ~ended if soft else expert == ET5
    return Choice(expert, gap, margin.masked_fill(ended, float("nan")), asked, logits, after)


def ask_et5(
    model: nn.Module,
    cache: MambaFormerCache,
    asked: torch.Tensor,
    keep_from: int,
    decoder: ET5Decoder | BoundET5 | None = None,
) -> torch.Tensor:
    """
    Let ET5 speak for the rows and positions `asked` `(B, K)` bool, at least one, the first being `keep_from`.

    Args:
        decoder: the model's own, or one bound to it.

    Returns:
        logits `(B, K, V)`, of meaning where asked. What was run is booked in `cache`, which has read the positions.
    """
    places = asked.nonzero().tolist()  # (row, position) by rows
    rows = sorted({row for row, _ in places})
    end = keep_from + max(position for _, position in places) + 1
    et5 = cache.et5
    encoded = et5.encode(model.et5, (et5.source_of[row] for row in rows), model.et5_encoder)
    decoder = decoder or model.et5_decoder
    said, positions = et5.decode(model.et5, cache.decoder_ids, rows, end, keep_from, decoder)
    cache.count_encodings(encoded, rows)
    cache.count_pass(rows, positions)
    if said.shape[:2] == asked.shape:  # (R, <= K, V)
        return said
    logits = said.new_zeros(*asked.shape, said.shape[-1])
    logits[rows, : said.shape[1]] = said
    return logits  # (B, K, V)


def merge_experts(
    model: nn.Module, request: RoutingRequest, choice: Choice, et5_logits: torch.Tensor | None, keep: int
) -> tuple[torch.Tensor, RouteTrace]:
    """
    The logits `(B, K, V)` of the last `keep` positions (0: all T), and their trace without its counts.

    Args:
        et5_logits: `(B, K, V)`, arbitrary where `choice.asked` is false; `None` where nobody asked.
    """
    last = slice(-keep if keep else None, None)
    expert, gap, margin, asked = (x[:, last] for x in (choice.expert, choice.gap, choice.margin, choice.asked))
    emamba_logits = None if choice.emamba_logits is None else choice.emamba_logits[:, last]
    if emamba_logits is None or (request.routing == "et5" and et5_logits is not None):
        logits = et5_logits
    elif et5_logits is None or request.routing == "emamba":
        logits = emamba_logits
    else:
        name = "mix" if request.routing == "soft" else model.config.merger
        kappa = model.config.complement_weight
        if bool(asked.all()):
            logits = merge(name, emamba_logits, et5_logits, margin, kappa)
        else:
            merged = merge(name, emamba_logits[asked], et5_logits[asked], margin[asked], kappa)  # (n, V)
            logits = emamba_logits.masked_scatter(asked[..., None], merged.to(emamba_logits.dtype))  # (B, K, V)
    trace = RouteTrace(expert=expert, margin=margin.detach(), gap=gap)
    if et5_logits is None and choice.log_top is not None:
        trace.log_p_emamba, trace.log_p_et5 = choice.log_top[:, last], torch.full_like(margin, float("nan"))
        return logits, trace
    top = logits.argmax(-1, keepdim=True)  # (B, K, 1)
    trace.log_p_emamba = log_probability(emamba_logits, top, expert != ENDED)
    trace.log_p_et5 = log_probability(et5_logits, top, asked)
    return logits, trace


@torch.no_grad()
def log_probability(logits: torch.Tensor | None, ids: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of `ids` `(B, K, 1)` under `logits` `(B, K, V)`, NaN where not `known` `(B, K)`."""
    if logits is None:
        return torch.full(known.shape, float("nan"), device=known.device)
    found = likeliest(logits)
    if found is None:
        chosen = logits.gather(-1, ids).squeeze(-1).float() - logits.float().logsumexp(-1)  # (B, K)
    else:
        top, log_top = found
        chosen = logits.gather(-1, ids).squeeze(-1) - logits.gather(-1, top[..., None]).squeeze(-1) + log_top
    return chosen.masked_fill(~known, float("nan"))
