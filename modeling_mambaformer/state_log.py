# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Where the compiled decoding step (`native/decode_step.cpp`) keeps EMamba's states: of rows, or of one row after tokens.

A call on several tokens reads the weights once and does for each token what a decoding step does, to the bit. Whoever
has read too far goes back by taking the state after an earlier token.
"""

from __future__ import annotations

import ctypes

from torch import Tensor
from transformers import DynamicCache

from .packed_weights import DECODE_LIBRARY


def can_log() -> bool:
    """Whether the compiled library is there, and so reads several tokens in a call."""
    return DECODE_LIBRARY is not None


class StateLog:
    """
    States that stay where they are in memory, and what compiled code needs to find them.

    Args:
        windows, states: a layer each, `(capacity, D, K)` and `(capacity, D, N)` float32, contiguous; the caller
            answers for that. Or all layers in one tensor.

    Attributes:
        capacity: rows, or tokens of one row. window_pointers, state_pointers: a layer each.
    """

    def __init__(self, windows: list[Tensor] | Tensor, states: list[Tensor] | Tensor):
        self.windows, self.states = windows, states
        self.capacity = windows[0].shape[0] if len(windows) else 0
        self.window_pointers, self.state_pointers = pointers_to(windows), pointers_to(states)

    @classmethod
    def for_tokens(cls, cache: DynamicCache, capacity: int, logs: int) -> list[StateLog]:
        """Some logs, each with room for the states of one row of `cache` after each of up to `capacity` tokens."""
        first, layers = cache.layers[0], len(cache.layers)
        there = first.conv_states[0], first.recurrent_states[0]
        windows, states = (x.new_empty(logs, layers, capacity, *x.shape[1:]) for x in there)
        return [cls(*parts) for parts in zip(windows.unbind(), states.unbind(), strict=True)]

    def restore(self, cache: DynamicCache, token: int) -> None:
        """Let `cache` hold the state after the `token`-th token, from 0; nothing is copied."""
        for layer, windows, states in zip(cache.layers, self.windows, self.states, strict=True):
            layer.conv_states[0], layer.recurrent_states[0] = windows[token : token + 1], states[token : token + 1]


def pointers_to(layers: list[Tensor] | Tensor) -> ctypes.Array:
    """The addresses of the parts of a list or of one tensor."""
    pointers = ctypes.c_void_p * len(layers)
    if isinstance(layers, Tensor):
        first, size = layers.data_ptr(), layers.stride(0) * layers.itemsize
        return pointers(*range(first, first + size * len(layers), size))
    return pointers(*[layer.data_ptr() for layer in layers])
