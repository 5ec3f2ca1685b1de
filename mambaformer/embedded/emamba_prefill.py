# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba reading its sources in one call of compiled code (`native/prefill.cpp`), where nothing forbids it.

It reads the weights that the decoding step reads (`emamba_decoder`), in the same format, and leaves the cache as
transformers' modules leave it. Where it does not apply it returns `None`, and the modules are run.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .emamba_decoder import EMambaDecoder, cached_states, may_run
from .emamba_stream import read_source
from .packed_weights import DECODE_LIBRARY, STORED, PackedWeights, StepArgs
from .sources import Sources
from .state_log import pointers_to

PREFILL_ABI = 1


class PrefillArgs(ctypes.Structure):
    """`PrefillArgs` of native/prefill.cpp."""

    _fields_ = [("model", StepArgs), ("lengths", ctypes.c_void_p), ("product_seconds", ctypes.c_void_p)]
    _fields_ += [("width", ctypes.c_int64), ("block", ctypes.c_int64)]


def can_read() -> bool:
    """Whether the compiled library is there and reads sources."""
    if not hasattr(DECODE_LIBRARY, "mambaformer_prefill_abi"):
        return False
    DECODE_LIBRARY.mambaformer_prefill_abi.restype = ctypes.c_int64
    return DECODE_LIBRARY.mambaformer_prefill_abi() == PREFILL_ABI


def read_sources(decoder: EMambaDecoder, emamba: nn.Module, sources: Sources) -> tuple[DynamicCache, Tensor]:
    """`prefill` where it applies, else `emamba_stream.read_source`, with their arguments and results."""
    read = prefill(decoder, emamba, sources)
    return read_source(emamba, sources) if read is None else read


def prefill(decoder: EMambaDecoder, emamba: nn.Module, sources: Sources) -> tuple[DynamicCache, Tensor] | None:
    """
    Read sources into a fresh state.

    The weights are packed first, or found to be so and unchanged: the decoder is then ready for the target.

    Args:
        decoder: whose choice of weights is taken. emamba: the model.

    Returns:
        what `emamba_stream.read_source` returns: the state, and the final hidden state at the last source token
        `(B, D)` in the weights' dtype; `None`, with nothing read, where the modules have to be run.

    Raises:
        IndexError: for an id outside the vocabulary.
        MemoryError: where the workspace finds no memory.
    """
    packed = decoder.prepare(emamba)
    if packed is None or not can_read() or not may_run(emamba, sources.left_ids):
        return None
    cache = fresh_cache(emamba, packed, len(sources.left_ids))
    states = cached_states(cache, packed, len(sources.left_ids))
    return None if states is None else (cache, run_prefill(packed, sources.left_ids, sources.lengths, *states))


def fresh_cache(emamba: nn.Module, packed: PackedWeights, rows: int) -> DynamicCache:
    """A cache whose states are there, as after a first pass of the modules, and still zero."""
    cache = DynamicCache(config=emamba.config)
    window = torch.empty(rows, *packed.window_shape, dtype=packed.dtype)  # (B, D, K)
    state = torch.empty(rows, *packed.state_shape, dtype=torch.float32)  # (B, D, N)
    for layer in cache.layers:
        layer.lazy_initialization(conv_states=window)
        layer.lazy_initialization(recurrent_states=state)
        layer.has_previous_state[0] = True
    return cache


def run_prefill(
    packed: PackedWeights,
    ids: Tensor,
    lengths: Tensor,
    windows: list[Tensor],
    states: list[Tensor],
    block: int = 0,
    seconds: ctypes.c_double | None = None,
) -> Tensor:
    """
    Call the library; the caller answers for the shapes, dtypes and contiguous memory of `windows` and `states`.

    Args:
        ids: `(B, S)` long, left-padded. lengths: `(B,)` long, tokens of each row; what stands before them is not read.
        windows, states: a layer each, `(B, D, K)` and float32 `(B, D, N)`; written, never read.
        block: tokens that pass through all layers together, 0 for the library's choice.
        seconds: receives the seconds that one thread spends in products with matrices.

    Returns:
        final hidden states at the last tokens, `(B, D)`.

    Raises:
        IndexError: for an id outside the vocabulary. MemoryError: where the workspace finds no memory.
        ValueError: for lengths that are not in [1, S].
    """
    rows, width = ids.shape
    ids, lengths = ids.contiguous(), lengths.to(torch.long).contiguous()
    if lengths.shape != (rows,):
        raise ValueError(f"lengths have shape {tuple(lengths.shape)}: give one for each of the {rows} rows.")
    args = PrefillArgs(model=packed.args, lengths=lengths.data_ptr(), width=width, block=block)
    model = args.model
    hidden = torch.empty(rows, model.hidden, dtype=torch.float32)
    model.ids, model.hidden_out, model.batch = ids.data_ptr(), hidden.data_ptr(), rows
    model.windows, model.states = pointers_to(windows), pointers_to(states)
    model.window_format, model.threads = STORED[windows[0].dtype], torch.get_num_threads()
    if seconds is not None:
        args.product_seconds = ctypes.addressof(seconds)
    error = DECODE_LIBRARY.mambaformer_prefill_run(ctypes.byref(args))
    if error == 3:
        raise ValueError(f"lengths are {lengths.tolist()} in rows of {width}: each must be in [1, {width}].")
    if error == 2:
        raise IndexError(f"a token id is outside [0, {model.vocab}): ids are in [{int(ids.min())}, {int(ids.max())}]")
    if error:
        raise MemoryError("reading sources found no memory for its workspace")
    return hidden.to(packed.dtype)
