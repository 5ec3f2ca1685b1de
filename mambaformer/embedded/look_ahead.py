# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Exact look-ahead decoding (speculative decoding, arXiv 2211.17192, with prompt lookup for a draft), one row at a time.

What followed earlier in source or answer, where the text was as it ends now, is proposed. EMamba reads the next token
and the proposed ones in one pass, which is one reading of its weights, and keeps its state after each. As long as the
tokens that `generate` hands in, whoever wrote them, are those that were read, their logits are there already; at the
first other one EMamba goes back to its state before it. So every processor, sampler and stopping rule of `generate`
applies as ever, and tokens and choices are those of plain decoding, for the pass gives EMamba's logits to the bit, and
the compiled router its margins. Where that one does not apply, the router is asked one position at a time.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .cache_mambaformer import MambaFormerCache
from .outputs_mambaformer import ET5
from .packed_weights import DECODE_LIBRARY
from .router import RouterState
from .routing_pass import Choice, choose
from .state_log import StateLog, can_log

logger = logging.get_logger("transformers.mambaformer")

SHORTEST, LONGEST = 2, 8  # tokens that must, and that may, agree with an earlier place before something is proposed
COPIED = 6  # tokens that agree in a passage being copied, which goes on; where fewer do, one is proposed


class LookupRules(ctypes.Structure):
    """`LookupRules` of native/look_ahead.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("shortest", "longest", "copied")]


@dataclass
class LookAheadCounts:
    """
    What look-ahead did in one generation.

    Attributes:
        passes: verifications, each of them one reading of EMamba's weights.
        proposed: tokens read ahead in these. accepted: those of them that the answer went on with.
        off: why nothing was proposed at all, or from some token on; `None` where look-ahead was at work.
    """

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    off: str | None = None


def check_look_ahead(value: Any) -> int:
    """The argument of `generate`, `None` being 0. Raises `ValueError` for anything but a whole number from 0 on."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"look_ahead is {value!r}: give the number of tokens to propose at a time, 0 for none.")
    return value


def continuation(text: array, width: int, rules: LookupRules) -> list[int]:
    """Up to `width` tokens worth proposing: what followed where `text`, of 64-bit ids, last was as it ends."""
    found = (ctypes.c_int64 * max(0, width))()
    place, count = text.buffer_info()
    sizes = ctypes.c_int64(count), ctypes.byref(rules), ctypes.c_int64(len(found))
    return found[: DECODE_LIBRARY.mambaformer_continuation(ctypes.c_void_p(place), *sizes, found)]


class LookAhead:
    """
    Look-ahead of one generation, held by its cache.

    Args:
        width: the most tokens to propose at a time. Fewer are where little agrees with the text so far, so that
            answers which repeat nothing lose little.
        cache: of the request. More than one row (a batch, beams, returned sequences) turn look-ahead off: rows agree
            with their proposals to different lengths, and a step of several rows shares its reading of the weights
            already. So do `routing="et5"` and `"soft"`, which ask ET5 one token at a time, and `use_cache=False`.
        limit: longest decoder sequence. ends: ids that end an answer; nothing is proposed from them on.
    """

    def __init__(self, width: int, cache: MambaFormerCache, limit: int, ends: Iterable[int]):
        self.width, self.limit = min(width, limit), limit
        self.ends = set(ends)
        self.rules = LookupRules(SHORTEST, LONGEST, COPIED)
        self.counts = LookAheadCounts()
        self.text = array("q")  # of the source, and then the decoder's
        self.said = 0  # tokens of the source
        self.logs: list[StateLog] = []  # two; EMamba's state lives in the second, once one was used
        self.ahead: Ahead | None = None
        if len(cache.row_source) != 1:
            self.turn_off("it serves one row at a time: a batch, beams and returned sequences are decoded plainly")
        elif cache.request.routing in ("et5", "soft"):
            self.turn_off(f"routing={cache.request.routing!r} asks ET5 for every token, one at a time")
        elif not cache.keep_states:
            self.turn_off("use_cache=False keeps no state to go back to")
        elif not can_log():
            self.turn_off("the compiled decoding step was not built, or is of an older version; install again")
        else:
            self.text.extend(compress(cache.sources.input_ids[0].tolist(), cache.sources.attention_mask[0].tolist()))
            self.said = len(self.text)

    def turn_off(self, reason: str) -> None:
        """Propose nothing from now on."""
        self.counts.off, self.ahead = reason, None
        logger.warning_once(f"look_ahead is not used: {reason}.")

    def choose(self, model: nn.Module, cache: MambaFormerCache, ids: torch.Tensor) -> Choice | None:
        """
        Who speaks after `ids` `(1, T)`, the decoder tokens that follow those in `cache`.

        EMamba's state in `cache` is then that after `ids`, and the choice holds the router's. Returns `None`, with
        nothing done, where EMamba has to read them in the plain way.
        """
        if self.counts.off:
            return None
        self.text.extend(ids[0].tolist())
        if self.ahead is not None and ids.shape[1] == 1 and self.ahead.follows(int(ids)):
            self.counts.accepted += 1
        else:
            self.ahead = self._look(model, cache, ids) if ids.shape[1] == 1 else None
        return None if self.ahead is None else self.ahead.take(model, cache)

    def propose(self, read: int) -> list[int]:
        """Tokens that may follow the text; `read` decoder tokens came before its last one."""
        return self.before_end(continuation(self.text, self.room(read), self.rules))

    def room(self, read: int) -> int:
        """The most tokens that may be proposed, `read` decoder tokens having come before the last one."""
        return min(self.width, self.limit - read - 2)

    def before_end(self, proposed: list[int]) -> list[int]:
        """What comes in a proposal before the first token that ends an answer."""
        return proposed[: next((at for at, token in enumerate(proposed) if token in self.ends), None)]

    def free_log(self, cache: MambaFormerCache) -> StateLog:
        """A log for the longest pass in which EMamba's present state does not live."""
        if not self.logs:
            self.logs = StateLog.for_tokens(cache.emamba, 1 + self.width, logs=2)
        return self.logs[0]

    def count(self, proposed: int) -> None:
        """A pass over so many proposed tokens was made, and the state now lives in its log."""
        self.logs.reverse()
        self.counts.passes += 1
        self.counts.proposed += proposed

    def _look(self, model: nn.Module, cache: MambaFormerCache, ids: torch.Tensor) -> Ahead | None:
        """Read the one token `ids` `(1, 1)` and what is proposed to follow it, if anything."""
        proposed = [] if cache.emamba is None else self.propose(cache.get_seq_length())
        if not proposed:
            return None
        tokens = torch.cat([ids, ids.new_tensor([proposed])], dim=1)  # (1, 1 + n)
        log = self.free_log(cache)
        read = model.emamba_decoder.step(model.emamba, cache.emamba, tokens, log)
        if read is None:
            self.turn_off("EMamba's compiled decoding step does not apply to this model or call")
            return None
        self.count(len(proposed))
        hidden, logits = read
        return Ahead(tokens, hidden, logits, log)


