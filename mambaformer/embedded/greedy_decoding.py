# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Greedy decoding without a framework's work between the tokens.

For plain greedy answers on a CPU this takes the place of transformers' loop, to the same tokens, choices and records:
between two compiled steps on memory that stays where it is, only the likeliest token is looked up. A small model's own
step takes a fraction of the time that one turn of the general loop does. Where the steps are not compiled, or do not
apply, the model's `forward` is called as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .cache_mambaformer import MambaFormerCache
from .compiled_steps import CompiledSteps
from .greedy_look_ahead import AheadSteps
from .module_snapshot import is_plain_call

FIRST, MOST = 4, 64  # tokens in the first call of compiled code, and in any
INTERRUPTED, STREAMED = 0.1, 0.02  # seconds of a call, after which an interruption is noticed, and a streamer is told


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
    steps, tokens, at_once = None, logits.argmax(-1), FIRST  # (B,)
    while True:
        if ends:
            if rows > 1:
                tokens = torch.where(done, pad, tokens)
            reached = [token in ends for token in tokens.tolist()]
        answers.numpy()[:, length] = tokens.numpy()
        length += 1
        if streamer is not None:
            streamer.put(tokens)
        at_limit = length >= limit
        if at_limit or (ends and any(reached)):
            done = torch.ones_like(done) if at_limit else done | torch.tensor(reached)
            cache.finish(done, length)
            if bool(done.all()):
                break
        if steps is None:
            looks_ahead = cache.look_ahead is not None and cache.look_ahead.counts.off is None
            kind = AheadSteps if looks_ahead else CompiledSteps
            steps = kind.bind(model, cache, rows, ends, 0 if pad is None else int(pad)) or Forward(model, cache)
        if length == answers.shape[1]:
            answers = grown(answers, 2 * length)
        begin = time.perf_counter()
        tokens, read = steps.read_on(answers, length, int(min(limit - length, answers.shape[1] - length, at_once)))
        longest = INTERRUPTED if streamer is None else STREAMED
        at_once = min(MOST, 1 + int(longest * read / max(time.perf_counter() - begin, 1e-9)))
        for at in range(length, length + read - 1) if streamer is not None else ():
            streamer.put(answers[:, at])
        length += read - 1
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

    def read_on(self, answers: Tensor, length: int, most: int) -> tuple[Tensor, int]:
        """As of `CompiledSteps`, one position."""
        last = answers[:, length - 1 : length]
        return self.model(decoder_input_ids=last, past_key_values=self.cache).logits[:, -1].argmax(-1), 1

    def finish(self, seen: Tensor) -> None:
        """Nothing is left to do."""
