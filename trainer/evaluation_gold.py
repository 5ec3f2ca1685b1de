# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Teacher-forced: what both experts and every router say of each gold token, read once.

From this any policy's log-likelihood at any threshold follows exactly, without running a model again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from ..modeling_mambaformer.merger import complement
from ..modeling_mambaformer.router import TokenRouter, past_of
from .calibration import Unrolled, batches, pad_to
from .data import Collator
from .distillation import gold_log_probability
from .evaluation_policies import routed_by
from .router_pass import RouterPass, inputs_of, judge, read_answers


@dataclass
class GoldPass:
    """
    N questions with answers of at most L tokens, on the CPU.

    Attributes:
        log_p: by `et5`, `emamba` and, where the model merges so, `complement`: log-probabilities in nats of the gold
            tokens, `(N, L)`, 0 where `ended` `(N, L)` bool.
        unrolled: each router's pass, by its name. source: features known before the answer, `(N,)` each.
        informed: `(N, L, F)`, what somebody sees of a position who has both experts' distributions, not the answer.
    """

    log_p: dict[str, torch.Tensor]
    ended: torch.Tensor
    unrolled: dict[str, Unrolled]
    source: dict[str, np.ndarray]
    informed: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        """ET5's benefit in nats, `(N, L)`, 0 where ended."""
        return self.log_p["et5"] - self.log_p["emamba"]

    @property
    def tokens(self) -> np.ndarray:
        """Gold tokens of each answer, `(N,)`."""
        return (~self.ended).sum(1).numpy()


@torch.no_grad()
def gold_pass(
    model: nn.Module, rows: Dataset, collator: Collator, batch_size: int, routers: dict[str, TokenRouter]
) -> GoldPass:
    """
    Run both experts once over the gold answers of `rows`, and each of `routers` in the model's place.

    Args:
        routers: by name; the model's own is `router`.
    """
    device = next(model.parameters()).device
    passes: dict[str, list[RouterPass]] = {name: [] for name in routers}
    log_p: dict[str, list[torch.Tensor]] = {name: [] for name in ("et5", "emamba", "complement")}
    ended, informed, sources = [], [], []
    threshold = model.config.router_threshold
    for batch in batches(rows, collator, batch_size, device):
        labels, padding = batch["labels"], batch["labels"] == -100
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        et5_logits = model(**source, labels=labels, routing="et5", use_cache=False).logits  # (B, T, V)
        decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
        reading = read_answers(model, **source, decoder_input_ids=decoder_ids)
        inputs = inputs_of(model, reading, decoder_ids)
        log_p["et5"].append(gold_log_probability(et5_logits, labels).cpu())
        log_p["emamba"].append(gold_log_probability(reading.logits, labels).cpu())
        if model.config.merger == "complement":
            merged = complement(reading.logits, et5_logits, None, model.config.complement_weight)
            log_p["complement"].append(gold_log_probability(merged, labels).cpu())
        seen = seen_by_both(et5_logits, reading.logits).cpu()
        informed.append(seen)
        ended.append(padding.cpu())
        for name, router in routers.items():
            with routed_by(model, router):
                passes[name].append(judge(model, reading, decoder_ids, threshold, padding, inputs))
        sources.append(
            {
                "gate logit": passes["router"][-1].gate_logit,
                "source length": reading.scalars[0],
                "source domain": reading.scalars[1],
                "first token's entropy": seen[:, 0, 1],
                "first token's confidence": seen[:, 0, 3],
            }
        )
    longest = max(e.shape[1] for e in ended)
    on_device = [e.to(device) for e in ended]
    return GoldPass(
        {name: torch.cat([pad_to(x, longest, 0.0) for x in values]) for name, values in log_p.items() if values},
        torch.cat([pad_to(e, longest, True) for e in ended]),
        {name: Unrolled(said, on_device) for name, said in passes.items()},
        {name: torch.cat([s[name].float().cpu() for s in sources]).numpy() for name in sources[0]},
        torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in informed]),
    )


