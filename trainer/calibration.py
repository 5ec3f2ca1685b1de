# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
After training: the threshold that gives the budget on answers the model itself writes, and the sequence gate.

A router sees its own past, so a threshold changes the margins it is compared with. The threshold is therefore found by
unrolling the router over the generated text until the share is right, and the text is generated again with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import nn

from .data import Collator
from .distillation import add_utilities
from .router_pass import RouterPass, run_router, unroll
from .utility import CallCosts

SHARES = (0.005, 0.01, 0.02, 0.038, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
GATE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Unrolled:
    """
    Router passes over a data set, in batches, to ask for shares at any threshold without running an expert again.

    Args:
        passes: one a batch. ended: `(B, T)` bool of each, positions that are not part of an answer.
    """

    def __init__(self, passes: list[RouterPass], ended: list[torch.Tensor]):
        self.passes, self.ended = passes, ended
        self.tokens = int(sum((~e).sum() for e in ended))

    def choices(
        self, model: nn.Module, threshold: float, gate_threshold: float | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Choices and gaps `(B, T)` of each batch at these thresholds."""
        return [
            unroll(
                model,
                p.encoded,
                p.state,
                threshold,
                e,
                None if gate_threshold is None else p.gate_logit > gate_threshold,
            )
            for p, e in zip(self.passes, self.ended, strict=True)
        ]

    def share(self, model: nn.Module, threshold: float, gate_threshold: float | None = None) -> float:
        """Share of all answer tokens that goes to ET5."""
        routed = sum((expert == 1).sum() for expert, _ in self.choices(model, threshold, gate_threshold))
        return float(routed) / max(1, self.tokens)

    def threshold_for(
        self, model: nn.Module, share: float, gate_threshold: float | None = None, rounds: int = 30
    ) -> float:
        """The threshold that sends `share` of the tokens to ET5, by bisection; the lowest one where none can."""
        margins = torch.cat([p.margin[~e] for p, e in zip(self.passes, self.ended, strict=True)])
        spread = float(margins.max() - margins.min()) + 1.0
        low, high = float(margins.min()) - spread, float(margins.max()) + spread
        for _ in range(rounds):
            middle = (low + high) / 2
            if self.share(model, middle, gate_threshold) > share:
                low = middle
            else:
                high = middle
        return high


@torch.no_grad()
def unroll_gold(
    model: nn.Module, rows: Dataset, collator: Collator, batch_size: int
) -> tuple[Unrolled, list[torch.Tensor]]:
    """The router over the gold answers of rows with utilities; and ET5's benefit in nats `(B, T)` in each batch."""
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
    return Unrolled(passes, ended), deltas


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
    deltas: list[torch.Tensor],
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
    logits = torch.cat([p.gate_logit for p in gold.passes])
    candidates = [None, *(float(logits.quantile(q)) for q in GATE_QUANTILES)]
    table = []
    for gate in candidates:
        threshold = gold.threshold_for(model, share, gate)
        gain = cost = 0.0
        for (expert, gap), delta in zip(gold.choices(model, threshold, gate), deltas, strict=True):
            gain += float(delta[expert == 1].sum())
            cost += float(costs.of_sequence(expert, gap).sum())
        is_open = 1.0 if gate is None else float((logits > gate).float().mean())
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
    rounds: int = 3,
    gate: bool = True,
    max_new_tokens: int | None = None,
) -> dict:
    """
    Set the model's `router_threshold`, `threshold_table`, `gate_threshold` and `expert_budget` in its configuration.

    Args:
        rows: validation rows of `data.tokenize_qa`, which no stage has trained on.
        share: target share of ET5's tokens, default the configuration's `expert_budget`.
        rounds: at most so many generations; the last one measures.
        gate: also calibrate the sequence gate, which needs a cost table and runs both experts on the gold answers.

    Returns:
        what was measured, as plain values: the last generation's share and costs, thresholds, the gate's candidates.
    """
    config = model.config
    share = config.expert_budget if share is None else share
    was_training = model.training
    model.eval()
    report: dict = {"target_share": share, "questions": len(rows)}
    config.gate_threshold = None
    if gate and config.cost_table:
        gold, deltas = unroll_gold(model, add_utilities(model, rows, collator, batch_size), collator, batch_size)
        costs = CallCosts.from_table(config.cost_table, share, gold.tokens / len(rows))
        config.gate_threshold, report["gate_candidates"] = choose_gate(model, gold, deltas, share, costs)
        config.router_threshold = gold.threshold_for(model, share, config.gate_threshold)
    with without_cap(model):
        for number in range(max(1, rounds)):
            unrolled, measured = unroll_generated(model, rows, collator, batch_size, max_new_tokens)
            report["rounds"] = number + 1
            if abs(measured["share"] - share) <= 0.1 * share or number + 1 == rounds:
                break
            config.router_threshold = unrolled.threshold_for(model, share, config.gate_threshold)
    table = {s: unrolled.threshold_for(model, s, config.gate_threshold) for s in SHARES}
    table[share] = config.router_threshold
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
