# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Answers written by each policy, what ET5 did for them, and how long one answer takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerBase

from ..modeling_mambaformer.outputs_mambaformer import ENDED, ET5
from ..modeling_mambaformer.router import TokenRouter
from .calibration import Unrolled, pad_to
from .data import Collator
from .evaluation_gold import GoldPass
from .evaluation_likelihood import best_sequence_rule
from .evaluation_policies import SequenceRule, routed_by, threshold_for_cost
from .router_pass import run_router
from .utility import CallCosts


@dataclass
class Policy:
    """
    How answers are written.

    Attributes:
        name, label: in files, and in tables. routing: of `generate`; `auto` runs `router` (`None`: as the model comes,
            with its own thresholds and its cap) at `threshold` and `gate_threshold`, without a cap.
        sequence: gives whole answers to one expert, by features of the source.
        plain: a T5 that answers in the model's stead, through transformers' own `generate`.
    """

    name: str
    label: str
    routing: str = "auto"
    router: TokenRouter | None = None
    threshold: float | None = None
    gate_threshold: float | None = None
    sequence: SequenceRule | None = None
    plain: nn.Module | None = None


@dataclass
class Answers:
    """
    n answers of one policy.

    Attributes:
        texts, ids, experts: one an answer; ids and experts (1: ET5, -1: neither) without what follows the end.
        counts: by `tokens`, `et5` (written by ET5), `passes`, `caught_up` (positions that ET5 computed), and
            `encoder_calls`, `(n,)` float each; NaN where there is no ET5.
    """

    texts: list[str] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def cost(self, costs: CallCosts) -> np.ndarray:
        """What ET5 costs in each answer, `(n,)`, in the unit of `costs`."""
        counts = self.counts
        calls = costs.once * counts["passes"] + costs.token * counts["caught_up"]
        return calls + costs.encoder * counts["encoder_calls"]


COUNTS = ("tokens", "et5", "passes", "caught_up", "encoder_calls")
PLAIN = "plain_t5"
"""Name of the policy by which a plain T5 answers."""
NEITHER = -1


@torch.no_grad()
def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    policy: Policy,
    batch_size: int,
    features: dict[str, np.ndarray] | None = None,
    max_new_tokens: int | None = None,
) -> Answers:
    """
    Greedy answers to `rows` in batches of about equal source length; a row's answer does not depend on its batch.

    Args:
        features: of the sources, for a rule by sequence. max_new_tokens: default the configuration's longest answer.
    """
    if policy.sequence is not None:
        given = policy.sequence.chosen(features)
        parts = [(np.flatnonzero(given), "et5"), (np.flatnonzero(~given), "emamba")]
    else:
        parts = [(np.arange(len(rows)), policy.routing)]
    found: list[tuple] = [()] * len(rows)
    collator = Collator(tokenizer)
    sizes = [len(ids) for ids in rows["input_ids"]]
    with settings(model, policy):
        for members, routing in parts:
            order = sorted(members.tolist(), key=sizes.__getitem__)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = collator([rows[i] for i in chosen])
                for row, answer in zip(chosen, ask(model, policy, batch, routing, max_new_tokens), strict=True):
                    found[row] = answer
    ids, experts, counts = zip(*found, strict=True)
    texts = [text.strip() for text in tokenizer.batch_decode([x.tolist() for x in ids], skip_special_tokens=True)]
    return Answers(texts, list(ids), list(experts), dict(zip(COUNTS, np.array(counts, float).T, strict=True)))


def settings(model: nn.Module, policy: Policy):
    """The context within which the model routes as `policy` says."""
    if policy.router is None:
        return nullcontext()
    return routed_by(model, policy.router, policy.threshold, policy.gate_threshold)


def ask(
    model: nn.Module, policy: Policy, batch: dict[str, torch.Tensor], routing: str, max_new_tokens: int | None
) -> list[tuple]:
    """One batch: for each row its ids, its experts, and the numbers of `COUNTS`."""
    longest = max_new_tokens or model.config.max_target_length
    if policy.plain is None:
        return generate(model, batch, routing, longest)
    nothing = [float("nan")] * (len(COUNTS) - 1)
    return [(ids, np.full(len(ids), NEITHER), [len(ids), *nothing]) for ids in ask_plain(policy.plain, batch, longest)]


