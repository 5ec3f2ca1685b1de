# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Greedy decoding in one call of compiled code (`native/greedy_run.cpp`) for as long as EMamba speaks.

Between two steps that read all weights, Python's own code and data have left the processor's caches, and the little
that it does there costs a noticeable part of a step.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .emamba_decoder import BoundStep
from .packed_weights import DECODE_LIBRARY, RunArgs
from .router_step import RouterArgs, RouterRecord, RouterStep


class GreedyArgs(ctypes.Structure):
    """`GreedyArgs` of native/greedy_run.cpp."""

    _fields_ = [("run", ctypes.POINTER(RunArgs)), ("router", ctypes.POINTER(RouterArgs))]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in ("ids", "answers", "said", "ends", "ended", "thresholds", "levels", "choices", "top")
    ]
    _fields_ += [(name, ctypes.c_int64) for name in ("room", "length", "said_count", "end_count", "pad", "most")]
    _fields_ += [(name, ctypes.c_int64) for name in ("read", "asked")]


class GreedyRun:
    """
    EMamba's and the router's compiled steps, run one after another.

    Args:
        step: of one token a row. router: bound to its memory; `None` where EMamba writes every token.
        ended: `(B, 1)` bool, rows that have ended. ends: ids that end an answer. pad: id that follows one.
    """

    def __init__(self, step: BoundStep, router: RouterStep | None, ended: Tensor, ends: set[int], pad: int):
        self.step, self.router = step, router
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.ended = ended
        self.args = GreedyArgs(
            run=ctypes.pointer(step.call),
            router=None if router is None else ctypes.pointer(router.args),
            ids=step.ids.data_ptr(),
            ends=self.ends.data_ptr(),
            ended=ended.data_ptr(),
            end_count=len(ends),
            pad=pad,
        )

    def stop_where_said(self, said: Tensor) -> None:
        """Stop where the last two tokens of the one answer stood before, in `said` `(S,)` long or in the answer."""
        self.said = said.contiguous()
        self.args.said, self.args.said_count = self.said.data_ptr(), len(said)

    def run(
        self, answers: Tensor, length: int, thresholds: list[float], record: RouterRecord, place: int
    ) -> tuple[int, bool]:
        """
        Read the last token of each answer, append the likeliest, and so on, until ET5 is asked, an answer ends, or
        what `stop_where_said` asks for.

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
        args, most = self.args, len(thresholds)
        allowed = (ctypes.c_double * most)(*thresholds)
        args.answers, args.room, args.length, args.most = answers.data_ptr(), answers.shape[1], length, most
        args.thresholds = ctypes.addressof(allowed)
        for name in ("levels", "choices", "top"):
            kept = getattr(record, name)
            setattr(args, name, kept.data_ptr() + place * kept[0].nbytes)
        self.step.prepare(length=1)
        if self.router is not None:
            self.router.move_to(0)
            self.router.args.position = self.router.state.position
        error = DECODE_LIBRARY.mambaformer_greedy_run(ctypes.byref(args))
        if self.router is not None:
            self.router.state.position += args.read
        self.step.check(error)
        return args.read, bool(args.asked)
