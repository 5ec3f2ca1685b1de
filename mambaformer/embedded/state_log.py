# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba's state after each token of a short run, all tokens having been read in one call of compiled code.

The call (`native/decode_step.cpp`) reads the weights once and does for each token what a decoding step does, to the
bit. Whoever has read too far goes back by taking the state after an earlier token.
"""

from __future__ import annotations

import ctypes

from transformers import DynamicCache

from .packed_weights import DECODE_LIBRARY, StepArgs


class RunArgs(ctypes.Structure):
    """`RunArgs` of native/decode_step.cpp."""

    _fields_ = [("step", StepArgs), ("length", ctypes.c_int64)]
    _fields_ += [(name, ctypes.POINTER(ctypes.c_void_p)) for name in ("window_log", "state_log")]


def can_log() -> bool:
    """Whether the compiled library is there and reads several tokens in a call."""
    return hasattr(DECODE_LIBRARY, "mambaformer_decode_run")


class StateLog:
    """
    Room for the states of one row after each of up to `capacity` tokens.

    Args:
        cache: the row's state, whose layers' shapes `(1, D, K)` and `(1, D, N)` and dtypes are taken.

    Attributes:
        windows, states: a layer each, `(capacity, D, K)` in the windows' dtype and `(capacity, D, N)` float32.
    """

    def __init__(self, cache: DynamicCache, capacity: int):
        self.capacity = capacity
        windows = [layer.conv_states[0] for layer in cache.layers]
        states = [layer.recurrent_states[0] for layer in cache.layers]
        self.windows = [window.new_empty(capacity, *window.shape[1:]) for window in windows]
        self.states = [state.new_empty(capacity, *state.shape[1:]) for state in states]

    def run(self, step: StepArgs, length: int) -> int:
        """Read `length` tokens of the one row of `step`, whose own states stay; returns the library's error code."""
        if step.batch != 1 or length > self.capacity or step.layer_count != len(self.states):
            raise ValueError(f"{step.batch} rows of {length} tokens do not fit a log of {self.capacity} for one row.")
        pointers = ctypes.c_void_p * len(self.states)
        args = RunArgs(step=step, length=length)
        args.window_log = pointers(*[window.data_ptr() for window in self.windows])
        args.state_log = pointers(*[state.data_ptr() for state in self.states])
        return DECODE_LIBRARY.mambaformer_decode_run(ctypes.byref(args))

    def restore(self, cache: DynamicCache, token: int) -> None:
        """Let `cache` hold the state after the run's `token`-th token, from 0; nothing is copied."""
        for layer, windows, states in zip(cache.layers, self.windows, self.states, strict=True):
            layer.conv_states[0], layer.recurrent_states[0] = windows[token : token + 1], states[token : token + 1]
