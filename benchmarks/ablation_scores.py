# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Routers of one pair of experts measured on the same held-out questions, by the functions of the evaluation.

The experts read the gold answers once; each router judges the kept readings, and its figures are paired with those of
the router that lacks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..trainer.bertscore import BertScore
from ..trainer.calibration import Unrolled, batches
from ..trainer.data import Collator
from ..trainer.evaluation_data import Questions
from ..trainer.evaluation_generation import Answers, Calibrator, Policy, write_answers
from ..trainer.evaluation_gold import GoldPass, gold_pass
from ..trainer.evaluation_likelihood import calibrate_gates, calibrate_rules, compare_likelihoods
from ..trainer.evaluation_policies import milliseconds, rule_routers
from ..trainer.evaluation_run import score_each
from ..trainer.evaluation_statistics import Interval, PairedBootstrap
from ..trainer.kept_readings import KeptReadings
from ..trainer.utility import CallCosts
from .ablation_variants import WHOLE, Variant

OPEN, GATED = "router", "mambaformer"
"""The evaluation's names of the router with its gate open, and behind its gate."""
FIGURES = ("share", "called", "switches", "cost_ms")
RULES = ("confidence", "random")


@dataclass
class Held:
    """Some questions, tokenised, and both experts' pass over their gold answers."""

    rows: Dataset
    gold: GoldPass


