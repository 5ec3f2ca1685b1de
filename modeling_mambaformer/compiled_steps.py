# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""EMamba's and the router's compiled steps for one token after another of a generation, bound to memory that stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .et5_pass import BoundET5
from .greedy_run import GreedyRun
from .outputs_mambaformer import ET5, RouteTrace
from .router_step import RouterRecord, bind_router
from .routing_pass import Choice, ask_et5, merge_experts


class CompiledSteps:
    """
    Reads tokens with EMamba's and the router's compiled steps; ET5 is asked as in `forward`.

    Args:
        greedy: its step and router are bound to each other's memory, which they write over at each token: the step to
            `step.ids` `(B, T)`, T being 1, the router to their first position.
    """

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        """Tokens that the step may read at once."""
        return 1

    @classmethod
    def bind(
        cls, model: nn.Module, cache: MambaFormerCache, rows: int, ends: set[int], pad: int
    ) -> CompiledSteps | None:
        """Steps on the memory of `cache`, for answers that `ends` end; `None` where `forward` has to be called."""
        request = cache.request
        if request.routing not in ("auto", "emamba") or cache.emamba is None:
            return None
        step = model.emamba_decoder.bind(
            model.emamba, cache.emamba, torch.zeros(rows, cls.room(cache), dtype=torch.long)
        )
        if step is None:
            return None
        ended = torch.zeros(rows, 1, dtype=torch.bool)
        if request.routing == "emamba":
            return cls(model, cache, GreedyRun(step, None, ended, ends, pad))
        embedded = step.keep_embeddings()  # (B, T, D)
        router = bind_router(
            model.router,
            lambda _: embedded[:, :1],
            step.ids[:, :1],
            step.hidden[:, :1],
            step.logits[:, :1],
            cache.router,
            cache.row_scalars(),
            request.allows(cache.gate_logit[cache.row_source]),
            ended,
            request.threshold,
            request.cap,
            request.first_new,
        )
        return None if router is None else cls(model, cache, GreedyRun(step, router, ended, ends, pad))

    def __init__(self, model: nn.Module, cache: MambaFormerCache, greedy: GreedyRun):
        self.model, self.cache, self.greedy = model, cache, greedy
        self.step, self.router, self.ended = greedy.step, greedy.router, greedy.ended
        self.ends_at: Tensor | None = None  # of the cache, when `ended` was last written
        self.et5 = BoundET5(model.et5_decoder)
        self.count = 0  # positions read
        self.record = RouterRecord(64, len(self.ended), 1)
        self.asked: list[tuple[int, RouteTrace]] = []  # positions at which ET5 spoke for some row

    def read_on(self, answers: Tensor, length: int, most: int) -> tuple[Tensor, int]:
        """
        Read the last of `length` tokens of `answers` `(B, room)`, and at most `most` positions in all.

        Returns:
            the likeliest tokens `(B,)` after the last position, and how many were read; the tokens between them have
            been put into `answers`. No row ends in these but with the tokens returned.
        """
        if self.count == len(self.record.top):
            self.record = self.record.grown()
        if self.cache.ends_at is not self.ends_at:
            self.ends_at = self.cache.ends_at
            torch.le(self.cache.ends_at, length, out=self.ended[:, 0])
        most = min(most, len(self.record.top) - self.count)
        first = 0 if self.router is None else self.router.state.position
        thresholds = [self.cache.request.threshold_at(at) for at in range(first, first + most)]
        read, asked = self.greedy.run(answers, length, thresholds, self.record, self.count)
        self.count += read
        self.cache.decoder_ids = seen = answers[:, : length + read - 1]
        return self._ask(seen) if asked else self.record.top[self.count - 1, :, 0], read

    def _ask(self, seen: Tensor) -> Tensor:
        """The likeliest tokens `(B,)` where ET5 is asked after the last token of `seen`."""
        position, at = self.count - 1, self.greedy.at
        (margin, _), (expert, gap) = self.record.levels[position], self.record.choices[position]
        asked = expert == ET5  # (B, 1)
        choice = Choice(expert, gap, margin, asked, self.step.logits[:, at : at + 1], self.router.state)
        said = ask_et5(self.model, self.cache, asked, seen.shape[1] - 1, self.et5)  # (B, 1, V)
        merged, trace = merge_experts(self.model, self.cache.request, choice, said, 1)
        self.asked.append((position, trace))
        return merged[:, 0].argmax(-1)

    def finish(self, seen: Tensor) -> None:
        """Leave the cache as `forward` would, having read `seen` `(B, t)`."""
        kept = (x[: self.count, ..., 0].movedim(0, -1).clone() for x in (self.record.levels, self.record.choices))
        (margin, log_p_emamba), (expert, gap) = kept  # (B, T)
        log_p_et5 = torch.full_like(margin, float("nan"))  # (B, T)
        for position, trace in self.asked:
            log_p_emamba[:, position : position + 1] = trace.log_p_emamba
            log_p_et5[:, position : position + 1] = trace.log_p_et5
        record = (expert, margin, gap, log_p_emamba, log_p_et5)
        self.cache.steps.append(dict(zip(self.cache.STEP_FIELDS, record, strict=True)))
        self.cache.decoder_ids = seen.clone()
        if self.router is not None:
            self.cache.router = self.router.state