def seen_by_both(et5_logits: torch.Tensor, emamba_logits: torch.Tensor) -> torch.Tensor:
    """
    Both next-token distributions `(B, T, V)` in ten numbers, `(B, T, 10)`: entropies, largest probabilities, both
    Kullback-Leibler divergences, each expert's log-probability of the other's first choice, agreement, position.
    """
    log_t, log_m = (torch.log_softmax(logits.float(), dim=-1) for logits in (et5_logits, emamba_logits))
    p_t, p_m = log_t.exp(), log_m.exp()
    top_t, top_m = log_t.max(-1), log_m.max(-1)
    columns = [
        -(p_t * log_t).sum(-1),
        -(p_m * log_m).sum(-1),
        top_t.values.exp(),
        top_m.values.exp(),
        (p_t * (log_t - log_m)).sum(-1),
        (p_m * (log_m - log_t)).sum(-1),
        log_m.gather(-1, top_t.indices[..., None]).squeeze(-1),
        log_t.gather(-1, top_m.indices[..., None]).squeeze(-1),
        (top_t.indices == top_m.indices).float(),
        (torch.arange(log_t.shape[1], device=log_t.device) / 32).expand(log_t.shape[:2]),
    ]
    return torch.stack(columns, dim=-1)


def informed_scores(validation: GoldPass, test: GoldPass, clip: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Benefit as a ridge regression on `informed` predicts it, fitted on the validation tokens: `(N, L)` of both. What
    it leaves of the oracle's gain is, as far as such a rule can tell, luck: which token the reference happens to use.
    """
    known = ~validation.ended
    features = validation.informed[known].double()  # (n, F)
    centre, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    design = expanded((features - centre) / spread)
    gram = design.T @ design + 1e-2 * len(design) * torch.eye(design.shape[1], dtype=design.dtype)
    weights = torch.linalg.solve(gram, design.T @ validation.delta[known].double().clamp(-clip, clip))
    scores = [(expanded((g.informed.double() - centre) / spread) @ weights).float() for g in (validation, test)]
    return scores[0], scores[1]


def expanded(features: torch.Tensor) -> torch.Tensor:
    """Features `(..., F)` with all their products and a constant."""
    size = features.shape[-1]
    above = torch.triu_indices(size, size)
    products = (features[..., :, None] * features[..., None, :])[..., above[0], above[1]]
    return torch.cat([features, products.clamp(-25, 25), torch.ones_like(features[..., :1])], dim=-1)


@torch.no_grad()
def policy_log_p(model: nn.Module, gold: GoldPass, name: str, expert: torch.Tensor) -> torch.Tensor:
    """
    Log-probability `(N, L)` of the gold tokens under the choices `expert` `(N, L)` (1: ET5), merged as the model does
    for its own `router`, and by ET5 alone for any other rule.
    """
    merger = model.config.merger if name == "router" else "select"
    if merger == "mix":
        routed = mixture_log_p(model, gold, expert)
    else:
        routed = gold.log_p["complement" if merger == "complement" else "et5"]
    return torch.where(expert.cpu() == 1, routed, gold.log_p["emamba"])


@torch.no_grad()
def mixture_log_p(model: nn.Module, gold: GoldPass, expert: torch.Tensor) -> torch.Tensor:
    """Log-probability `(N, L)` of the gold tokens under the soft mixture, given the router's past choices `expert`."""
    margin = margins_at(model, gold.unrolled["router"], expert).cpu()
    log_t = gold.log_p["et5"] + F.logsigmoid(margin)
    return torch.logaddexp(log_t, gold.log_p["emamba"] + F.logsigmoid(-margin)).masked_fill(gold.ended, 0.0)


@torch.no_grad()
def margins_at(model: nn.Module, unrolled: Unrolled, expert: torch.Tensor) -> torch.Tensor:
    """The router's margins `(N, L)` in nats, its past being the choices `expert` `(N, L)`."""
    previous, gap = past_of(expert.to(unrolled.encoded.device), unrolled.state)
    return model.router.margin(unrolled.encoded, previous, gap).float()