class Comparison:
    """
    Args:
        model: in evaluation mode, with a cost table; its router and gate are replaced between calls.
        validation: rows of `tokenize_qa` to set gates and thresholds on. splits: to compare on.
        readings: shared with training. seed: of random choices and of the bootstrap.

    Attributes:
        budget: share of the tokens. rules: by split, the share of the oracle's gain that `RULES` capture.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        validation: Dataset,
        splits: list[Questions],
        readings: KeptReadings,
        batch_size: int,
        resamples: int = 2000,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.readings, self.splits, self.seed = readings, splits, seed
        self.budget = model.config.expert_budget
        self.costs = milliseconds(model.config.cost_table)
        self.routers = rule_routers(model.router, seed)
        self.bootstraps = {questions.split: PairedBootstrap(len(questions), resamples, seed) for questions in splits}
        self.validation = self.held(validation)
        self.held_out = {questions.split: self.held(questions.tokens) for questions in splits}
        self.rules: dict[str, dict[str, Interval]] = {}
        self.policies: dict[str, Policy] = {}
        self.answers: dict[str, Answers] = {}
        self._whole: dict[str, dict[str, np.ndarray]] = {}

    def held(self, rows: Dataset) -> Held:
        """Both experts and the rules on the gold answers of `rows`."""
        arguments = self.model, rows, Collator(self.tokenizer), self.batch_size, self.routers
        return Held(rows, gold_pass(*arguments))

    @torch.no_grad()
    def judged(self, held: Held) -> GoldPass:
        """The gold pass with the router and the gate that are in the model now."""
        model, passes, ended = self.model, [], []
        for batch in batches(held.rows, Collator(self.tokenizer), self.batch_size, next(model.parameters()).device):
            padding = batch["labels"] == -100
            decoder_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
            source = batch["input_ids"], batch["attention_mask"]
            passes.append(self.readings.route(model, *source, decoder_ids, model.config.router_threshold, padding))
            ended.append(padding)
        own = Unrolled(passes, ended)
        features = {**held.gold.source, "gate logit": own.gate_logit.float().cpu().numpy()}
        return replace(held.gold, unrolled={**held.gold.unrolled, OPEN: own}, source=features)

    def measure(self, variant: Variant) -> dict[str, dict]:
        """
        The router now in the model on the gold answers of every split, thresholds as `compare_likelihoods` sets them.

        Returns:
            by split and by `OPEN` and `GATED`: share of the oracle's gain (`captured`), `gain` in nats a token, both
            with intervals, `FIGURES`, and where the variant is another than `WHOLE`, `less`: the gain less that of
            `WHOLE`, over the oracle's gain.
        """
        model = self.model
        gold = self.judged(self.validation)
        routers = {**self.routers, OPEN: model.router}
        model.config.gate_threshold = 0.0 if variant.gate else None  # a gate is chosen, or left open
        costs = CallCosts.from_table(model.config.cost_table, self.budget, float(gold.tokens.mean()))
        gates = calibrate_gates(model, gold, {self.budget: costs})
        rules = calibrate_rules(model, gold, routers, gates, None, self.costs)
        own = next(rule for rule in rules if rule.policy == GATED)
        model.config.router_threshold, model.config.gate_threshold = own.threshold, own.gate_threshold
        self.calibrator = Calibrator(
            model, self.tokenizer, self.validation.rows, gold, routers, self.costs, gates, self.batch_size
        )
        found = {}
        for split, held in self.held_out.items():
            bootstrap = self.bootstraps[split]
            here = self.judged(held)
            said, arrays = compare_likelihoods(model, gold, here, routers, rules, None, self.costs, bootstrap)
            by_policy = {row["policy"]: row for row in said["policies"] if row["matched"] == "split_share"}
            self.rules.setdefault(split, {name: by_policy[name]["captured"] for name in RULES})
            if variant.name == WHOLE:
                self._whole[split] = arrays
            found[split] = {
                policy: self.figures(by_policy[policy], arrays, self._whole.get(split), bootstrap)
                for policy in (OPEN, GATED)
            }
        return found

    def figures(
        self,
        row: dict,
        arrays: dict[str, np.ndarray],
        whole: dict[str, np.ndarray] | None,
        bootstrap: PairedBootstrap,
    ) -> dict:
        """What is kept of one row of the likelihood table."""
        kept = {name: row[name] for name in ("captured", "gain", *FIGURES)}
        kept["gate_threshold"] = None if row["policy"] == OPEN else self.model.config.gate_threshold
        if whole is not None and whole is not arrays:
            key = f"{row['policy']}/{row['budget']:g}/split_share"
            apart = arrays[f"gain/{key}"] - whole[f"gain/{key}"]
            kept["less"] = bootstrap.ratio(apart, whole[f"oracle_gain/{key}"])
        return kept

    def write(self, variant: Variant, count: int) -> None:
        """Answers of the router just measured to the first `count` questions of the first split, at the budget."""
        policies, _ = self.calibrator.policies([self.budget], self.budget, {"budgets"})
        policy = next(policy for policy in policies if policy.router is self.model.router)
        rows = self.splits[0].tokens
        rows = rows.select(range(min(count, len(rows))))
        self.answers[variant.name] = write_answers(self.model, self.tokenizer, rows, policy, self.batch_size)

    def scores(self, scorer: BertScore | None) -> dict[str, dict]:
        """
        Of all answers written: each metric with its interval, what ET5 did, and `less`: each metric less that of
        `WHOLE`, paired by question.
        """
        if not self.answers:
            return {}
        count = len(next(iter(self.answers.values())).texts)
        references = list(self.splits[0].texts["answer"])[:count]
        scored = score_each(self.answers, references, scorer)
        bootstrap = self.bootstraps[self.splits[0].split]
        if count != len(self.splits[0]):
            bootstrap = PairedBootstrap(count, len(bootstrap.counts), self.seed)
        found: dict[str, dict] = {}
        for name, answers in self.answers.items():
            counts = answers.counts
            found[name] = {
                "scores": {metric: bootstrap.mean(values) for metric, values in scored[name].items()},
                "et5_share": float(counts["et5"].sum() / max(1.0, counts["tokens"].sum())),
                "passes": float(counts["passes"].mean()),
                "encoder_calls": float(counts["encoder_calls"].mean()),
                "cost_ms": float(answers.cost(self.costs).mean()),
            }
            if name != WHOLE:
                apart = {metric: values - scored[WHOLE][metric] for metric, values in scored[name].items()}
                found[name]["less"] = {metric: bootstrap.mean(values) for metric, values in apart.items()}
        return found
