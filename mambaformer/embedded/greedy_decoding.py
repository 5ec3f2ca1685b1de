# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Greedy decoding without a framework's work between the tokens.

For plain greedy answers on a CPU this takes the place of transformers' loop, to the same tokens, choices and records:
between two compiled steps on memory that stays where it is, only the likeliest token is looked up. A small model's own
step takes a fraction of the time that one turn of the general loop does. Where the steps are not compiled, or do not
apply, the model's `forward` is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .cache_mambaformer import MambaFormerCache
from .emamba_decoder import BoundStep
from .module_snapshot import is_plain_call
from .outputs_mambaformer import EMAMBA, ENDED, ET5, RouteTrace
from .router_step import RouterStep, bind_router
from .routing_pass import Choice, ask_et5, log_probability, merge_experts


def is_plain_greedy(
    model: nn.Module,
    cache: MambaFormerCache,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
) -> bool:
    """Whether a request asks for nothing but the likeliest tokens up to an end token or a length, on a CPU."""
    outputs = (config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states)
    watched = (
        model._forward_hooks or model._forward_pre_hooks or not all(map(is_ours, (model.forward, model._incremental)))
    )
    return (
        not (config.do_sample or processors or synced_gpus or any(outputs) or watched)
        and all(type(rule) in (MaxLengthCriteria, EosTokenCriteria) for rule in criteria)
        and input_ids.is_cpu
        and cache.keep_states
        and cache.look_ahead is None
        and model._compiled_call_impl is None
        and is_plain_call(model)
    )


def is_ours(method: Callable) -> bool:
    """Whether this package defines what a model does there, and neither a subclass nor somebody who replaced it."""
    return getattr(method, "__module__", "").rpartition(".")[0] == __name__.rpartition(".")[0]