def ask_plain(plain: nn.Module, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[np.ndarray]:
    """
    Greedy answers of an encoder-decoder of transformers to one batch, with its cache of keys and values.

    Returns:
        for each row its ids, `(T,)` int64, without the start, up to the end-of-sequence token.
    """
    device = next(plain.parameters()).device
    output = plain.generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,  # a trained checkpoint's configuration may say no
        # transformers makes as many layers as the encoder has; these grow with the decoder's.
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )
    ids = output[:, 1:].cpu()  # (B, T)
    end = torch.tensor(plain.generation_config.eos_token_id).flatten()
    before = torch.isin(ids, end).cumsum(1) - torch.isin(ids, end).long()  # ends before each position
    return [row[passed == 0].numpy() for row, passed in zip(ids, before, strict=True)]


def generate(model: nn.Module, batch: dict[str, torch.Tensor], routing: str, max_new_tokens: int) -> list[tuple]:
    """What `ask` returns, by the model itself."""
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        routing=routing,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    trace = output.route_trace
    spoken, by_et5 = trace.expert != ENDED, trace.expert == ET5  # (B, T), (B, T)
    tokens = spoken.sum(1)
    # A batch may compute a position twice, since its rows reach different ones; alone a row computes its gaps.
    caught_up = trace.et5_tokens if routing == "soft" else (trace.gap * by_et5).sum(1)
    counts = torch.stack([tokens, by_et5.sum(1), trace.et5_passes, caught_up, trace.encoder_calls], dim=1)
    ids = output.sequences[:, -trace.expert.shape[1] :]
    return [
        (ids[i, : tokens[i]].cpu().numpy(), trace.expert[i, : tokens[i]].cpu().numpy(), counts[i].tolist())
        for i in range(len(ids))
    ]


def time_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    policies: list[Policy],
    features: dict[str, np.ndarray],
    max_new_tokens: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """
    Seconds and tokens of each answer, one question at a time. The policies take turns at each question, so that
    whatever else the machine does meets them all; the first question is answered once before, uncounted.
    """
    collator = Collator(tokenizer)
    times: dict[str, dict[str, list]] = {p.name: {"seconds": [], "tokens": []} for p in policies}
    for turn, number in enumerate((0, *range(len(rows)))):
        batch = collator([rows[number]])
        first = number % len(policies)
        for policy in policies[first:] + policies[:first]:
            routing = policy.routing
            if policy.sequence is not None:
                own = {name: values[number : number + 1] for name, values in features.items()}
                routing = "et5" if policy.sequence.chosen(own)[0] else "emamba"
            with torch.no_grad(), settings(model, policy):
                start = time.perf_counter()
                ((ids, *_),) = ask(model, policy, batch, routing, max_new_tokens)
                seconds = time.perf_counter() - start
            if turn:
                times[policy.name]["seconds"].append(seconds)
                times[policy.name]["tokens"].append(len(ids))
    return {name: {key: np.array(values) for key, values in record.items()} for name, record in times.items()}


@torch.no_grad()
def unroll_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    answers: Answers,
    router: TokenRouter,
    size: int,
) -> Unrolled:
    """The pass of `router` over answers that were written, to ask for shares and costs at other thresholds."""
    collator = Collator(tokenizer)
    device = next(model.parameters()).device
    passes, ended = [], []
    with routed_by(model, router):
        for start in range(0, len(rows), size):
            part = range(start, min(start + size, len(rows)))
            batch = collator([rows[i] for i in part])
            longest = max(len(answers.ids[i]) for i in part)
            labels = torch.stack([pad_to(torch.from_numpy(answers.ids[i]), longest, -100) for i in part]).to(device)
            decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
            source = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            passes.append(run_router(model, *source, decoder_ids, model.config.router_threshold, labels == -100))
            ended.append(labels == -100)
    return Unrolled(passes, ended)


