# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""EMamba's and the router's compiled steps for one token after another of a generation, bound to memory that stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache_mambaformer import MambaFormerCache
from .emamba_decoder import BoundStep
from .outputs_mambaformer import EMAMBA, ENDED, ET5, RouteTrace
from .router_step import RouterStep, bind_router, likeliest
from .routing_pass import Choice, ask_et5, merge_experts


class CompiledSteps:
    """
    Reads tokens with EMamba's and the router's compiled steps; ET5 is asked as in `forward`.

    Args:
        step, router: bound to each other's memory, which they write over at each token: the step to `step.ids`
            `(B, T)`, T being 1, the router to their first position; no router where EMamba writes every token.
        ended: `(B, 1)` bool, which the router reads.

    Attributes:
        top: `(B,)` long, the likeliest tokens of what `read` returned; `None` if they are not known yet.
    """

    @classmethod
    def room(cls, cache: MambaFormerCache) -> int:
        """Tokens that the step may read at once."""
        return 1

    @classmethod
    def bind(cls, model: nn.Module, cache: MambaFormerCache, rows: int) -> CompiledSteps | None:
        """Steps on the memory of `cache`; `None` where `forward` has to be called."""
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
            return cls(model, cache, step, None, ended)
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
        return None if router is None else cls(model, cache, step, router, ended)

    def __init__(
        self, model: nn.Module, cache: MambaFormerCache, step: BoundStep, router: RouterStep | None, ended: Tensor
    ):
        self.model, self.cache, self.step, self.router, self.ended = model, cache, step, router, ended
        self.ends_at: Tensor | None = None  # of the cache, when `ended` was last written
        self.top: Tensor | None = None
        self.levels: list[Tensor] = []  # margin and EMamba's log-probability, (2, B, 1) a position
        self.choices: list[Tensor] = []  # expert and gap, (2, B, 1) a position
        self.asked: list[tuple[int, RouteTrace]] = []  # positions at which ET5 spoke for some row

    def read(self, seen: Tensor) -> Tensor:
        """Logits `(B, V)` after `seen` `(B, t)`, of which the last token is new."""
        cache, router = self.cache, self.router
        cache.decoder_ids = seen
        if cache.ends_at is not self.ends_at:
            self.ends_at = cache.ends_at
            torch.le(cache.ends_at, seen.shape[1], out=self.ended[:, 0])
        at = self._advance(seen)
        logits = self.step.logits[:, at : at + 1]  # (B, 1, V)
        if router is None:
            self._note_emamba(logits[:, 0])
            return logits[:, 0]
        router.move_to(at)
        router.args.threshold = cache.request.threshold_at(router.state.position)
        router.run()
        self.levels.append(router.levels.clone())
        self.choices.append(router.choices.clone())
        if ET5 not in router.expert.flatten().tolist():
            self.top = router.top[:, 0].clone()
            return logits[:, 0]
        self.top = None
        asked = router.expert == ET5  # (B, 1)
        choice = Choice(router.expert, router.gap, router.margin, asked, logits, router.state)
        said = ask_et5(self.model, cache, asked, seen.shape[1] - 1)  # (B, 1, V)
        merged, trace = merge_experts(self.model, cache.request, choice, said, 1)
        self.asked.append((len(self.choices) - 1, trace))
        return merged[:, 0]

    def _advance(self, seen: Tensor) -> int:
        """Let EMamba have read the last token of `seen`; returns its place in the step's memory."""
        self.step.ids.copy_(seen[:, -1:])
        self.step.run()
        return 0

    def _note_emamba(self, logits: Tensor) -> None:
        """Record a position at which EMamba speaks for all rows, no router having been asked."""
        rows = len(self.ended)
        self.top = torch.empty(rows, dtype=torch.long)
        levels = torch.full((2, rows, 1), float("nan"), dtype=torch.float32)  # no margin
        likeliest(logits, self.top, levels[1])
        expert = torch.where(self.ended, ENDED, EMAMBA)  # (B, 1)
        self.levels.append(levels.masked_fill_(self.ended, float("nan")))
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
