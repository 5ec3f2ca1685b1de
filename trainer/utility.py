# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What ET5 is worth at a token, and what it costs (paper, utility-guided routing).

The benefit of ET5 at gold token y_t is Delta_t = log p_T(y_t) - log p_M(y_t), in nats. A call costs a decoder pass,
the positions it catches up, and a part of the encoder's run; EMamba runs anyway and costs nothing more. Pure
functions of tensors, all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CallCosts:
    """
    Cost of an ET5 call, in units of an average call at the target share (so that a mean cost of 1 is ordinary).

    The proportions come from measured milliseconds; the unit makes prices, step sizes and budgets mean the same on a
    fast and on a slow machine.

    Attributes:
        once: of a decoder pass. token: of each position that it computes. encoder: of one encoder run.
        calls: expected calls a sequence, over which the encoder's run is spread.
        unit_ms: milliseconds of one unit on the machine where the table was measured; 0 without a table.
    """

    once: float = 1.0
    token: float = 0.0
    encoder: float = 0.0
    calls: float = 1.0
    unit_ms: float = 0.0

    @classmethod
    def from_table(cls, table: dict[str, float] | None, share: float, target_length: float) -> CallCosts:
        """
        Normalise a table measured by `costs.measure_costs` (milliseconds under `pass`, `token`, `encoder`; one that is
        missing is free); without a table, or where all is free, every call costs 1.

        Args:
            share: target share of ET5, above 0. target_length: mean answer length in tokens.
        """
        once, token, encoder = ((table or {}).get(name, 0.0) for name in ("pass", "token", "encoder"))
        calls = max(1.0, share * target_length)
        gap = min(1 / share, target_length)
        average = once + token * gap + encoder / calls  # ms
        if average <= 0:
            return cls()
        return cls(once / average, token / average, encoder / average, calls, average)

    def of_call(self, gap: torch.Tensor) -> torch.Tensor:
        """Cost of a call that catches up `gap` positions (1: none skipped), the encoder's part included."""
        return self.once + self.token * gap + self.encoder / self.calls

    def of_sequence(self, choice: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Cost `(B,)` of whole answers whose choices `(B, T)` are 1 where ET5 is called, with their gaps `(B, T)`."""
        called = (choice == 1).float()
        return (called * (self.once + self.token * gap)).sum(-1) + self.encoder * called.amax(-1)


def utility_target(
    delta: torch.Tensor, cost: torch.Tensor, price: float, tau: float, clip: float = 5.0
) -> torch.Tensor:
    """Probability with which the router should ask ET5: sigma((clip(Delta) - lambda c) / tau), all `(B, T)`."""
    return torch.sigmoid((delta.clamp(-clip, clip) - price * cost) / tau)


def gate_target(
    delta: torch.Tensor, mask: torch.Tensor, costs: CallCosts, price: float, tau: float, clip: float = 5.0
) -> torch.Tensor:
    """
    Probability `(B,)` with which a sequence should be allowed to ask ET5: whether what it can gain there, token by
    token and net of each call's price, exceeds the price of its encoder run.

    Args:
        delta, mask: `(B, T)`; padding has a mask of 0.
    """
    net = delta.clamp(-clip, clip) - price * (costs.once + costs.token)
    gain = (net.clamp(min=0) * mask).sum(-1)  # (B,)
    return torch.sigmoid((gain - price * costs.encoder) / tau)


def token_weights(differs: torch.Tensor, agreement_weight: float) -> torch.Tensor:
    """1 where the experts' first choices differ, and a little where they agree: nothing hangs on those tokens."""
    return torch.where(differs.bool(), 1.0, agreement_weight)


@torch.no_grad()
def oracle_choice(
    delta: torch.Tensor, mask: torch.Tensor, costs: CallCosts, price: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The choices of a router that knows Delta `(B, T)` and asks ET5 wherever Delta exceeds the price of the call.

    Goes from left to right, since a call's cost depends on how long ago the last one was.

    Returns:
        choices (0 or 1, 0 on padding) and gaps, both `(B, T)` long.
    """
    mask = mask.bool()
    if not costs.token:
        choice = ((delta > price * costs.of_call(torch.ones_like(delta))) & mask).long()
        return choice, gaps_of(choice)
    since = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    choices, gaps = [], []
    for t in range(delta.shape[1]):
        gap = since + 1
        called = (delta[:, t] > price * costs.of_call(gap)) & mask[:, t]
        since = torch.where(called, torch.zeros_like(since), gap)
        choices.append(called.long())
        gaps.append(gap)
    return torch.stack(choices, 1), torch.stack(gaps, 1)


def gaps_of(choice: torch.Tensor) -> torch.Tensor:
    """Positions since ET5 last spoke, at each of `choice` `(B, T)`; 1 where it spoke just before."""
    position = torch.arange(choice.shape[1], device=choice.device).expand_as(choice)
    last = torch.where(choice == 1, position, -1).cummax(dim=1).values  # (B, T)
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return position - before


@torch.no_grad()
def price_for_share(
    delta: torch.Tensor, mask: torch.Tensor, share: float, costs: CallCosts | None = None, rounds: int = 40
) -> float:
    """
    The price at which the oracle's share of `mask`ed tokens is `share`: lambda* = quantile_{1-share}(Delta), where all
    calls cost 1; with catch-up costs the same is found by bisection.

    Raises:
        ValueError: where there is no token, or `share` is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share!r}: give a share of tokens in (0, 1).")
    costs = costs or CallCosts()
    values = delta[mask.bool()].float()
    if values.numel() == 0:
        raise ValueError("There is no answer token to set a price from: give a data set with answers.")
    if not costs.token:
        unit = float(costs.of_call(torch.ones(())))
        return max(0.0, threshold_for_share(values, share) / unit)
    low, high = 0.0, max(1e-6, float(values.max())) / float(costs.of_call(torch.ones(())))
    for _ in range(rounds):
        middle = (low + high) / 2
        choice, _ = oracle_choice(delta, mask, costs, middle)
        if choice.sum() / values.numel() > share:
            low = middle
        else:
            high = middle
    return high


def threshold_for_share(margins: torch.Tensor, share: float) -> float:
    """
    Threshold theta such that `round(share * n)` of the `(n,)` margins exceed it: their (1 - share) quantile, in the
    middle between two neighbours. Margins of minus infinity (a closed gate) are never exceeded.

    Raises:
        ValueError: where there are no margins.
    """
    if margins.numel() == 0:
        raise ValueError("There are no margins to set a threshold from: give at least one answer token.")
    ordered = margins.float().sort(descending=True).values
    finite = int(ordered.isfinite().sum())
    wanted = min(round(share * ordered.numel()), finite)
    if wanted == 0:
        return float(ordered[0]) if finite else 0.0
    if wanted == finite:
        return float(ordered[finite - 1]) - 1.0
    return float((ordered[wanted - 1] + ordered[wanted]) / 2)


def dual_ascent(price: float, spent: float, budget: float, rate: float) -> float:
    """One step of projected dual ascent: the price rises while more than the budget is spent; never negative."""
    return max(0.0, price + rate * (spent - budget))


def oracle_gain(delta: torch.Tensor, choice: torch.Tensor) -> tuple[float, float]:
    """
    Nats a token won over EMamba alone by the best choice of as many tokens, and by `choice` itself; inputs `(n,)`.
    """
    count = int((choice == 1).sum())
    best = delta.sort(descending=True).values[:count].sum() if count else delta.new_zeros(())
    size = max(1, delta.numel())
    return float(best) / size, float(delta[choice == 1].sum()) / size
