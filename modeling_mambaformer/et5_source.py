# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Keys and values of sources for all layers of ET5's decoder, in one call (`native/et5_source.cpp`)."""

from __future__ import annotations

import ctypes
from itertools import chain

from torch import Tensor

from .et5_pass import PackedET5, check_error
from .packed_weights import DECODE_LIBRARY, Matrix


class SourceArgs(ctypes.Structure):
    """`SourceArgs` of native/et5_source.cpp."""

    _fields_ = [("matrices", ctypes.POINTER(Matrix)), ("to", ctypes.POINTER(ctypes.c_void_p))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("states", "mask")]
    _fields_ += [("sources", ctypes.POINTER(ctypes.c_int64))]
    _fields_ += [(name, ctypes.c_int64) for name in ("matrix_count", "count", "length", "heads", "width", "hidden")]
    _fields_ += [("threads", ctypes.c_int64)]


def read_sources(
    packed: PackedET5, states: Tensor, mask: Tensor, sources: list[int], cross: list[tuple[Tensor, Tensor]]
) -> None:
    """
    Write keys and values of some sources' tokens into `cross`; what stands for their padding stays as it is.

    Args:
        states: encoder states `(B0, S, D)` in float32, contiguous. mask: `(B0, S)`, zero on padding.
        sources: which of them.
        cross: keys and values of each layer, `(B0, H, S, K)` in float32, contiguous.

    Raises:
        MemoryError: where the workspace finds no memory.
    """
    memories = [x.data_ptr() for x in chain.from_iterable(cross)]
    mask = mask.bool().contiguous()
    args = SourceArgs(
        matrices=packed.cross,
        to=(ctypes.c_void_p * len(memories))(*memories),
        states=states.data_ptr(),
        mask=mask.data_ptr(),
        sources=(ctypes.c_int64 * len(sources))(*sources),
        matrix_count=len(packed.cross),
        count=len(sources),
        length=states.shape[1],
        heads=packed.model.heads,
        width=packed.model.width,
        hidden=packed.model.hidden,
        threads=packed.threads(len(sources) * states.shape[1]),
    )
    error = DECODE_LIBRARY.mambaformer_et5_source(ctypes.byref(args))
    check_error(error, f"keys and values of {len(sources)} sources")
