# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The evaluation itself: calibrate on validation, then every split teacher-forced, by generation, and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..pipelines.pipeline_mambaformer import token_texts
from .bertscore import BertScore
from .costs import measure_costs
from .data import Collator
from .decisions import decision_of, score_decisions
from .evaluation_data import Questions
from .evaluation_generation import PLAIN, Answers, Calibrator, Policy, time_answers
from .evaluation_gold import GoldPass, gold_pass
from .evaluation_likelihood import calibrate_gates, calibrate_rules, compare_likelihoods, router_quality
from .evaluation_policies import milliseconds, rule_routers
from .evaluation_statistics import PairedBootstrap
from .machine import describe_machine
from .metrics import METRICS_EACH
from .utility import CallCosts

TIMED = ("emamba", "et5", "mambaformer", "confidence_cost", "random_cost", "sequence_cost", "soft", PLAIN)
"""Policies whose latency is measured."""
KEPT_ANSWERS = 6


@dataclass
class Evaluation:
    """
    What an evaluation found.

    Attributes:
        result: plain values, ready for JSON. arrays: one value a question, by `split/...` name.
        answers: by split and policy. questions: by split. pieces: by split, answers as `(text, by_et5)` pieces.
    """

    result: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict)
    pieces: dict[str, list[dict]] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation: Questions,
    splits: list[Questions],
    scorer: BertScore | None,
    budgets: list[float],
    wanted: set[str],
    batch_size: int = 16,
    latency_rows: int = 20,
    resamples: int = 2000,
    seed: int = 0,
    say: Callable[[str], None] = print,
    plain: nn.Module | None = None,
) -> Evaluation:
    """
    Evaluate `model`, which is left as it was.

    Args:
        validation: thresholds of all policies come from these. splits: to score on.
        budgets: shares of tokens; the model's own is added. wanted: which of `evaluate.BASELINES` write answers.
        latency_rows: questions of each split that are timed one by one.
        plain: a T5 of the same vocabulary that answers the same questions beside it.
    """
    config = model.config
    main = config.expert_budget
    budgets = sorted({*budgets, main} if 0 < main < 1 else set(budgets))
    main = main if main in budgets else budgets[len(budgets) // 2]
    table = config.cost_table or measure_costs(model)
    costs = milliseconds(table)
    collator = Collator(tokenizer)
    routers = rule_routers(model.router, seed)

    say(f"{len(validation)} validation questions: both experts on the gold answers")
    gold = gold_pass(model, validation.tokens, collator, batch_size, routers)
    typical = float(gold.tokens.mean())
    relative = {budget: CallCosts.from_table(table, budget, typical) for budget in budgets}
    say("calibrating on the gold answers")
    gates = calibrate_gates(model, gold, relative)
    rules = calibrate_rules(model, gold, routers, gates, main, costs)
    calibrator = Calibrator(model, tokenizer, validation.tokens, gold, routers, costs, gates, batch_size)
    say("calibrating on validation answers")
    fixed, like = calibrator.policies(budgets, main, wanted)
    beside = [] if plain is None else [Policy(PLAIN, "plain T5", plain=plain)]

    found = Evaluation()
    per_split: dict[str, dict] = {}
    for questions in splits:
        name = questions.split
        bootstrap = PairedBootstrap(len(questions), resamples, seed)
        say(f"{name}: {len(questions)} questions: both experts on the gold answers")
        here = gold_pass(model, questions.tokens, collator, batch_size, routers)
        likelihood, arrays = compare_likelihoods(model, gold, here, routers, rules, main, costs, bootstrap)
        found.arrays |= {f"{name}/gold/{key}": values for key, values in arrays.items()}
        found.arrays |= gold_arrays(name, here)
        quality = router_quality(model, gold, here, main, relative[main])
        writer = replace(calibrator, rows=questions.tokens, gold=here)
        answers = {}
        for policy in fixed + beside:
            say(f"{name}: answers by {policy.label}")
            answers[policy.name] = writer.write(policy)
        say(f"{name}: answers by the rules at equal cost")
        equal = writer.equal_cost(answers["mambaformer"], wanted, like)
        answers |= {policy.name: writer.write(policy) for policy in equal}
        policies = fixed + equal + beside
        say(f"{name}: scoring")
        scores = score_each(answers, list(questions.texts["answer"]), scorer)
        timed = [policy for policy in policies if policy.name in TIMED]
        chosen = questions.tokens.select(range(min(latency_rows, len(questions))))
        say(f"{name}: timing {len(chosen)} questions by {len(timed)} policies")
        times = time_answers(model, tokenizer, chosen, timed, here.source) if len(chosen) else {}
        rows = {
            policy.name: describe(policy, answers[policy.name], scores[policy.name], costs, times, bootstrap)
            for policy in policies
        }
        compare_with_experts(rows, scores, bootstrap)
        if questions.decisions is not None:
            for key, row in rows.items():
                given = [decision_of(text) for text in answers[key].texts]
                row["decisions"] = score_decisions(given, questions.decisions)
        per_split[name] = {
            "questions": len(questions),
            "policies": rows,
            "likelihood": likelihood,
            "router": quality,
            "shares": shares(answers["mambaformer"], questions),
        }
        found.arrays |= answer_arrays(name, answers, scores, times, costs)
        found.answers[name], found.questions[name] = answers, questions
        found.pieces[name] = coloured(tokenizer, questions, answers["mambaformer"])
    found.result = {
        "machine": describe_machine(),
        "bert_score_model": scorer.name if scorer else None,
        "seed": seed,
        "budget": main,
        "cost_table": table,
        "parameters": {"mambaformer": count_parameters(model)}
        | {policy.name: count_parameters(policy.plain) for policy in beside},
        "calibration_rows": len(validation),
        "splits": per_split,
    }
    return found


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model holds that training can move, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def score_each(
    answers: dict[str, Answers], references: list[str], scorer: BertScore | None
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric of every policy's answers, `(n,)` each; the encoder is run once for all of them."""
    scores = {
        policy: {metric: each(found.texts, references) for metric, each in METRICS_EACH.items()}
        for policy, found in answers.items()
    }
    if scorer is not None:
        texts = [text for found in answers.values() for text in found.texts]
        values = scorer.each(texts, references * len(answers))
        for policy, part in zip(answers, np.split(values, len(answers)), strict=True):
            scores[policy] = {"bert_score": part, **scores[policy]}
    return scores


def describe(
    policy: Policy,
    answers: Answers,
    scores: dict[str, np.ndarray],
    costs: CallCosts,
    times: dict[str, dict[str, np.ndarray]],
    bootstrap: PairedBootstrap,
) -> dict:
    """One row of the quality table."""
    counts = answers.counts
    row = {
        "policy": policy.name,
        "label": policy.label,
        "scores": {metric: bootstrap.mean(values) for metric, values in scores.items()},
        "et5_share": float(counts["et5"].sum() / max(1.0, counts["tokens"].sum())),
        "tokens": float(counts["tokens"].mean()),
        **{name: float(counts[name].mean()) for name in ("passes", "caught_up", "encoder_calls")},
        "cost_ms": float(answers.cost(costs).mean()),
        "empty": sum(not text for text in answers.texts),
    }
    if policy.router is not None:
        row["threshold"], row["gate_threshold"] = policy.threshold, policy.gate_threshold
    if policy.sequence is not None:
        row["rule"] = vars(policy.sequence)
    if policy.name in times:
        seconds, tokens = times[policy.name]["seconds"], times[policy.name]["tokens"]
        row["latency"] = {
            "questions": len(seconds),
            "median": float(np.median(seconds)),
            "p95": float(np.percentile(seconds, 95)),
            "tokens": float(tokens.mean()),
            "tokens_per_second": float(tokens.sum() / seconds.sum()),
            **{
                f"of_{other}": float(np.median(seconds) / np.median(times[other]["seconds"]))
                for other in ("emamba", "mambaformer")
            },
        }
    return row


def compare_with_experts(
    rows: dict[str, dict], scores: dict[str, dict[str, np.ndarray]], bootstrap: PairedBootstrap
) -> None:
    """
    Add `less` (differences from each expert and from the better one) and `recovered` (of the way from EMamba to ET5)
    to every other row. Which expert is the better one is asked for each metric on these very questions.
    """
    for name, row in rows.items():
        own = scores[name]
        row["recovered"] = {
            metric: bootstrap.ratio(
                own[metric] - scores["emamba"][metric], scores["et5"][metric] - scores["emamba"][metric]
            )
            for metric in own
        }
        if name in ("emamba", "et5"):
            continue
        better = {m: max(("emamba", "et5"), key=lambda e, m=m: scores[e][m].mean()) for m in own}
        row["less"] = {
            "EMamba": {m: bootstrap.mean(own[m] - scores["emamba"][m]) for m in own},
            "ET5": {m: bootstrap.mean(own[m] - scores["et5"][m]) for m in own},
            "better expert": {m: bootstrap.mean(own[m] - scores[better[m]][m]) for m in own},
        }
        if name != "mambaformer":
            row["mambaformer_less_this"] = {m: bootstrap.mean(scores["mambaformer"][m] - own[m]) for m in own}


def shares(answers: Answers, questions: Questions) -> dict:
    """ET5's share of the tokens at each position that ten answers reach, and by each group of the questions."""
    longest = max(len(experts) for experts in answers.experts)
    called, reached = np.zeros(longest), np.zeros(longest)
    for experts in answers.experts:
        called[: len(experts)] += experts == 1
        reached[: len(experts)] += 1
    enough = reached >= min(10, len(answers.experts))
    result: dict = {"position": (called[enough] / reached[enough]).tolist()}
    for group, values in questions.groups.items():
        by_value: dict[str, list[float]] = {}
        for value, et5, tokens in zip(values, answers.counts["et5"], answers.counts["tokens"], strict=True):
            pair = by_value.setdefault(value, [0.0, 0.0])
            pair[0] += et5
            pair[1] += tokens
        result[group] = {value: {"et5": et5, "tokens": tokens} for value, (et5, tokens) in sorted(by_value.items())}
    return result


def gold_arrays(split: str, gold: GoldPass) -> dict[str, np.ndarray]:
    """Every gold token's log-probabilities, answers one after another; `gold/tokens` says how long each is."""
    known = ~gold.ended
    values = {f"{split}/gold/log_p_{name}": gold.log_p[name][known].numpy() for name in ("et5", "emamba")}
    return values | {f"{split}/gold/margin": gold.unrolled["router"].margin.cpu()[known].numpy()}


def answer_arrays(
    split: str,
    answers: dict[str, Answers],
    scores: dict[str, dict[str, np.ndarray]],
    times: dict[str, dict[str, np.ndarray]],
    costs: CallCosts,
) -> dict[str, np.ndarray]:
    """Every score, count and time of every question."""
    arrays: dict[str, np.ndarray] = {}
    for policy, found in answers.items():
        columns = {**scores[policy], **found.counts, "cost_ms": found.cost(costs)}
        columns |= {f"latency_{key}": values for key, values in times.get(policy, {}).items()}
        arrays |= {f"{split}/{policy}/{key}": values for key, values in columns.items()}
    return arrays


def coloured(tokenizer: PreTrainedTokenizerBase, questions: Questions, answers: Answers) -> list[dict]:
    """The first answers that ET5 took part in, in pieces."""
    chosen = [i for i, experts in enumerate(answers.experts) if (experts == 1).any()][:KEPT_ANSWERS]
    return [
        {
            "question": questions.texts[i]["question"],
            "pieces": list(
                zip(token_texts(tokenizer, answers.ids[i].tolist()), (answers.experts[i] == 1).tolist(), strict=True)
            ),
        }
        for i in chosen
    ]
