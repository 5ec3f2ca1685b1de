# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Look-ahead within `decode_greedily`, in compiled code as far as the text itself proposes (`native/greedy_run.cpp`).

Where it does not, the model's heads propose, if it has any. `LookAhead.choose`, which serves every request that is not
plain greedy, does without them. Tokens, choices and records are those of plain decoding.
"""

from __future__ import annotations

from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .compiled_steps import CompiledSteps
from .greedy_run import GreedyRun
from .look_ahead import LookAhead
from .state_log import StateLog

LIKELY = 0.3  # chance of being right from which on a head's proposal is worth its reading
TRY_AGAIN = 8  # times at which heads that were often wrong are not asked
MEMORY = 0.9  # what the heads' success so far weighs beside their last proposal's


class AheadSteps(CompiledSteps):
    """
    `CompiledSteps` of one row, whose step also reads what `cache.look_ahead` or the model's heads propose.

    Args:
        greedy: its step is bound to ids `(1, 1 + width)`, its router to their first position.
    """

    def __init__(self, model: nn.Module, cache: MambaFormerCache, greedy: GreedyRun):
        super().__init__(model, cache, greedy)
        self.look_ahead: LookAhead = cache.look_ahead
        self.look_ahead.ahead = None  # of what was read ahead of the first token, only that one is used
        logs = [StateLog.for_tokens(cache.emamba, self.room(cache)) for _ in range(2)]
        self.ahead = greedy.look_ahead(self.look_ahead, logs, asks=model.look_ahead_heads is not None)
        self.begun = False  # whether a step was made whose hidden state the heads could go by
        self.success = 0.5  # the share of the heads' proposals whose first token was right, lately
        self.judged = self.right = 0  # of these proposals, and of those that were right
        self.since = 0  # times at which nothing was asked of the heads

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        return 1 + cache.look_ahead.width

    def _run(self, answers: Tensor, length: int, thresholds: list[float]) -> tuple[int, bool]:
        read, asked = super()._run(answers, length, thresholds)
        if not read:
            self.greedy.give(self._propose(length - 1))
            read, asked = super()._run(answers, length, thresholds)
        self.begun = True
        for name in ("passes", "proposed", "accepted"):
            setattr(self.look_ahead.counts, name, getattr(self.ahead, name))
        return read, asked

    def _propose(self, read: int) -> list[int]:
        """What may follow the text by the heads, `read` decoder tokens having come before its last one."""
        heads, ahead = self.model.look_ahead_heads, self.ahead
        if ahead.given_passes > self.judged:
            right, self.right, self.judged = ahead.given_right - self.right, ahead.given_right, ahead.given_passes
            self.success = MEMORY * self.success + (1 - MEMORY) * right
        self.since += 1
        most = int(self.since > TRY_AGAIN)
        while most < len(heads.proj) and self.success ** (most + 1) > LIKELY:
            most += 1
        most = min(most, self.look_ahead.room(read))
        if most <= 0 or not self.begun:
            return []
        self.since = 0
        return heads.propose(self.step.hidden[0, self.greedy.at])[:most]

    def finish(self, seen: Tensor) -> None:
        self.greedy.restore(self.cache.emamba)
        super().finish(seen)
