# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Policies compared on the gold answers, in nats a token: cheap, exact, and at any budget.

Thresholds come from validation questions, and once more from the split's own margins, so that all policies spend the
same there. A policy's gain is set against that of an oracle which knows the gold tokens and asks ET5 for as many of
them (Duo-LLM's oracle, arXiv 2410.10846).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..modeling_mambaformer.router import TokenRouter
from .calibration import choose_gate
from .evaluation_gold import GoldPass, informed_scores, margins_at, mixture_log_p, policy_log_p
from .evaluation_policies import RULES_BY_TOKEN, SequenceRule, routed_by, sequence_rules, threshold_for_cost
from .evaluation_statistics import PairedBootstrap, auroc, average_precision, reliability
from .utility import CallCosts, gaps_of, price_for_share, threshold_for_share


@dataclass(frozen=True)
class Rule:
    """
    A policy as calibrated on validation for one budget.

    Attributes:
        policy: its name in the tables. budget: share of tokens. matched: what it was made equal in: `share` or `cost`
            on validation, `split_share` or `split_cost` on the very questions, for which no answer is needed.
        router: the name of the router that it runs, or `None`. sequence: a rule by sequence, or `None`.
    """

    policy: str
    budget: float
    matched: str
    router: str | None = None
    threshold: float = 0.0
    gate_threshold: float | None = None
    sequence: SequenceRule | None = None


def calibrate_gates(model: nn.Module, gold: GoldPass, relative: dict[float, CallCosts]) -> dict[float, float | None]:
    """
    The sequence gate's threshold by budget, chosen as `calibration.choose_gate` does; all `None` where the model's
    own gate is always open.

    Args:
        relative: costs by budget, normalised to an ordinary call.
    """
    if model.config.gate_threshold is None:
        return dict.fromkeys(relative)
    own = gold.unrolled["router"]
    delta = gold.delta.to(own.margin.device)
    return {budget: choose_gate(model, own, delta, budget, costs)[0] for budget, costs in relative.items()}


@torch.no_grad()
def calibrate_rules(
    model: nn.Module,
    gold: GoldPass,
    routers: dict[str, TokenRouter],
    gates: dict[float, float | None],
    main_budget: float,
    costs: CallCosts,
    known: list[Rule] | None = None,
) -> list[Rule]:
    """
    Every policy at every budget of `gates`; at the main one also every rule at MambaFormer's cost.

    On validation questions all is chosen. On other questions, given what is `known` from validation, only thresholds
    are set anew, for which no answer is needed: so that all policies spend exactly the same there.

    Args:
        gates: the sequence gate's threshold by budget. costs: in milliseconds.
    """
    rules: list[Rule] = []
    on = "" if known is None else "split_"
    share, cost = on + "share", on + "cost"
    features = {(rule.budget, on + rule.matched): rule.sequence for rule in known or [] if rule.sequence}
    own = gold.unrolled["router"]
    tokens = gold.tokens.astype(float)
    whole = costs.encoder + tokens * (costs.once + costs.token)
    for budget, gate in gates.items():
        threshold = own.threshold_for(model, budget, gate)
        rules.append(Rule("mambaformer", budget, share, "router", threshold, gate))
        rules.append(Rule("router", budget, share, "router", own.threshold_for(model, budget)))
        for name in RULES_BY_TOKEN:
            unrolled = gold.unrolled[name]
            threshold_by_share = threshold_for_share(unrolled.margin[~unrolled.ended], budget)
            rules.append(Rule(name, budget, share, name, threshold_by_share))
        best = best_sequence_rule(gold, tokens, budget * tokens.mean(), features.get((budget, share)))
        rules.append(Rule("sequence", budget, share, sequence=best))
        if budget == main_budget:
            expert, gap = own.choices(model, threshold, gate)
            spent = float(costs.of_sequence(expert, gap).mean())
            for name in RULES_BY_TOKEN:
                with routed_by(model, routers[name]):
                    by_cost = threshold_for_cost(model, gold.unrolled[name], costs, spent)
                rules.append(Rule(name, budget, cost, name, by_cost))
            best = best_sequence_rule(gold, whole, spent, features.get((budget, cost)))
            rules.append(Rule("sequence", budget, cost, sequence=best))
    return rules


def best_sequence_rule(
    gold: GoldPass, cost: np.ndarray, budget: float, like: SequenceRule | None = None
) -> SequenceRule:
    """The rule by sequence that wins most on these questions for `budget`, or that by the same feature as `like`."""
    rules = sequence_rules(gold.source, cost, budget)
    if like is not None:
        return next(rule for rule in rules if (rule.feature, rule.sign) == (like.feature, like.sign))
    gain = gold.delta.sum(1).numpy()
    return max(rules, key=lambda rule: gain[rule.chosen(gold.source)].sum())


@torch.no_grad()
def choices_by(
    model: nn.Module, gold: GoldPass, routers: dict[str, TokenRouter], rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rule` chooses on other questions: experts and gaps, `(N, L)` long, on the CPU; -1 where ended."""
    if rule.sequence is not None:
        chosen = torch.from_numpy(rule.sequence.chosen(gold.source)).long()
        expert = chosen[:, None].expand(gold.ended.shape).masked_fill(gold.ended, -1)
        return expert, gaps_of(expert)
    with routed_by(model, routers[rule.router]):
        expert, gap = gold.unrolled[rule.router].choices(model, rule.threshold, rule.gate_threshold)
    return expert.cpu(), gap.cpu()


def best_tokens(delta: torch.Tensor, ended: torch.Tensor, count: int) -> torch.Tensor:
    """The oracle's choice of `count` tokens by Delta `(N, L)`: 1 there, 0 elsewhere, -1 where `ended`."""
    choice = torch.zeros(delta.numel(), dtype=torch.long)
    choice[delta.masked_fill(ended, float("-inf")).flatten().topk(count).indices] = 1
    return choice.view_as(delta).masked_fill(ended, -1)


def switches(expert: torch.Tensor) -> torch.Tensor:
    """How often each answer changes between the experts, `(N,)` long, from choices `(N, L)`, -1 where ended."""
    changed = (expert[:, 1:] != expert[:, :-1]) & (expert[:, 1:] >= 0)  # (N, L - 1)
    return changed.sum(1)


@torch.no_grad()
def compare_likelihoods(
    model: nn.Module,
    validation: GoldPass,
    gold: GoldPass,
    routers: dict[str, TokenRouter],
    rules: list[Rule],
    main_budget: float,
    costs: CallCosts,
    bootstrap: PairedBootstrap,
) -> tuple[dict, dict[str, np.ndarray]]:
    """
    All policies on the gold answers of one split, with validation's thresholds and with the split's own.

    Returns:
        `experts` (nats a token and perplexity of each), `policies` (one row a rule), `differences` of the gain at the
        main budget, MambaFormer and its router less the others, with intervals; and arrays by name, one value a
        question.
    """
    tokens = gold.tokens.astype(float)
    experts, arrays = expert_likelihoods(model, gold, bootstrap)
    gates = {rule.budget: rule.gate_threshold for rule in rules if rule.policy == "mambaformer"}
    rules = rules + calibrate_rules(model, gold, routers, gates, main_budget, costs, rules)
    chosen = [(rule, *choices_by(model, gold, routers, rule)) for rule in rules]
    seen, seen_here = informed_scores(validation, gold)
    for budget in gates:
        for matched, scores, ended in (("share", seen, validation.ended), ("split_share", seen_here, gold.ended)):
            picked = (seen_here > threshold_for_share(scores[~ended], budget)).long().masked_fill(gold.ended, -1)
            chosen.append((Rule("informed", budget, matched), picked, gaps_of(picked)))
        picked = best_tokens(gold.delta, gold.ended, round(budget * int(tokens.sum())))
        chosen.append((Rule("oracle", budget, "split_share"), picked, gaps_of(picked)))

    table, gains = [], {}
    for rule, expert, gap in chosen:
        log_p = policy_log_p(model, gold, rule.router or rule.policy, expert)
        gain = (log_p - gold.log_p["emamba"]).masked_fill(gold.ended, 0.0).sum(1).numpy()
        routed = int((expert == 1).sum())
        best = (gold.delta * (best_tokens(gold.delta, gold.ended, routed) == 1)).sum(1).numpy()
        gains[rule.policy, rule.budget, rule.matched] = gain
        arrays[f"gain/{rule.policy}/{rule.budget:g}/{rule.matched}"] = gain
        arrays[f"oracle_gain/{rule.policy}/{rule.budget:g}/{rule.matched}"] = best
        row = {
            "policy": rule.policy,
            "budget": rule.budget,
            "matched": rule.matched,
            "share": routed / tokens.sum(),
            "called": float((expert == 1).any(1).float().mean()),
            "switches": float(switches(expert).float().mean()),
            "cost_ms": float(costs.of_sequence(expert, gap).mean()),
            "gain": bootstrap.ratio(gain, tokens),
            "captured": bootstrap.ratio(gain, best),
            "perplexity": float(np.exp((arrays["nats/emamba"].sum() - gain.sum()) / tokens.sum())),
        }
        if rule.sequence is not None:
            row["feature"] = ("+" if rule.sequence.sign > 0 else "-") + rule.sequence.feature
        table.append(row)

    differences: dict[str, dict] = {"mambaformer": {}, "router": {}}
    for (policy, budget, matched), gain in gains.items():
        if budget == main_budget and policy in (*RULES_BY_TOKEN, "sequence"):
            equal = "split_share" if matched.startswith("split_") else "share"
            for own, apart in differences.items():
                apart[f"{policy}/{matched}"] = bootstrap.ratio(gains[own, budget, equal] - gain, tokens)
    return {"experts": experts, "policies": table, "differences": differences}, arrays


def expert_likelihoods(
    model: nn.Module, gold: GoldPass, bootstrap: PairedBootstrap
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Nats a token and perplexity of both experts and their mixtures; and each question's tokens and nats."""
    tokens = gold.tokens.astype(float)
    arrays: dict[str, np.ndarray] = {"tokens": tokens}
    experts = {}
    columns = {
        "emamba": gold.log_p["emamba"],
        "et5": gold.log_p["et5"],
        "soft": mixture_log_p(model, gold, soft_choices(model, gold)),
        "even_mixture": torch.logaddexp(gold.log_p["et5"], gold.log_p["emamba"]) - np.log(2.0),
    }
    for name, log_p in columns.items():
        nats = -log_p.masked_fill(gold.ended, 0.0).sum(1).numpy()
        arrays[f"nats/{name}"] = nats
        experts[name] = {"nats": bootstrap.ratio(nats, tokens), "perplexity": float(np.exp(nats.sum() / tokens.sum()))}
    return experts, arrays


@torch.no_grad()
def soft_choices(model: nn.Module, gold: GoldPass) -> torch.Tensor:
    """The past that the router has under `routing="soft"`: its own choices by the configuration."""
    expert, _ = gold.unrolled["router"].choices(model, model.config.router_threshold, model.config.gate_threshold)
    return expert


@torch.no_grad()
def router_quality(model: nn.Module, validation: GoldPass, gold: GoldPass, budget: float, relative: CallCosts) -> dict:
    """
    The router as a classifier of gold tokens: does ET5 do better there, and better by more than its price?

    Returns:
        `price` in nats (at which an oracle on validation spends `budget`); for `better` (Delta > 0) and `worth`
        (Delta > price): `rate`, `auroc`, `average_precision` of the margin, and the reliability of its sigmoid.
    """
    known = ~gold.ended
    margin = margins_at(model, gold.unrolled["router"], soft_choices(model, gold)).cpu()[known].numpy()
    delta = gold.delta[known].numpy()
    price = price_for_share(validation.delta, ~validation.ended, budget, relative)
    probability = 1 / (1 + np.exp(-np.clip(margin, -50, 50).astype(float)))
    result: dict = {"price": price}
    for name, happened in (("better", delta > 0), ("worth", delta > price)):
        result[name] = {
            "rate": float(happened.mean()),
            "auroc": auroc(margin, happened),
            "average_precision": average_precision(margin, happened),
            **reliability(probability, happened.astype(float)),
        }
    return result
