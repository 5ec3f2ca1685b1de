# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What an expert can do while it is being pretrained: losses, greedy answers, exact recall, and the log of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from .pretrain_data import TokenStore, collate_emamba, collate_et5
from .pretrain_loss import target_hidden

EXPERTS = ("et5", "emamba")
COLLATE = {"et5": collate_et5, "emamba": collate_emamba}


@torch.no_grad()
def teacher_forced(model: nn.Module, expert: str, store: TokenStore, batch_size: int = 16) -> dict[str, float]:
    """Mean negative log-likelihood (nats a token) and accuracy over all target tokens of `store`."""
    order = sorted(range(len(store)), key=lambda i: store.source_lengths[i] + store.target_lengths[i])
    total = hits = count = 0.0
    for begin in range(0, len(order), batch_size):
        batch = COLLATE[expert]([store[i] for i in order[begin : begin + batch_size]])
        hidden, gold = target_hidden(model, expert, batch)
        logits = model.lm_head(hidden).float()  # (N, V)
        total += nn.functional.cross_entropy(logits, gold, reduction="sum").item()
        hits += (logits.argmax(-1) == gold).sum().item()
        count += len(gold)
    return {"loss": total / max(count, 1), "accuracy": hits / max(count, 1)}


@torch.no_grad()
def greedy(
    model: nn.Module, expert: str, sources: Sequence[Sequence[int]], longest: int = 96, batch_size: int = 32
) -> list[list[int]]:
    """Greedy continuations of tokenised sources, through transformers' `generate`, without start and eos.

    Sources are answered in batches of similar length; the order of the result is that of `sources`.
    """
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    answers: list[list[int]] = [[] for _ in sources]
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        width = max(len(sources[i]) for i in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for row, i in enumerate(rows):
            length = len(sources[i])
            place = slice(0, length) if expert == "et5" else slice(width - length, width)
            ids[row, place] = torch.as_tensor(sources[i])
            mask[row, place] = 1
        if expert == "emamba":  # the decoder start is part of the one causal sequence
            ids = torch.cat([ids, torch.full((len(rows), 1), pad)], dim=1)
            mask = torch.cat([mask, torch.ones((len(rows), 1), dtype=torch.long)], dim=1)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=eos,
        )
        out = out[:, 1:] if expert == "et5" else out[:, ids.shape[1] :]
        for i, row in zip(rows, out.tolist(), strict=True):
            answers[i] = row[: row.index(eos)] if eos in row else row
    return answers


def exact_recall(model: nn.Module, expert: str, probes: Sequence[dict], tokenizer) -> dict[str, float]:
    """Share of probes whose greedy answer equals the target, white space aside, by task name.

    A probe is a dict of `task`, `source` and `target`.
    """
    sources = [tokenizer(probe["source"])["input_ids"] for probe in probes]
    answers = greedy(model, expert, sources)
    hits: dict[str, list[bool]] = {}
    for probe, answer in zip(probes, answers, strict=True):
        said = tokenizer.decode(answer, skip_special_tokens=True)
        hits.setdefault(probe["task"], []).append(said.split() == probe["target"].split())
    return {task: sum(found) / len(found) for task, found in sorted(hits.items())}


class JsonlLog:
    """Appends one JSON object a line and echoes it; the file survives a stop and goes on after a resume."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":  # a stop cut the last line short
                    file.write(b"\n")
            file.write(f"{line}\n".encode())
        print(line, flush=True)

    def minutes(self, step: int) -> float:
        """Training minutes that the log gives for the last line at or before `step`; 0 without such a line."""
        found = 0.0
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    values = json.loads(line)
                except ValueError:  # cut short by a stop
                    continue
                if "minutes" in values and values["step"] <= step:
                    found = values["minutes"]
        return found


class ProbeCallback(TrainerCallback):
    """Logs loss and tokens a second, probes the expert every `every` steps, and saves every `save_minutes`.

    Args:
        expert: "et5" or "emamba".
        log: where lines go.
        tokenizer: of both experts.
        validation: tokenised DentalQA validation pairs, for the teacher-forced loss.
        questions: raw validation pairs (dicts of source and target) to answer and print.
        probes: held-out recall probes.
        every: steps between probes; 0 probes at the end only.
        save_minutes: wall-clock minutes between checkpoints.
        max_minutes: wall-clock budget of the whole run, resumed parts included; 0 for none.
    """

    def __init__(self, expert, log, tokenizer, validation, questions, probes, every, save_minutes, max_minutes=0.0):
        self.expert, self.log, self.tokenizer = expert, log, tokenizer
        self.validation, self.questions, self.probes = validation, questions, probes
        self.every, self.save_seconds, self.max_seconds = every, 60 * save_minutes, 60 * max_minutes
        self.begun = self.saved = self.logged = time.monotonic()
        self.tokens = self.seen = 0

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def progress(self, step: int, steps: int) -> float:
        """How far the run is, 0 to 1 or beyond: by steps, or by the clock if that is further on."""
        clock = (time.monotonic() - self.begun) / self.max_seconds if self.max_seconds else 0.0
        return max(step / steps, clock)

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = self.logged = time.monotonic()
        self.begun = self.saved - 60 * self.log.minutes(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        self.seen += self.tokens
        speed = self.tokens / max(now - self.logged, 1e-9)
        self.log.write(
            step=state.global_step,
            loss=logs["loss"],
            grad_norm=float(logs.get("grad_norm", 0.0)),
            lr=float(logs.get("learning_rate", 0.0)),
            tokens_per_second=speed,
            tokens=self.seen,
            minutes=(now - self.begun) / 60,
        )
        self.tokens, self.logged = 0, now

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if time.monotonic() - self.saved > self.save_seconds:
            control.should_save = True
        if self.progress(state.global_step, state.max_steps) >= 1.0:
            control.should_training_stop = control.should_log = True
        if control.should_training_stop or (self.every and state.global_step % self.every == 0):
            begun = time.monotonic()
            self.probe(model, state.global_step)
            self.logged += time.monotonic() - begun  # a probe is not training time

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def probe(self, model: nn.Module, step: int) -> None:
        """Evaluate `model` as it stands and write one line; prints five questions with their answers."""
        training = model.training
        model.eval()
        rng = torch.get_rng_state()
        scores = teacher_forced(model, self.expert, self.validation) if len(self.validation) else {}
        recall = exact_recall(model, self.expert, self.probes, self.tokenizer) if self.probes else {}
        sources = [self.tokenizer(q["source"])["input_ids"] for q in self.questions]
        answers = greedy(model, self.expert, sources) if sources else []
        for question, answer in zip(self.questions, answers, strict=True):
            said = self.tokenizer.decode(answer, skip_special_tokens=True)
            print(f"  {question['source']}\n    says: {said}\n    gold: {question['target']}", flush=True)
        torch.set_rng_state(rng)
        model.train(training)
        self.log.write(
            step=step, **{f"eval_{k}": v for k, v in scores.items()}, **{f"recall_{k}": v for k, v in recall.items()}
        )
