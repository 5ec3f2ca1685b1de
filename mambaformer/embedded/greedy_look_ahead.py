# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Look-ahead within `decode_greedily`: one compiled pass reads the next token and those proposed to follow it.

Proposals and passes are those of `LookAhead.choose`, which serves every request that is not plain greedy; tokens,
choices and records are those of plain decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .compiled_steps import CompiledSteps
from .emamba_decoder import BoundStep
from .look_ahead import LookAhead
from .router_step import RouterStep
from .state_log import StateLog


class AheadSteps(CompiledSteps):
    """
    `CompiledSteps` of one row, whose step also reads what `cache.look_ahead` proposes.

    Args:
        step: bound to ids `(1, 1 + width)`. router: bound to their first position.
    """

    def __init__(
        self, model: nn.Module, cache: MambaFormerCache, step: BoundStep, router: RouterStep | None, ended: Tensor
    ):
        super().__init__(model, cache, step, router, ended)
        self.look_ahead: LookAhead = cache.look_ahead
        self.look_ahead.ahead = None  # of what was read ahead of the first token, only that one is used
        self.tokens: list[int] = []  # of the last pass
        self.at = 0  # which of them was taken last
        self.log: StateLog | None = (
            None  # of the last pass; `None` where it read one token, and the cache has its state
        )

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        return 1 + cache.look_ahead.width

    def _advance(self, seen: Tensor) -> int:
        look_ahead, token = self.look_ahead, int(seen[0, -1])
        look_ahead.text += chr(token)
        if self.tokens[self.at + 1 : self.at + 2] == [token]:
            look_ahead.counts.accepted += 1
            self.at += 1
            return self.at
        if self.log is not None:
            look_ahead.note(self.at + 1)
            self._go_back()
        proposed = look_ahead.propose(seen.shape[1] - 1)
        self.tokens, self.at = [token, *map(ord, proposed)], 0
        self.step.ids[0, : len(self.tokens)] = torch.tensor(self.tokens)
        if proposed:
            self.log = look_ahead.free_log(self.cache)
            self.step.run(self.log, len(self.tokens))
            look_ahead.count(len(proposed))
        else:
            self.step.run(length=1)
        return 0

    def _go_back(self) -> None:
        """Let the cache hold, and the step start from, the state after the last token that was taken."""
        self.log.restore(self.cache.emamba, self.at)
        layers = self.cache.emamba.layers
        self.step.start_from([x.conv_states[0] for x in layers], [x.recurrent_states[0] for x in layers])
        self.log = None

    def finish(self, seen: Tensor) -> None:
        if self.log is not None:
            self._go_back()
        super().finish(seen)
