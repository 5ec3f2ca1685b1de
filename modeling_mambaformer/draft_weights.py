# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The weights of `LookAheadHeads` in the form in which compiled code (`native/draft.cpp`) reads them."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from torch import nn

from .module_snapshot import Snapshot, is_plain_call
from .packed_weights import STORED, Matrix, PackedWeights, Packing, PackingKeeper, StepArgs

if TYPE_CHECKING:
    from .look_ahead_heads import LookAheadHeads

CACHED = 2**25  # bytes of weights that a processor's cache may hold
LIKELY, LIKELY_CACHED = 0.3, 0.6
"""
Chance of being right from which on a proposed token is worth its reading: low where EMamba's step waits for memory
anyway, high where it computes.
"""


class DraftArgs(ctypes.Structure):
    """`DraftArgs` of native/draft.h."""

    _fields_ = [("model", ctypes.POINTER(StepArgs))]
    _fields_ += [(name, Matrix) for name in ("in_proj", "out_proj", "rows")]
    _fields_ += [("tokens", ctypes.c_void_p), ("likely", ctypes.c_double)]
    _fields_ += [("most", ctypes.c_int64), ("threads", ctypes.c_int64)]


class PackedHeads(Packing):
    """
    What proposes beside one EMamba; it owns what it copied and refers to the rest.

    Args:
        heads: whose modules the caller has found to be plain. emamba: whose embeddings they read.
        weight_format (`str`): of their matrices, one of `WEIGHT_FORMATS`.
    """

    def __init__(self, heads: LookAheadHeads, emamba: PackedWeights, weight_format: str):
        super().__init__(weight_format)
        self.emamba, self.ids = emamba, heads.tokens.contiguous()
        names = ("in_proj", "out_proj", "rows")
        self.args = DraftArgs(
            model=ctypes.pointer(emamba.args),
            **{name: self._matrix(getattr(heads, name)) for name in names},
            tokens=self.ids.data_ptr(),
            likely=LIKELY_CACHED if emamba.step_bytes <= CACHED else LIKELY,
            most=heads.heads,
        )
        self.checked = self.sample()


class Drafter(PackingKeeper[PackedHeads]):
    """
    Keeps heads packed for compiled code.

    Args:
        weight_format (`str`): as of `PackedHeads`. What is proposed has to come fast, and need not be exact.
    """

    def __init__(self, weight_format: str = "int8"):
        super().__init__(weight_format)

    def prepare(self, heads: LookAheadHeads, emamba: PackedWeights) -> PackedHeads | None:
        """The packed heads, to be asked for before each sequence; `None` where compiled code may not stand in."""
        if not is_plain_call(heads):
            return None
        if self._unchanged(heads) and self._ready[1] is not None and self._ready[1].emamba is emamba:
            return self._ready[1]
        snapshot = Snapshot(heads)
        plain = not snapshot.hooked() and heads.tokens.is_cpu and all(map(is_plain_layer, heads.children()))
        packed = PackedHeads(heads, emamba, self.weight_format) if plain else None
        self._ready = (snapshot, packed)
        return packed


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether it is a linear layer as PyTorch has it, in float32 or bfloat16 on the CPU."""
    return type(layer) is nn.Linear and layer.weight.is_cpu and layer.weight.dtype in STORED
