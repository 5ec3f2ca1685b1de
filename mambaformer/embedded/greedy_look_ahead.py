# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Look-ahead within `decode_greedily`: one compiled pass reads the next token and those proposed to follow it.

Where nothing is proposed, tokens are read one after another in one call until the text ends as it did before. Where it
does not, the model's heads propose, if it has any. `LookAhead.choose`, which serves every request that is not plain
greedy, does without them. Tokens, choices and records are those of plain decoding.
"""

from __future__ import annotations

from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .compiled_steps import CompiledSteps
from .greedy_run import GreedyRun
from .look_ahead import LookAhead, as_text
from .state_log import StateLog

LIKELY = 0.3  # chance of being right from which on a head's proposal is worth its reading
TRY_AGAIN = 8  # tokens after which heads that were often wrong are asked once more
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
        self.greedy.stop_where_said(cache.sources.input_ids[cache.sources.attention_mask.bool()])
        self.look_ahead.ahead = None  # of what was read ahead of the first token, only that one is used
        self.tokens: list[int] = []  # of the last pass
        self.at = 0  # which of them was taken last
        self.log: StateLog | None = None  # where the state lives, once it has left the cache
        self.by_heads = False  # whether the heads proposed for the last pass
        self.success, self.since = 0.5, 0  # of the first proposals, the share that was right lately; tokens since then

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        return 1 + cache.look_ahead.width

    def read_on(self, answers: Tensor, length: int, most: int) -> tuple[Tensor, int]:
        look_ahead, token = self.look_ahead, int(answers.numpy()[0, length - 1])
        look_ahead.text += chr(token)
        self._make_ready(length)
        if self.tokens[self.at + 1 : self.at + 2] == [token]:
            look_ahead.counts.accepted += 1
            self.at += 1
            return self._read(answers[:, :length]), 1
        self._judge()
        if len(self.tokens) > 1:
            self.step.start_from(self.log, self.at)
        proposed = self._propose(length - 1)
        self.tokens, self.at = [token, *proposed], 0
        if proposed:
            self.words[0, : len(self.tokens)] = self.tokens
            self.log = look_ahead.free_log(self.cache)
            self.step.run(self.log, len(self.tokens))
            look_ahead.count(len(proposed))
            return self._read(answers[:, :length]), 1
        following, read = super().read_on(answers, length, 1 if self.model.look_ahead_heads is not None else most)
        later = answers[0, length : length + read - 1]  # written in the same call
        look_ahead.text += as_text(later)
        self.tokens = [token, *later.tolist()][-1:]
        return following, read

    def _advance(self, seen: Tensor) -> int:
        if len(self.tokens) == 1:
            self.words[0, 0] = self.tokens[0]
            self.step.run(length=1)
        return self.at

    def _judge(self) -> None:
        """Learn from whether the heads were right in the last pass, if they proposed."""
        if self.by_heads:
            self.success = MEMORY * self.success + (1 - MEMORY) * (self.at > 0)

    def _propose(self, read: int) -> list[int]:
        """What may follow the text, `read` decoder tokens having come before its last one."""
        said_before = self.look_ahead.propose(read)
        heads = self.model.look_ahead_heads
        self.since += 1
        self.by_heads = not said_before and heads is not None and bool(self.tokens)
        if not self.by_heads:
            return said_before
        most = int(self.since > TRY_AGAIN)
        while most < len(heads.proj) and self.success ** (most + 1) > LIKELY:
            most += 1
        most = min(most, self.look_ahead.room(read))
        if most <= 0:
            return []
        self.since = 0
        return self.look_ahead.before_end(heads.propose(self.step.hidden[0, self.at])[:most])

    def finish(self, seen: Tensor) -> None:
        if self.log is not None:
            self.log.restore(self.cache.emamba, self.step.call.begin if len(self.tokens) == 1 else self.at)
        super().finish(seen)
