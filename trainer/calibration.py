# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
After training: the threshold that gives the budget on answers the model itself writes, and the sequence gate.

A router sees its own past, so a threshold changes the margins it is compared with. The threshold is therefore found by
unrolling the router over the generated text until the share is right, and the text is generated again with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from datasets import Dataset
from torch import nn

from ..modeling_mambaformer.router import RouterState
from .data import Collator
from .distillation import add_utilities
from .router_pass import RouterPass, run_router, unroll
from .utility import CallCosts, oracle_gain

SHARES = (0.005, 0.01, 0.02, 0.038, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
GATE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Unrolled:
    """
    A router's pass over a whole data set, to ask for shares at any threshold without running an expert again.

    Args:
        passes: one a batch, B rows and T positions each. ended: `(B, T)` bool of each, positions outside the answer.

    Attributes:
        encoded: `(N, L, H)` of all N rows, padded to the longest. ended: `(N, L)` bool. margin: `(N, L)`.
        gate_logit: `(N,)`. state: the router's before the first position, N rows. tokens: how many were not ended.
    """

    def __init__(self, passes: list[RouterPass], ended: list[torch.Tensor]):
        longest = max(e.shape[1] for e in ended)
        self.encoded = torch.cat([pad_to(p.encoded.transpose(1, 2), longest, 0.0) for p in passes]).transpose(1, 2)
        self.margin = torch.cat([pad_to(p.margin, longest, 0.0) for p in passes])
        self.ended = torch.cat([pad_to(e, longest, True) for e in ended])
        self.gate_logit = torch.cat([p.gate_logit for p in passes])
        names = [f.name for f in fields(RouterState) if f.name != "position"]
        self.state = RouterState(**{name: torch.cat([getattr(p.state, name) for p in passes]) for name in names})
        self.tokens = int((~self.ended).sum())

    def choices(
        self, model: nn.Module, threshold: float, gate_threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices and gaps, both `(N, L)` long, at these thresholds."""
        allowed = None if gate_threshold is None else self.gate_logit > gate_threshold
        return unroll(model, self.encoded, self.state, threshold, self.ended, allowed)

    def share(self, model: nn.Module, threshold: float, gate_threshold: float | None = None) -> float:
        """Share of all answer tokens that goes to ET5."""
        expert, _ = self.choices(model, threshold, gate_threshold)
        return float((expert == 1).sum()) / max(1, self.tokens)

    def threshold_for(
        self, model: nn.Module, share: float, gate_threshold: float | None = None, rounds: int = 20
    ) -> float:
        """The threshold that sends `share` of the tokens to ET5, by bisection; the lowest one where none can."""
        margins = self.margin[~self.ended]
        spread = float(margins.max() - margins.min()) + 1.0
        low, high = float(margins.min()) - spread, float(margins.max()) + spread
        for _ in range(rounds):
            middle = (low + high) / 2
            if self.share(model, middle, gate_threshold) > share:
                low = middle
            else:
                high = middle
        return high


def pad_to(values: torch.Tensor, length: int, filler: float | bool) -> torch.Tensor:
    """`values` `(..., T)` with `filler` up to `(..., length)`."""
    return nn.functional.pad(values, (0, length - values.shape[-1]), value=filler)


@torch.no_grad()
def unroll_gold(model: nn.Module, rows: Dataset, collator: Collator, batch_size: int) -> tuple[Unrolled, torch.Tensor]:
    """The router over the gold answers of N rows with utilities; and ET5's benefit in nats, `(N, L)`."""
    device = next(model.parameters()).device
    passes, ended, deltas = [], [], []
    for batch in batches(rows, collator, batch_size, device):
        padding = batch["labels"] == -100
        decoder_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        passes.append(
            run_router(
                model, batch["input_ids"], batch["attention_mask"], decoder_ids, model.config.router_threshold, padding
            )
        )
        ended.append(padding)
        deltas.append(batch["log_p_et5"] - batch["log_p_emamba"])
    unrolled = Unrolled(passes, ended)
    return unrolled, torch.cat([pad_to(delta, unrolled.ended.shape[1], 0.0) for delta in deltas])


@torch.no_grad()
def unroll_generated(
    model: nn.Module, rows: Dataset, collator: Collator, batch_size: int, max_new_tokens: int | None = None
) -> tuple[Unrolled, dict[str, float]]:
    """
    Generate greedy answers as the configuration routes, without the hard cap, and unroll the router over them.

    Returns:
        the passes; and what was really run: `share`, and per answer `passes`, `et5_tokens`, `encoder_calls`.
    """
    device = next(model.parameters()).device
    passes, ended, total = [], [], dict.fromkeys(("routed", "passes", "et5_tokens", "encoder_calls"), 0)
    for batch in batches(rows, collator, batch_size, device):
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        result = model.generate(
            **source,
            routing="auto",
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens or model.config.max_target_length,
            return_dict_in_generate=True,
        )
        trace = result.route_trace
        done = trace.expert == -1
        decoder_ids = result.sequences[:, :-1]
        passes.append(run_router(model, *source.values(), decoder_ids, model.config.router_threshold, done))
        ended.append(done)
        total["routed"] += int((trace.expert == 1).sum())
        total["passes"] += int(trace.et5_passes.sum())
        total["et5_tokens"] += int(trace.et5_tokens.sum())
        total["encoder_calls"] += int(trace.encoder_calls.sum())
    unrolled = Unrolled(passes, ended)
    share = total.pop("routed") / max(1, unrolled.tokens)
    return unrolled, {"share": share, **{name: value / len(rows) for name, value in total.items()}}


def batches(
    rows: Dataset, collator: Collator, batch_size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `rows` on `device`."""
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def without_cap(model: nn.Module) -> Iterator[None]:
    """Within this, a request's tokens are not capped: the threshold alone decides."""
    budget, model.config.expert_budget = model.config.expert_budget, 1.0
    try:
        yield
    finally:
        model.config.expert_budget = budget


def choose_gate(
    model: nn.Module,
    gold: Unrolled,
    delta: torch.Tensor,
    share: float,
    costs: CallCosts,
    least_gain: float = 0.9,
) -> tuple[float | None, list[dict[str, float]]]:
    """
    The gate threshold with the best gain per cost, always at the same share of tokens.

    A closed gate saves the encoder's run and the catching up; the calls go to the sequences that are left. The choice
    is `None`, an open gate, where no threshold is 2 % better than that and keeps `least_gain` of the gain.

    Returns:
        the threshold, and each candidate's `gate_threshold`, `open` (share of sequences), `gain` (nats a token won
        over EMamba alone) and `cost` (units of an ordinary call a token).
    """
    candidates = [None, *(float(gold.gate_logit.quantile(q)) for q in GATE_QUANTILES)]
    table = []
    for gate in candidates:
        expert, gap = gold.choices(model, gold.threshold_for(model, share, gate), gate)
        gain, cost = float(delta[expert == 1].sum()), float(costs.of_sequence(expert, gap).sum())
        is_open = 1.0 if gate is None else float((gold.gate_logit > gate).float().mean())
        table.append({"gate_threshold": gate, "open": is_open, "gain": gain / gold.tokens, "cost": cost / gold.tokens})
    always = table[0]
    worth = [
        row for row in table if row["cost"] > 0 and row["gain"] >= least_gain * always["gain"] and row["gain"] > 0
    ]
    if always["cost"] <= 0 or not worth:
        return None, table
    best = max(worth, key=lambda row: row["gain"] / row["cost"])
    better = best["gain"] / best["cost"] > 1.02 * always["gain"] / always["cost"]
    return (best["gate_threshold"] if better else None), table


def calibrate(
    model: nn.Module,
    rows: Dataset,
    collator: Collator,
    share: float | None = None,
    batch_size: int = 32,
    rounds: int = 4,
    gate: bool = True,
    max_new_tokens: int | None = None,
) -> dict:
    """
    Set the model's `router_threshold`, `threshold_table`, `gate_threshold` and `expert_budget` in its configuration.

    Args:
        rows: validation rows of `data.tokenize_qa`, which no stage has trained on.
        share: target share of ET5's tokens, default the configuration's `expert_budget`.
        rounds: at most so many generations; the one nearest to the share counts.
        gate: also calibrate the sequence gate, which needs a cost table and runs both experts on the gold answers.

    Returns:
        what was measured, as plain values: that generation's share and costs, thresholds, the gate's candidates,
        and on the gold answers `oracle_gain` and `router_gain`, nats a token won over EMamba alone at this share.
    """
    config = model.config
    share = config.expert_budget if share is None else share
    was_training = model.training
    model.eval()
    report: dict = {"target_share": share, "questions": len(rows)}
    config.gate_threshold = None
    if gate and config.cost_table:
        gold, delta = unroll_gold(model, add_utilities(model, rows, collator, batch_size), collator, batch_size)
        costs = CallCosts.from_table(config.cost_table, share, gold.tokens / len(rows))
        config.gate_threshold, report["gate_candidates"] = choose_gate(model, gold, delta, share, costs)
        config.router_threshold = gold.threshold_for(model, share, config.gate_threshold)
        expert, _ = gold.choices(model, config.router_threshold, config.gate_threshold)
        report["oracle_gain"], report["router_gain"] = oracle_gain(delta[~gold.ended], expert[~gold.ended])
    best = None
    with without_cap(model):
        for number in range(max(1, rounds)):
            threshold = config.router_threshold
            unrolled, measured = unroll_generated(model, rows, collator, batch_size, max_new_tokens)
            miss = abs(measured["share"] - share)
            if best is None or miss < best[0]:
                best = (miss, threshold, unrolled, measured)
            report["rounds"] = number + 1
            if miss <= 0.1 * share:
                break
            found = unrolled.threshold_for(model, share, config.gate_threshold)
            # Another threshold writes another text; from the second round on half the way keeps it from swinging.
            config.router_threshold = found if number == 0 else (found + threshold) / 2
    _, config.router_threshold, unrolled, measured = best
    table = {share: config.router_threshold}
    for other in set(SHARES) - {share}:
        found = unrolled.threshold_for(model, other, config.gate_threshold)
        table[other] = (max if other < share else min)(found, config.router_threshold)
    config.threshold_table = descending(table)
    config.expert_budget = share
    model.train(was_training)
    return {
        **report,
        **measured,
        "tokens": unrolled.tokens,
        "router_threshold": config.router_threshold,
        "gate_threshold": config.gate_threshold,
        "threshold_table": config.threshold_table,
    }


def descending(table: dict[float, float]) -> list[list[float]]:
    """`[share, threshold]` pairs, ascending in the share, made non-increasing in the threshold."""
    pairs, lowest = [], float("inf")
    for share, threshold in sorted(table.items()):
        lowest = min(lowest, threshold)
        pairs.append([share, lowest])
    return pairs
