# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The terms of the utility-guided multi-objective loss, each a pure function from `LossInputs` to a scalar.

To add one: write the function, enter it in `LOSS_TERMS` with the stages that use it, and give
`MambaFormerTrainingArguments` a field `w_<name>`. The trainer weighs, sums and logs what is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class LossInputs:
    """
    What a stage knows of one batch; a term reads what it needs.

    Attributes:
        mask: `(B, T)` float, 1 on answer tokens, 0 on padding.
        log_p_mix, log_p_et5, log_p_emamba: `(B, T)`, log-probability in nats of the gold token.
        margin: `(B, T)`, the router's, finite everywhere.
        delta: `(B, T)`, clipped benefit of ET5 in nats.
        cost: `(B, T)`, of a call there in units of an average call: measured milliseconds over `CallCosts.unit_ms`.
        target, weight: `(B, T)`, of the router's cross-entropy.
        choice: `(B, T)` long, 1 where the router asks ET5.
        gate_logit, gate_target: `(B,)`.
        price: lambda, in nats per unit of cost. share: target share of ET5.
    """

    mask: torch.Tensor
    log_p_mix: torch.Tensor | None = None
    log_p_et5: torch.Tensor | None = None
    log_p_emamba: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    cost: torch.Tensor | None = None
    target: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    choice: torch.Tensor | None = None
    gate_logit: torch.Tensor | None = None
    gate_target: torch.Tensor | None = None
    price: float = 0.0
    share: float = 0.0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` `(B, T)` over the answer tokens."""
        return (values * self.mask).sum() / self.mask.sum().clamp(min=1)


def task_loss(x: LossInputs) -> torch.Tensor:
    """Negative log-likelihood of the merged answer; its gradient in the margin is phi - gamma, gamma ET5's share of
    the mixture at the gold token (marginal likelihood)."""
    return -x.mean(x.log_p_mix)


def expert_loss(x: LossInputs) -> torch.Tensor:
    """Sum of both experts' own negative log-likelihoods."""
    return -x.mean(x.log_p_et5) - x.mean(x.log_p_emamba)


def utility_loss(x: LossInputs) -> torch.Tensor:
    """Cross-entropy of phi to the utility target; gradient phi - target, so it neither stalls nor feeds on itself."""
    return x.mean(x.weight * F.binary_cross_entropy_with_logits(x.margin, x.target, reduction="none"))


def use_loss(x: LossInputs) -> torch.Tensor:
    """Utilisation relative to the target shares: sum_e f_e P_e / rho_e, 1 where dispatch and probability meet them."""
    dispatched = x.mean((x.choice == 1).to(x.margin.dtype)).detach()
    return utilisation(dispatched, x.mean(torch.sigmoid(x.margin)), x.share)


def utilisation(dispatched: torch.Tensor, probability: torch.Tensor, share: float) -> torch.Tensor:
    """sum_e f_e P_e / rho_e from ET5's dispatched fraction f, mean probability P and target share rho."""
    return dispatched * probability / share + (1 - dispatched) * (1 - probability) / (1 - share)


def cost_loss(x: LossInputs) -> torch.Tensor:
    """Expected cost a token times its price, in nats."""
    return x.price * x.mean(torch.sigmoid(x.margin) * x.cost)


def burst_loss(x: LossInputs) -> torch.Tensor:
    """Expected switches between the experts a token, neighbours taken as independent given their margins."""
    phi = torch.sigmoid(x.margin)
    switch = phi[:, 1:] * (1 - phi[:, :-1]) + (1 - phi[:, 1:]) * phi[:, :-1]  # (B, T - 1)
    return x.mean(F.pad(switch, (1, 0)))


def z_loss(x: LossInputs) -> torch.Tensor:
    """Mean squared margin: keeps the router's logits small."""
    return x.mean(x.margin**2)


def gain_loss(x: LossInputs) -> torch.Tensor:
    """Negative expected utility; the mean of the policy gradient, which vanishes where phi saturates."""
    return -x.mean(torch.sigmoid(x.margin) * (x.delta - x.price * x.cost))


def regress_loss(x: LossInputs) -> torch.Tensor:
    """Huber regression of the margin on Delta: no price inside, any budget later by a threshold."""
    return x.mean(F.huber_loss(x.margin, x.delta, reduction="none", delta=5.0))


def gate_loss(x: LossInputs) -> torch.Tensor:
    """Cross-entropy of the sequence gate, a mean over sequences."""
    return F.binary_cross_entropy_with_logits(x.gate_logit, x.gate_target)


@dataclass(frozen=True)
class LossTerm:
    """A term's function and the stages in which it counts."""

    compute: Callable[[LossInputs], torch.Tensor]
    stages: tuple[str, ...]


ROUTING = ("distil", "joint")
LOSS_TERMS: dict[str, LossTerm] = {
    "task": LossTerm(task_loss, ("joint",)),
    "expert": LossTerm(expert_loss, ("adapt", "joint")),
    "util": LossTerm(utility_loss, ROUTING),
    "use": LossTerm(use_loss, ROUTING),
    "cost": LossTerm(cost_loss, ROUTING),
    "burst": LossTerm(burst_loss, ROUTING),
    "z": LossTerm(z_loss, ROUTING),
    "gain": LossTerm(gain_loss, ROUTING),
    "regress": LossTerm(regress_loss, ROUTING),
    "gate": LossTerm(gate_loss, ROUTING),
}


def total_loss(
    inputs: LossInputs, stage: str, weights: dict[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The weighted sum of the stage's terms, and each term by name, unweighted and detached, where its weight is not 0.
    """
    total = inputs.mask.new_zeros(())
    terms = {}
    for name, term in LOSS_TERMS.items():
        if stage in term.stages and weights[name]:
            value = term.compute(inputs)
            total = total + weights[name] * value
            terms[name] = value.detach()
    return total, terms