class Ahead:
    """
    Tokens of one pass and how many of them have been taken; the first was certain, the others were proposed.

    Args:
        tokens: `(1, T)`. hidden: `(1, T, D)`. logits: `(1, T, V)`. log: EMamba's states after each.
    """

    def __init__(self, tokens: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor, log: StateLog):
        self.tokens, self.hidden, self.logits, self.log = tokens, hidden, logits, log
        self.order = tokens[0].tolist()
        self.taken = self.judged_from = self.judged_to = 0
        self.choice: Choice | None = None

    def follows(self, token: int) -> bool:
        """Whether `token` is the one that was read next."""
        return self.taken < len(self.order) and self.order[self.taken] == token

    def take(self, model: nn.Module, cache: MambaFormerCache) -> Choice:
        """Let EMamba's state in `cache` be that after the next token, and say who speaks there."""
        at = self.taken
        if at == self.judged_to:
            self._judge(model, cache)
        self.taken += 1
        self.log.restore(cache.emamba, at)
        here, choice = slice(at - self.judged_from, at - self.judged_from + 1), self.choice
        expert, state = choice.expert[:, here], cache.router
        if cache.request.routing == "auto":
            state = advanced(model, state, self.tokens[:, at : at + 1], expert == ET5, cache.request.first_new)
        return Choice(
            expert,
            *(x[:, here] for x in (choice.gap, choice.margin, choice.asked)),
            emamba_logits=self.logits[:, at : at + 1],
            state=state,
            log_top=None if choice.log_top is None else choice.log_top[:, here],
        )

    def _judge(self, model: nn.Module, cache: MambaFormerCache) -> None:
        """Choose for the next token and for those that follow it, or for it alone where rounding could differ."""
        scalars, gate_logit = cache.row_scalars(), cache.gate_logit[cache.row_source]

        def judge(count: int) -> Choice:
            part = slice(self.taken, self.taken + count)
            ids, hidden = self.tokens[:, part], self.hidden[:, part].clone()
            ended = torch.zeros_like(ids, dtype=torch.bool)
            return choose(
                model, cache.request, ids, ended, hidden, cache.router, scalars, gate_logit,
                emamba_logits=self.logits[:, part],
            )  # fmt: skip

        count = len(self.order) - self.taken
        self.choice = judge(count)
        if cache.request.routing == "auto" and self.choice.log_top is None and count > 1:
            count, self.choice = 1, judge(1)
        self.judged_from, self.judged_to = self.taken, self.taken + count


def advanced(
    model: nn.Module, state: RouterState, ids: torch.Tensor, routed: torch.Tensor, first_new: int
) -> RouterState:
    """The router's `state` after one more token `ids` `(1, 1)`, `routed` `(1, 1)` or not, as `choose` makes it."""
    routed = routed[:, 0]
    return replace(
        state,
        previous=routed.to(state.previous.dtype),
        since=(state.since + 1).masked_fill(routed, 0),
        spent=state.spent + routed if state.position >= first_new else state.spent,
        domain_sum=state.domain_sum + model.router.domain_weight[ids[0]].float(),
        embedding_sum=state.embedding_sum + model.emamba.get_input_embeddings()(ids)[:, 0].float(),
        seen=state.seen + 1,
        position=state.position + 1,
    )