@dataclass
class Calibrator:
    """
    Sets policies' thresholds for generation, on the answers written to some questions.

    Attributes:
        rows: these questions, tokenised, and their `gold` pass. routers: of `rule_routers`.
        costs: in milliseconds. gates: the sequence gate's threshold by budget.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    gold: GoldPass
    routers: dict[str, TokenRouter]
    costs: CallCosts
    gates: dict[float, float | None]
    batch_size: int

    def write(self, policy: Policy) -> Answers:
        """Answers of `policy` to these questions."""
        return write_answers(self.model, self.tokenizer, self.rows, policy, self.batch_size, self.gold.source)

    def unroll(self, answers: Answers, name: str) -> Unrolled:
        """The pass of the router `name` over `answers`."""
        arguments = self.model, self.tokenizer, self.rows, answers, self.routers[name], self.batch_size
        return unroll_answers(*arguments)

    def policies(self, budgets: list[float], main: float, wanted: set[str]) -> tuple[list[Policy], SequenceRule]:
        """
        The policies that are calibrated to a share of the tokens, of those `wanted` by name, and the best rule by
        sequence for what the model spends here. `main` is the share of the rules.
        """
        shipped = Policy("mambaformer", "MambaFormer, as it comes")
        chosen = [Policy("emamba", "EMamba alone", "emamba"), Policy("et5", "ET5 alone", "et5"), shipped]
        answers = self.write(shipped)
        for budget in budgets if "budgets" in wanted else ():
            gate = self.gates[budget]
            threshold = self.threshold(answers, "router", partial(self.for_share, budget, gate), gate)
            label = f"MambaFormer at {100 * budget:g} %, no cap"
            name = f"mambaformer_{100 * budget:g}"
            chosen.append(Policy(name, label, "auto", self.routers["router"], threshold, gate))
        if "confidence" in wanted:
            threshold = self.threshold(answers, "confidence", partial(self.for_share, main, None))
            label = f"confidence rule, {100 * main:g} % of tokens"
            chosen.append(Policy("confidence", label, "auto", self.routers["confidence"], threshold))
        if "soft" in wanted:
            chosen.append(Policy("soft", "soft mixture of both", "soft"))
        return chosen, best_sequence_rule(self.gold, self.whole_cost(answers), self.spent(answers))

    def equal_cost(self, answers: Answers, wanted: set[str], like: SequenceRule) -> list[Policy]:
        """
        The rules, set so that ET5 costs in them what it costs in `answers`, the model's own to these questions. No
        reference is needed for it.

        Args:
            like: the rule by sequence whose feature is used.
        """
        spent = self.spent(answers)
        chosen = []
        for name, label in (("confidence", "confidence rule, equal cost"), ("random", "random, equal cost")):
            if name in wanted:
                threshold = self.threshold(answers, name, partial(self.for_cost, spent))
                chosen.append(Policy(f"{name}_cost", label, "auto", self.routers[name], threshold))
        if "sequence" in wanted:
            rule = best_sequence_rule(self.gold, self.whole_cost(answers), spent, like)
            chosen.append(Policy("sequence_cost", "choice by sequence, equal cost", sequence=rule))
        return chosen

    def spent(self, answers: Answers) -> float:
        """Mean milliseconds of ET5 an answer."""
        return float(answers.cost(self.costs).mean())

    def whole_cost(self, answers: Answers) -> np.ndarray:
        """Milliseconds that each answer would cost if ET5 wrote all of it, `(n,)`."""
        return self.costs.encoder + answers.counts["tokens"] * (self.costs.once + self.costs.token)

    def for_share(self, share: float, gate_threshold: float | None, unrolled: Unrolled) -> float:
        """The threshold at which the router in the model's place has this share of the tokens."""
        return unrolled.threshold_for(self.model, share, gate_threshold)

    def for_cost(self, budget: float, unrolled: Unrolled) -> float:
        """The threshold at which the router in the model's place spends `budget` milliseconds an answer."""
        return threshold_for_cost(self.model, unrolled, self.costs, budget)

    def threshold(
        self, answers: Answers, name: str, find: Callable[[Unrolled], float], gate_threshold: float | None = None
    ) -> float:
        """The threshold of the router `name` on the answers that it writes at the threshold found on `answers`."""
        router = self.routers[name]
        with routed_by(self.model, router):
            first = find(self.unroll(answers, name))
        written = self.write(Policy(name, name, "auto", router, first, gate_threshold))
        with routed_by(self.model, router):
            return find(self.unroll(written, name))
