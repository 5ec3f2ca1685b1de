# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The weights of `LookAheadHeads` in the form in which compiled code (`native/draft.cpp`) reads them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .module_snapshot import Snapshot, is_plain_call
from .packed_weights import STORED, Matrix, PackedWeights, Packing, PackingKeeper, StepArgs

if TYPE_CHECKING:
    from .look_ahead_heads import LookAheadHeads

LIKELY = 0.3  # chance of being right from which on a proposed token is worth its reading


@functools.cache
def last_cache() -> int:
    """Bytes of the processor's largest cache, as Linux tells them in KiB; else what is usual."""
    try:
        sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except OSError:
        sizes = []
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K") and size[:-1].isdigit()), default=2**25)


def reads_memory(emamba: PackedWeights) -> bool:
    """
    Whether EMamba's step waits for memory to hand over its weights.

    Where they stay in the processor's cache, a further token costs about half of a first one: more than a guess is
    worth, but less than one of a passage that is being copied.
    """
    return 2 * emamba.step_bytes > last_cache()


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
            likely=LIKELY,
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
