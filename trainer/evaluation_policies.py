# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The rules that MambaFormer is compared with, each in the form in which the model can run it.

A rule by token is a router with another margin (`ScoreRouter`), put in the model's place for as long as `routed_by`
lasts. A rule by sequence looks at the source alone and gives the whole answer to one expert (`SequenceRule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..modeling_mambaformer.router import TokenRouter
from ..modeling_mambaformer.router_features import RouterInputs
from .calibration import Unrolled
from .utility import CallCosts

BISECTIONS = 24


class ScoreRouter(TokenRouter):
    """
    A router whose margin is `score(inputs) -> (B, T)`, whatever it chose before; the rest is the model's own router.

    Args:
        router: the model's, whose projection and domain weights the inputs are made with. score: larger asks ET5.
    """

    def __init__(self, router: TokenRouter, score: Callable[[RouterInputs], torch.Tensor]):
        nn.Module.__init__(self)
        self.score_of = score
        self.hidden_proj = router.hidden_proj
        self.register_buffer("domain_weight", router.domain_weight)

    def encode(self, inputs: RouterInputs) -> torch.Tensor:
        """The scores as `(B, T, 1)` float."""
        return self.score_of(inputs).float()[..., None]

    def margin(self, encoded: torch.Tensor, previous: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """The scores, `(...)` from `(..., 1)`."""
        return encoded[..., 0]


def confidence(inputs: RouterInputs) -> torch.Tensor:
    """Minus the probability of EMamba's likeliest next token: ask ET5 where EMamba is unsure."""
    return -inputs.top_probability


def entropy(inputs: RouterInputs) -> torch.Tensor:
    """Entropy of EMamba's next-token distribution."""
    return inputs.entropy


class RandomScore:
    """Uniform numbers in [0, 1), from a generator of its own."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: RouterInputs) -> torch.Tensor:
        return torch.rand(inputs.entropy.shape, generator=self.generator).to(inputs.entropy.device)


RULES_BY_TOKEN: dict[str, Callable[[int], Callable[[RouterInputs], torch.Tensor]]] = {
    "confidence": lambda seed: confidence,
    "entropy": lambda seed: entropy,
    "random": RandomScore,
}
"""Makes each rule's score from a seed."""


def rule_routers(router: TokenRouter, seed: int) -> dict[str, TokenRouter]:
    """The model's own router, and a router for each rule by token."""
    return {"router": router, **{name: ScoreRouter(router, make(seed)) for name, make in RULES_BY_TOKEN.items()}}


@contextmanager
def routed_by(
    model: nn.Module,
    router: TokenRouter,
    threshold: float | None = None,
    gate_threshold: float | None = None,
    budget: float = 1.0,
) -> Iterator[None]:
    """
    Within this, the model routes by `router` at `threshold`; a rule other than its own gives routed tokens to ET5
    alone. The model is as before afterwards, whatever happens.

    Args:
        threshold: default the configuration's. gate_threshold: of the sequence gate, `None` leaves it open.
        budget: the cap of a request, 1 for none.
    """
    config, own = model.config, model.router
    names = ("router_threshold", "gate_threshold", "expert_budget", "merger")
    before = {name: getattr(config, name) for name in names}
    model.router = router
    config.router_threshold = config.router_threshold if threshold is None else threshold
    config.gate_threshold, config.expert_budget = gate_threshold, budget
    if router is not own:
        config.merger = "select"
    try:
        yield
    finally:
        model.router = own
        for name, value in before.items():
            setattr(config, name, value)


@dataclass(frozen=True)
class SequenceRule:
    """Gives a whole answer to ET5 where `sign * feature` of its source is above `threshold`."""

    feature: str
    sign: float
    threshold: float

    def chosen(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """Which of n sources go to ET5, `(n,)` bool; `features` holds `(n,)` floats."""
        return self.sign * features[self.feature] > self.threshold


def sequence_rules(features: dict[str, np.ndarray], cost: np.ndarray, budget: float) -> list[SequenceRule]:
    """
    One rule a feature and direction, each spending `budget` on average over n validation sources.

    Args:
        features: `(n,)` each. cost: `(n,)`, of giving the sequence to ET5. budget: mean cost a sequence, same unit.
    """
    rules = []
    for name, values in features.items():
        for sign in (1.0, -1.0):
            order = np.argsort(-sign * values, kind="stable")
            ordered = sign * values[order]
            spent = np.cumsum(cost[order]) / len(cost)
            # Whole sequences are bought as long as half of the next one still fits.
            bought = int(np.searchsorted(spent - cost[order] / (2 * len(cost)), budget))
            if bought == 0:
                threshold = float(ordered[0])
            elif bought == len(ordered):
                threshold = float(ordered[-1]) - 1.0
            else:
                threshold = float(ordered[bought - 1] + ordered[bought]) / 2
            rules.append(SequenceRule(name, sign, threshold))
    return rules


def threshold_for_cost(
    model: nn.Module, unrolled: Unrolled, costs: CallCosts, budget: float, gate_threshold: float | None = None
) -> float:
    """
    The threshold at which the choices of `model.router` cost `budget` an answer on average, by bisection.

    Args:
        costs: in the unit of `budget`.
    """
    margins = unrolled.margin[~unrolled.ended]
    low, high = float(margins.min()) - 1.0, float(margins.max()) + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        expert, gap = unrolled.choices(model, middle, gate_threshold)
        if float(costs.of_sequence(expert, gap).mean()) > budget:
            low = middle
        else:
            high = middle
    return high


def milliseconds(table: dict[str, float]) -> CallCosts:
    """Costs of ET5's calls in milliseconds, from a measured table."""
    return CallCosts(table["pass"], table["token"], table["encoder"], 1.0)