def decode_greedily(
    model: nn.Module,
    cache: MambaFormerCache,
    input_ids: Tensor,
    logits: Tensor,
    criteria: StoppingCriteriaList,
    pad: Tensor | None,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """
    Append the likeliest tokens to `input_ids` `(B, t)` long until every row has ended.

    Args:
        cache: which has read `input_ids`; afterwards, all but the last token. logits: `(B, V)`, what comes next.
        criteria: end tokens and longest length, `is_plain_greedy` having looked at them.
        pad: id that follows an end token.

    Returns:
        `(B, t + new tokens)` long.
    """
    limit = min((rule.max_length for rule in criteria if hasattr(rule, "max_length")), default=torch.inf)
    ends = {end for rule in criteria if hasattr(rule, "eos_token_id") for end in rule.eos_token_id.tolist()}
    rows, length = input_ids.shape
    room = int(min(limit, length + model.config.max_target_length))
    answers = grown(input_ids, room)
    done = torch.zeros(rows, dtype=torch.bool)
    steps = None
    while True:
        tokens = logits.argmax(-1)  # (B,)
        if ends:
            if rows > 1:
                tokens = torch.where(done, pad, tokens)
            reached = [token in ends for token in tokens.tolist()]
        if length == answers.shape[1]:
            answers = grown(answers, 2 * length)
        answers[:, length] = tokens
        length += 1
        if streamer is not None:
            streamer.put(tokens)
        at_limit = length >= limit
        if at_limit or (ends and any(reached)):
            done = torch.ones_like(done) if at_limit else done | torch.tensor(reached)
            cache.finish(done, length)
            if bool(done.all()):
                break
        seen = answers[:, :length]
        if steps is None:
            steps = CompiledSteps.bind(model, cache, rows) or Forward(model, cache)
        logits = steps.read(seen)
    if steps is not None:
        steps.finish(answers[:, : length - 1])
    if streamer is not None:
        streamer.end()
    return answers[:, :length].clone()


def grown(ids: Tensor, length: int) -> Tensor:
    """A buffer `(B, length)` that begins with `ids` `(B, t)`."""
    buffer = ids.new_zeros(ids.shape[0], max(length, ids.shape[1] + 1))
    buffer[:, : ids.shape[1]] = ids
    return buffer


class Forward:
    """Reads tokens with the model's own `forward`."""

    def __init__(self, model: nn.Module, cache: MambaFormerCache):
        self.model, self.cache = model, cache

    def read(self, seen: Tensor) -> Tensor:
        """Logits `(B, V)` after `seen` `(B, t)`, of which the last token is new."""
        return self.model(decoder_input_ids=seen[:, -1:], past_key_values=self.cache).logits[:, -1]

    def finish(self, seen: Tensor) -> None:
        """Nothing is left to do."""


class CompiledSteps:
    """
    Reads tokens with EMamba's and the router's compiled steps; ET5 is asked as in `forward`.

    Args:
        step, router: bound to `step.ids` `(B, 1)` and to each other's memory, which they write over at each token; no
            router where EMamba writes every token. ended: `(B, 1)` bool, which the router reads.
    """

    @classmethod
    def bind(cls, model: nn.Module, cache: MambaFormerCache, rows: int) -> CompiledSteps | None:
        """Steps on the memory of `cache`; `None` where `forward` has to be called."""
        request = cache.request
        if request.routing not in ("auto", "emamba") or cache.emamba is None:
            return None
        step = model.emamba_decoder.bind(model.emamba, cache.emamba, torch.zeros(rows, 1, dtype=torch.long))
        if step is None:
            return None
        ended = torch.zeros(rows, 1, dtype=torch.bool)
        if request.routing == "emamba":
            return cls(model, cache, step, None, ended)
        router = bind_router(
            model.router,
            model.emamba.get_input_embeddings(),
            step.ids,
            step.hidden,
            step.logits,
            cache.router,
            cache.row_scalars(),
            request.allows(cache.gate_logit[cache.row_source]),
            ended,
            request.threshold,
            request.cap,
            request.first_new,
        )
        return None if router is None else cls(model, cache, step, router, ended)

    def __init__(
        self, model: nn.Module, cache: MambaFormerCache, step: BoundStep, router: RouterStep | None, ended: Tensor
    ):
        self.model, self.cache, self.step, self.router, self.ended = model, cache, step, router, ended
        self.ends_at: Tensor | None = None  # of the cache, when `ended` was last written
        self.embeddings = model.emamba.get_input_embeddings()
        self.levels: list[Tensor] = []  # margin and EMamba's log-probability, (2, B, 1) a position
        self.choices: list[Tensor] = []  # expert and gap, (2, B, 1) a position
        self.asked: list[tuple[int, RouteTrace]] = []  # positions at which ET5 spoke for some row

    def read(self, seen: Tensor) -> Tensor:
        """Logits `(B, V)` after `seen` `(B, t)`, of which the last token is new."""
        cache, step, router = self.cache, self.step, self.router
        cache.decoder_ids = seen
        step.ids.copy_(seen[:, -1:])
        if cache.ends_at is not self.ends_at:
            self.ends_at = cache.ends_at
            torch.le(cache.ends_at, seen.shape[1], out=self.ended[:, 0])
        step.run()
        if router is None:
            self._note_emamba()
            return step.logits[:, 0]
        router.embedded.copy_(self.embeddings(step.ids))
        router.args.threshold = cache.request.threshold_at(router.state.position)
        router.run()
        self.levels.append(router.levels.clone())
        self.choices.append(router.choices.clone())
        if ET5 not in router.expert.flatten().tolist():
            return step.logits[:, 0]
        asked = router.expert == ET5  # (B, 1)
        choice = Choice(router.expert, router.gap, router.margin, asked, step.logits, router.state)
        said = ask_et5(self.model, cache, asked, seen.shape[1] - 1)  # (B, 1, V)
        logits, trace = merge_experts(self.model, cache.request, choice, said, 1)
        self.asked.append((len(self.choices) - 1, trace))
        return logits[:, 0]

    def _note_emamba(self) -> None:
        """Record a position at which EMamba speaks for all rows, no router having been asked."""
        expert = torch.where(self.ended, ENDED, EMAMBA)  # (B, 1)
        logits = self.step.logits
        log_top = log_probability(logits, logits.argmax(-1, keepdim=True), ~self.ended)
        self.levels.append(torch.stack([torch.full_like(log_top, float("nan")), log_top]))
        self.choices.append(torch.stack([expert, torch.zeros_like(expert)]))

    def finish(self, seen: Tensor) -> None:
        """Leave the cache as `forward` would, having read `seen` `(B, t)`."""
        (margin, log_p_emamba), (expert, gap) = torch.cat(self.levels, dim=2), torch.cat(self.choices, dim=2)
        log_p_et5 = torch.full_like(margin, float("nan"))  # (B, T)
        for position, trace in self.asked:
            log_p_emamba[:, position : position + 1] = trace.log_p_emamba
            log_p_et5[:, position : position + 1] = trace.log_p_et5
        record = (expert, margin, gap, log_p_emamba, log_p_et5)
        self.cache.steps.append(dict(zip(self.cache.STEP_FIELDS, record, strict=True)))
        self.cache.decoder_ids = seen.clone()
        if self.router is not None:
            self.cache.router = self.router.state
