# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What each stage runs on a batch: from a batch to `LossInputs`.

adapt: both experts, each on its own. distil: EMamba for its features and the router; ET5 is not run, its opinion is in
the batch. joint: everything, with the soft mixture as the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from .arguments import MambaFormerTrainingArguments
from .distillation import ask_both, gold_log_probability
from .losses import LossInputs
from .router_pass import RouterPass, run_router
from .utility import CallCosts, gate_target, token_weights, utility_target

Batch = dict[str, torch.Tensor]


@dataclass
class RoutingState:
    """
    What training adapts besides the weights; saved and restored with a checkpoint.

    Attributes:
        share: target share of ET5. tau: present temperature.
        price: lambda, in nats per unit of cost (an average call), `None` before the first batch of a joint stage with
            an automatic price.
        spent: running mean of the expected cost a token. threshold: running (1 - share) quantile of the margins.
        costs: of ET5's calls.
    """

    share: float
    tau: float
    price: float | None = None
    spent: float | None = None
    threshold: float | None = None
    costs: CallCosts = field(default_factory=CallCosts)

    def to_dict(self) -> dict:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RoutingState:
        """Back from `to_dict`."""
        return cls(**{**values, "costs": CallCosts(**values["costs"])})


def adapt_inputs(
    model: nn.Module, plain: nn.Module, batch: Batch, state: RoutingState, args: MambaFormerTrainingArguments
) -> LossInputs:
    """Each expert's log-probability of the gold answer. `model` may be wrapped for data parallelism, `plain` not."""
    output = ask_both(model, batch)
    labels = batch["labels"]
    return LossInputs(
        mask=(labels != -100).float(),
        log_p_et5=gold_log_probability(output.et5_logits, labels),
        log_p_emamba=gold_log_probability(output.emamba_logits, labels),
    )


def distil_inputs(
    model: nn.Module,
    plain: nn.Module,
    batch: Batch,
    state: RoutingState,
    args: MambaFormerTrainingArguments,
    route: Callable[..., RouterPass] = run_router,
) -> LossInputs:
    """The router's margins against cached utilities; `route` may take EMamba's reading from elsewhere."""
    labels = batch["labels"]
    mask = labels != -100  # (B, T)
    said = route(
        plain,
        batch["input_ids"],
        batch["attention_mask"],
        plain.prepare_decoder_input_ids_from_labels(labels),
        state.threshold or 0.0,
        ~mask,
    )
    tops = batch["top_et5"], batch["top_emamba"]
    return routing_inputs(
        LossInputs(
            mask=mask.float(),
            log_p_et5=batch["log_p_et5"],
            log_p_emamba=batch["log_p_emamba"],
            margin=said.margin,
            choice=said.expert,
            gate_logit=said.gate_logit,
        ),
        said.gap,
        tops,
        labels,
        state,
        args,
    )


def joint_inputs(
    model: nn.Module, plain: nn.Module, batch: Batch, state: RoutingState, args: MambaFormerTrainingArguments
) -> LossInputs:
    """Both experts, the router and the soft mixture in one pass."""
    labels = batch["labels"]
    if state.threshold is not None:
        plain.config.router_threshold = state.threshold
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        routing="soft",
        output_experts=True,
        use_cache=False,
    )
    tops = output.et5_logits.argmax(-1), output.emamba_logits.argmax(-1)
    return routing_inputs(
        LossInputs(
            mask=(labels != -100).float(),
            log_p_mix=gold_log_probability(output.logits, labels),
            log_p_et5=gold_log_probability(output.et5_logits, labels),
            log_p_emamba=gold_log_probability(output.emamba_logits, labels),
            margin=output.margin,
            choice=output.route_trace.expert,
            gate_logit=output.gate_logit,
        ),
        output.route_trace.gap,
        tops,
        labels,
        state,
        args,
    )


def routing_inputs(
    known: LossInputs,
    gap: torch.Tensor,
    tops: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    state: RoutingState,
    args: MambaFormerTrainingArguments,
) -> LossInputs:
    """Complete `known` with utilities, targets and weights; these carry no gradient."""
    with torch.no_grad():
        delta = (known.log_p_et5 - known.log_p_emamba).detach().clamp(-args.delta_clip, args.delta_clip)
        cost = state.costs.of_call(gap.float())
        price = state.price or 0.0
        target = utility_target(delta, cost, price, state.tau, args.delta_clip)
        if args.intractable == "zero":
            target = target.masked_fill((tops[0] != labels) & (tops[1] != labels), 0.0)
        known.delta, known.cost, known.target = delta, cost, target
        known.weight = token_weights(tops[0] != tops[1], args.agreement_weight)
        known.choice = torch.where(known.mask.bool(), known.choice, -1)
        known.gate_target = gate_target(delta, known.mask, state.costs, price, state.tau, args.delta_clip)
    known.price, known.share = price, state.share
    return known


STAGE_INPUTS = {"adapt": adapt_inputs, "distil": distil_inputs, "joint": joint_inputs}
