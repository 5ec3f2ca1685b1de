# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Greedy decoding in one call of compiled code (`native/greedy_run.cpp`) for as long as EMamba speaks.

Between two steps that read all weights, Python's own code and data have left the processor's caches, and the little
that it does there costs a noticeable part of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from .draft_weights import DraftArgs, PackedHeads
from .emamba_decoder import BoundStep
from .look_ahead import LookAhead, LookupRules
from .packed_weights import DECODE_LIBRARY, RunArgs
from .router_step import RouterArgs, RouterRecord, RouterStep
from .state_log import StateLog

NEEDS_LOGS = 4  # of native/greedy_run.cpp
COUNTS = ("passes", "proposed", "accepted")  # of `LookAheadCounts`


class AheadArgs(ctypes.Structure):
    """`AheadArgs` of native/greedy_run.cpp."""

    _fields_ = [("said", ctypes.c_void_p), ("window_logs", ctypes.c_void_p * 2), ("state_logs", ctypes.c_void_p * 2)]
    _fields_ += [("threads", ctypes.POINTER(ctypes.c_int64)), ("draft", ctypes.POINTER(DraftArgs))]
    _fields_ += [("rules", LookupRules)]
    _fields_ += [(name, ctypes.c_int64) for name in ("said_count", "width", "longest_answer")]
    _fields_ += [(name, ctypes.c_int64) for name in ("held", "at", "log")]
    _fields_ += [(name, ctypes.c_int64) for name in COUNTS]


class GreedyArgs(ctypes.Structure):
    """`GreedyArgs` of native/greedy_run.cpp."""

    _fields_ = [("run", ctypes.POINTER(RunArgs)), ("router", ctypes.POINTER(RouterArgs))]
    _fields_ += [("ahead", ctypes.POINTER(AheadArgs))]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in ("ids", "answers", "ends", "ended", "thresholds", "levels", "choices", "top")
    ]
    _fields_ += [(name, ctypes.c_int64) for name in ("room", "length", "end_count", "pad", "most", "round_hidden")]
    _fields_ += [(name, ctypes.c_int64) for name in ("read", "asked")]


class GreedyRun:
    """
    EMamba's and the router's compiled steps, run one after another.

    Args:
        step: of one token a row, or of one row's several. router: bound to the memory of its first token; `None` where
            EMamba writes every token.
        ended: `(B, 1)` bool, rows that have ended. ends: ids that end an answer. pad: id that follows one.
    """

    def __init__(self, step: BoundStep, router: RouterStep | None, ended: Tensor, ends: set[int], pad: int):
        self.step, self.router = step, router
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.ended = ended
        self.ahead: AheadArgs | None = None
        step.prepare(length=1)
        self.args = GreedyArgs(
            run=ctypes.pointer(step.call),
            router=None if router is None else ctypes.pointer(router.args),
            ids=step.ids.data_ptr(),
            ends=self.ends.data_ptr(),
            ended=ended.data_ptr(),
            end_count=len(ends),
            pad=pad,
            round_hidden=step.dtype != torch.float32,
        )

    def look_ahead(
        self, wanted: LookAhead, logs: Callable[[], list[StateLog]], heads: PackedHeads | None
    ) -> AheadArgs:
        """
        Read tokens that `wanted` proposes along with the one row's next one.

        Args:
            logs: makes two of `1 + wanted.width` tokens each, as many as the step reads at most. Called at the first
                proposal: many an answer has none.
            heads: propose where the text does not.

        Returns:
            what looks ahead, its counts being kept up to date.
        """
        room = 1 + wanted.width
        self.threads = (ctypes.c_int64 * room)(*(self.step.packed.threads(1 + more) for more in range(room)))
        self.make_logs, self.wanted, self.heads = logs, wanted, heads
        if heads is not None:
            heads.args.threads = self.threads[0]
        self.ahead = AheadArgs(
            said=wanted.text.buffer_info()[0],
            threads=self.threads,
            draft=None if heads is None else ctypes.pointer(heads.args),
            rules=wanted.rules,
            said_count=wanted.said,
            width=wanted.width,
            longest_answer=wanted.limit,
            log=-1,
            **{name: getattr(wanted.counts, name) for name in COUNTS},
        )
        self.args.ahead = ctypes.pointer(self.ahead)
        return self.ahead

    def _open_logs(self) -> None:
        """Give proposals their place."""
        self.logs = self.make_logs()
        for i, log in enumerate(self.logs):
            self.ahead.window_logs[i] = ctypes.addressof(log.window_pointers)
            self.ahead.state_logs[i] = ctypes.addressof(log.state_pointers)

    def run(
        self, answers: Tensor, length: int, thresholds: list[float], record: RouterRecord, place: int
    ) -> tuple[int, bool]:
        """
        Read the last token of each answer, append the likeliest, and so on, until ET5 is asked or an answer ends.

        Args:
            answers: `(B, room)` long, contiguous, of which `length` tokens are there; room for as many more as
                `thresholds`.
            thresholds: the router's, for as many positions as may be read at most.
            record: receives what was found, from run `place` on.

        Returns:
            how many positions were read, the tokens after the last of them not being appended; and whether ET5 is
            asked there.

        Raises:
            IndexError, MemoryError: as of the steps.
        """
        args, most, read, error = self.args, len(thresholds), 0, NEEDS_LOGS
        allowed = (ctypes.c_double * most)(*thresholds)
        args.answers, args.room = answers.data_ptr(), answers.shape[1]
        while error == NEEDS_LOGS:
            args.length, args.most = length + read, most - read
            args.thresholds = ctypes.addressof(allowed) + read * ctypes.sizeof(ctypes.c_double)
            for name in ("levels", "choices", "top"):
                kept = getattr(record, name)
                setattr(args, name, kept.data_ptr() + (place + read) * kept[0].nbytes)
            if self.router is not None:
                self.router.args.position = self.router.state.position
            error = DECODE_LIBRARY.mambaformer_greedy_run(ctypes.byref(args))
            if self.router is not None:
                self.router.state.position += args.read
            read += args.read
            if error == NEEDS_LOGS:
                self._open_logs()
        self.step.check(error)
        return read, bool(args.asked)

    @property
    def at(self) -> int:
        """Which of the step's tokens was read last."""
        return 0 if self.ahead is None else self.ahead.at

    def restore(self, cache: DynamicCache) -> None:
        """Let `cache` hold the state after the token read last, wherever that lives."""
        if self.ahead is not None and self.ahead.log >= 0:
            token = self.step.call.begin if self.ahead.held == 1 else self.ahead.at
            self.logs[self.ahead.log].restore(cache, token)
