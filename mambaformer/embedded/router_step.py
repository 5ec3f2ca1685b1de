# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The router's features, margin and choice in one call of compiled code (`native/router_step.cpp`).

It does what `router_inputs`, `TokenRouter.encode` and `TokenRouter.choose` do, for a router in float32 on a CPU that
nothing trains, traces or listens to. Where it does not apply it returns `None`, and those are run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .module_snapshot import is_plain_call
from .packed_weights import DECODE_LIBRARY
from .router import RouterState, TokenRouter
from .router_features import FEATURE_GROUPS, complexity, domain, length

GROUP_CODES: dict[Callable | None, int] = {complexity: 0, length: 1, domain: 2}  # of native/router_step.cpp
POINTERS = (
    "ids embeddings states logits source_length source_domain hidden_proj feature_weight feature_bias past_weight "
    "score_weight score_bias domain_weight groups allowed ended previous domain_sum embedding_sum since spent seen "
    "margin log_top expert gap top"
)
INTEGERS = "batch length dim vocab rank width features group_count position first_new cap max_target_length threads"


class RouterArgs(ctypes.Structure):
    """`RouterArgs` of native/router_step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS.split()] + [("threshold", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_int64) for name in INTEGERS.split()]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """
    Likeliest tokens `(...)` long and their log-probabilities in nats, float32, by logits `(..., V)`; `None` where
    compiled code does not serve them.
    """
    plain = logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous() and logits.numel() > 0
    if not plain or not hasattr(DECODE_LIBRARY, "mambaformer_likeliest"):
        return None
    top = torch.empty(logits.shape[:-1], dtype=torch.long)
    log_top = torch.empty(logits.shape[:-1], dtype=torch.float32)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (top, log_top))
    rows, vocab = ctypes.c_int64(top.numel()), ctypes.c_int64(logits.shape[-1])
    DECODE_LIBRARY.mambaformer_likeliest(ctypes.c_void_p(logits.data_ptr()), rows, vocab, *pointers)
    return top, log_top


class RouterRecord:
    """
    What the router found in up to `runs` runs on T positions of B rows each, in memory that compiled code writes.

    Attributes:
        levels: `(runs, 2, B, T)` float32: the margin, and the log-probability in nats of EMamba's likeliest token;
            both NaN after the end of an answer.
        choices: `(runs, 2, B, T)` long: expert and gap, as in `RouteTrace`.
        top: `(runs, B, T)` long, EMamba's likeliest tokens.
    """

    def __init__(self, runs: int, rows: int, positions: int):
        self.levels = torch.empty(runs, 2, rows, positions, dtype=torch.float32)
        self.choices = torch.empty(runs, 2, rows, positions, dtype=torch.long)
        self.top = torch.empty(runs, rows, positions, dtype=torch.long)

    def grown(self) -> RouterRecord:
        """One of twice the runs, which begins with these."""
        larger = RouterRecord(2 * len(self.top), *self.top.shape[1:])
        for name in ("levels", "choices", "top"):
            getattr(larger, name)[: len(self.top)] = getattr(self, name)
        return larger


class RouterStep:
    """
    T positions of B rows, and the memory of the call that chooses there: it may be run again, on the positions that
    follow, once `ids`, `embeddings`, `states`, `logits` and `ended` hold what belongs to them.

    Args:
        tensors: the router's weights and the call's inputs by the names of `RouterArgs`, contiguous.
        state: the router's before these positions, which stays as it is. threshold, cap, first_new: as in
            `TokenRouter.choose`.

    Attributes:
        state: the router's state after the last position, overwritten by each run.
        record: what was found, of one run.
    """

    def __init__(
        self,
        router: TokenRouter,
        tensors: dict[str, Tensor],
        state: RouterState,
        threshold: float,
        cap: int | None,
        first_new: int,
    ):
        self.ids = tensors["ids"]
        batch, self.count = self.ids.shape
        names = ("previous", "since", "spent", "domain_sum", "embedding_sum", "seen")
        updated = {name: getattr(state, name).clone() for name in names}
        self.state = RouterState(**updated, position=state.position)
        self.tensors = {**tensors, **updated}
        self.record = RouterRecord(1, batch, self.count)
        self.groups = (ctypes.c_int64 * len(router.groups))(
            *(GROUP_CODES[FEATURE_GROUPS[name].compute] for name in router.groups)
        )
        (margin, log_top), (expert, gap) = self.record.levels[0], self.record.choices[0]
        found = {"margin": margin, "log_top": log_top, "expert": expert, "gap": gap, "top": self.record.top[0]}
        addresses = {name: tensor.data_ptr() for name, tensor in (self.tensors | found).items()}
        self.args = args = RouterArgs(**addresses, threshold=threshold, groups=ctypes.addressof(self.groups))
        args.batch, args.length = batch, self.count
        args.dim, args.vocab = tensors["states"].shape[-1], tensors["logits"].shape[-1]
        args.rank, args.width, args.features = router.hidden_proj.out_features, *router.feature_proj.weight.shape
        args.group_count, args.first_new = len(self.groups), first_new
        args.cap, args.max_target_length = -1 if cap is None else cap, router.max_target_length
        args.threads = torch.get_num_threads()

    def run(self) -> None:
        """
        Choose at all positions, and let `state` be that after them.

        Raises:
            IndexError: for an id outside the vocabulary.
            MemoryError: where the workspace finds no memory.
        """
        self.args.position = self.state.position
        error = DECODE_LIBRARY.mambaformer_router_step(ctypes.byref(self.args))
        if error == 2:
            raise IndexError(f"a token id is outside [0, {self.args.vocab}): {self.ids.flatten().tolist()}")
        if error:
            raise MemoryError(f"routing {self.args.batch} rows found no memory for its workspace; use a smaller batch")
        self.state.position += self.count


def bind_router(
    router: TokenRouter,
    embeddings: Callable[[Tensor], Tensor],
    ids: Tensor,
    hidden: Tensor,
    logits: Tensor,
    state: RouterState,
    scalars: tuple[Tensor, Tensor],
    allowed: Tensor,
    ended: Tensor,
    threshold: float,
    cap: int | None,
    first_new: int,
) -> RouterStep | None:
    """
    Prepare to choose at decoder positions `ids` `(B, T)`, one after another, each seeing the choices before it.

    Args:
        embeddings: gives EMamba's embeddings `(B, T, D)` of `ids`. hidden: `(B, T, D)`. logits: `(B, T, V)`, EMamba's.
        state, scalars: the router's state before these positions and the sources' scalars, per row.
        allowed: `(B,)` bool, the sequence gate. ended: `(B, T)` bool. threshold, cap, first_new: as in
            `TokenRouter.choose`.

    Returns:
        the step, not run yet, on the memory of those arguments that are float32 and contiguous; `None` where PyTorch
        has to choose.
    """
    inputs = (ids, hidden, logits, state.embedding_sum, *scalars, allowed, ended)
    weights = plain_weights(router) if may_run(router, inputs) else None
    if weights is None:
        return None
    tensors = {
        **weights,
        "ids": ids.contiguous(),
        "embeddings": embeddings(ids).float().contiguous(),  # (B, T, D)
        "states": hidden.float().contiguous(),
        "logits": logits.float().contiguous(),
        "source_length": scalars[0].float().contiguous(),
        "source_domain": scalars[1].float().contiguous(),
        "allowed": allowed.contiguous(),
        "ended": ended.contiguous(),
    }
    return RouterStep(router, tensors, state, threshold, cap, first_new)


def may_run(router: TokenRouter, inputs: tuple[Tensor, ...]) -> bool:
    """Whether this router may be run compiled on `inputs`: plain memory of a CPU, no gradients, nobody who traces."""
    return (
        type(router) is TokenRouter
        and hasattr(DECODE_LIBRARY, "mambaformer_router_step")
        and is_plain_call(router)
        and all(type(x) is Tensor and x.is_cpu for x in inputs)
        and all(FEATURE_GROUPS[name].compute in GROUP_CODES for name in router.groups)
    )


def plain_weights(router: TokenRouter) -> dict[str, Tensor] | None:
    """The router's weights by the names of `RouterArgs`; `None` if they are not float32, or somebody listens."""
    layers = [router.hidden_proj, router.feature_proj, router.past_proj, router.score]
    if any(type(x) is not nn.Linear or x._forward_hooks or x._forward_pre_hooks for x in layers):
        return None
    if type(router.act) is not nn.GELU or router.act.approximate != "none":
        return None
    weights = {
        "hidden_proj": router.hidden_proj.weight,
        "feature_weight": router.feature_proj.weight,
        "feature_bias": router.feature_proj.bias,
        "score_weight": router.score.weight,
        "score_bias": router.score.bias,
        "domain_weight": router.domain_weight,
    }
    if router.uses_past:
        weights["past_weight"] = router.past_proj.weight
    plain = all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in weights.values())
    return weights if plain else None
