# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Look-ahead within `decode_greedily`, in compiled code (`native/greedy_run.cpp`).

Where the text itself proposes nothing, the model's heads do, if it has any. A model whose weights stay in the
processor's cache makes do with passages that are being copied. `LookAhead.choose`, which serves every request that is
not plain greedy, does without heads. Tokens, choices and records are those of plain decoding.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .compiled_steps import CompiledSteps
from .draft_weights import reads_memory
from .greedy_run import COUNTS, GreedyRun
from .look_ahead import LookAhead
from .state_log import StateLog


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
        heads, weights = model.look_ahead_heads, greedy.step.packed
        guesses = reads_memory(weights)
        packed = heads.drafter.prepare(heads, weights) if heads is not None and guesses else None
        if not guesses:
            self.look_ahead.rules.shortest = self.look_ahead.rules.copied
        logs = partial(StateLog.for_tokens, cache.emamba, self.room(cache), logs=2)
        self.ahead = greedy.look_ahead(self.look_ahead, logs, packed)

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        return 1 + cache.look_ahead.width

    def finish(self, seen: Tensor) -> None:
        for name in COUNTS:
            setattr(self.look_ahead.counts, name, getattr(self.ahead, name))
        self.greedy.restore(self.cache.emamba)
        super().finish(seen)
