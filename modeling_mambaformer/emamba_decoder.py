# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba's next token in one call of compiled code (`native/decode_step.cpp`), where nothing forbids it.

It reads the same parameters and the same cache as transformers' modules do, so that both may take turns on one
sequence. Where it does not apply it returns `None`, and the modules are run.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from transformers import DynamicCache, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaModel, MambaRMSNorm

from .mamba_mixer import SelectiveScanMixer
from .module_snapshot import Snapshot, is_plain_call, report
from .packed_weights import (
    DECODE_LIBRARY,
    STORED,
    WEIGHT_FORMATS,
    WIDEST_INT8,
    PackedWeights,
    PackingKeeper,
    RunArgs,
)
from .quantized_modules import ROUNDED, RoundedEmbedding, RoundedLinear
from .selective_scan import scan_backend
from .state_log import StateLog

OFF = "off"
DEFAULT_DECODE = "float32"
KNOWN = (MambaForCausalLM, MambaModel, MambaBlock, MambaRMSNorm, SelectiveScanMixer)
PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, RoundedLinear, RoundedEmbedding)


def obstacle(emamba: nn.Module, snapshot: Snapshot, weight_format: str) -> str | None:
    """Why the compiled step does not apply to this EMamba, or `None` if it does."""
    if DECODE_LIBRARY is None:
        return "the library was not built; install mambaformer with a C++ compiler at hand"
    if type(emamba) is not MambaForCausalLM:
        return f"it serves Mamba-1 as transformers has it, and this is a {type(emamba).__name__}"
    if snapshot.hooked():
        return "hooks or replaced forward methods want to see its modules run"
    for module in snapshot.modules:
        known = type(module) in (*KNOWN, *PLAIN) or not (module._parameters or module._modules)
        if not (known or isinstance(module, nn.ModuleList)):
            return f"it has a {type(module).__name__} inside; merge adapters to have it back"
    if emamba.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {emamba.config.hidden_act!r}, not 'silu'"
    for _, name, parameter in snapshot.slots:
        if parameter is None:
            continue
        known = name == ROUNDED or parameter.dtype in STORED
        if parameter.device.type != "cpu" or not known or type(parameter) is not nn.Parameter:
            return f"its {name} is {parameter.dtype} on {parameter.device}, not float32 or bfloat16 on the CPU"
        rounded = weight_format == "int8" or name == ROUNDED
        if rounded and parameter.ndim == 2 and parameter.shape[1] > WIDEST_INT8:
            return f"its {name} has {parameter.shape[1]} columns, more than int8 products can sum in 32 bits"
    if scan_backend() != "native":
        return "the compiled scan was not built, or MAMBAFORMER_SCAN forbids it"
    return None


class EMambaDecoder(PackingKeeper[PackedWeights]):
    """
    Runs single tokens of EMamba through the compiled step.

    The weights are packed when first needed, and again when PyTorch tells that they or the modules have changed; a new
    source also compares a sample of the values. A copy of a decoder starts without packed weights.

    Args:
        weight_format (`str`): `float32` (the exact values), `bfloat16`, `int8`, or `off`. Layers that the model itself
            holds rounded (`quantized_modules`) stay as they are in all of these.

    Raises:
        ValueError: for an unknown `weight_format`.
    """

    def __init__(self, weight_format: str = DEFAULT_DECODE):
        if weight_format not in (OFF, *WEIGHT_FORMATS):
            raise ValueError(f"weight_format is {weight_format!r}: choose one of {[OFF, *WEIGHT_FORMATS]}.")
        super().__init__(weight_format)

    def prepare(self, emamba: nn.Module) -> PackedWeights | None:
        """
        Pack the weights of `emamba`, unless they are packed and unchanged; to be called before a new sequence.

        Returns:
            the packed weights, or `None` where the compiled step does not apply, which is logged once.
        """
        if self.weight_format == OFF:
            return None
        if self._unchanged(emamba) and self._ready[1] is not None:
            return self._ready[1]
        snapshot, packed = Snapshot(emamba), None
        reason = obstacle(emamba, snapshot, self.weight_format)
        if reason is None:
            packed = PackedWeights(emamba, self.weight_format)
        else:
            level = "info" if self.weight_format == DEFAULT_DECODE else "warning"
            report("EMamba's compiled decoding step", reason, level)
        self._ready = (snapshot, packed)
        return packed

    def step(
        self, emamba: nn.Module, cache: DynamicCache, ids: Tensor, log: StateLog | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """
        Read one more token per row; or several tokens of one row, its state being kept after each.

        Args:
            emamba: the model. cache: its state, updated in place. ids: `(B, 1)` long.
            log: where to keep the states of the one row of `ids` `(1, T)`; `cache` is then left as it is.

        Returns:
            final hidden states `(B, T, D)` in the weights' dtype and logits `(B, T, V)` in float32, the same whether
            tokens are read one by one or together; `None`, with nothing done, where the modules have to be run.

        Raises:
            IndexError: for an id outside the vocabulary.
            MemoryError: where the workspace finds no memory.
        """
        found = None if log is None and ids.shape[1] != 1 else self._memory(emamba, cache, ids)
        return None if found is None else run_step(found[0], ids.contiguous(), *found[1:], log)

    def bind(self, emamba: nn.Module, cache: DynamicCache, ids: Tensor) -> BoundStep | None:
        """
        The same step, to be run many times on one buffer `ids` `(B, T)` long and on `cache`, which nobody else may
        replace meanwhile, nor change the model. `None` where the modules have to be run.
        """
        found = self._memory(emamba, cache, ids)
        return None if found is None else BoundStep(found[0], ids, *found[1:])

    def _memory(
        self, emamba: nn.Module, cache: DynamicCache, ids: Tensor
    ) -> tuple[PackedWeights, list[Tensor], list[Tensor]] | None:
        """Weights and states of a step, or `None` where it does not apply."""
        if self.weight_format == OFF or not may_run(emamba, ids):
            return None
        if self._ready is None or (self._ready[1] is not None and not self._ready[0].holds(emamba)):
            self.prepare(emamba)
        packed = self._ready[1]
        if packed is None or self._ready[0].modules[0] is not emamba:
            return None
        states = cached_states(cache, packed, ids.shape[0])
        return None if states is None else (packed, *states)


def may_run(emamba: nn.Module, ids: Tensor) -> bool:
    """Whether nothing traces, differentiates or casts this call; gradients and training need the modules."""
    return is_plain_call(emamba) and type(ids) is Tensor and ids.dtype == torch.long and ids.is_cpu


def cached_states(cache: DynamicCache, packed: PackedWeights, batch: int) -> tuple[list[Tensor], list[Tensor]] | None:
    """The cache's own windows `(B, D, K)` and states `(B, D, N)` of all layers, or `None` if they do not fit."""
    if len(cache.layers) != len(packed.layers):
        return None
    windows, states = [], []
    for layer in cache.layers:
        window, state = layer.conv_states[0], layer.recurrent_states[0]
        if (
            window is None
            or state is None
            or not layer.has_previous_state[0]
            or layer.record_past
            or window.shape != (batch, *packed.window_shape)
            or state.shape != (batch, *packed.state_shape)
            or window.dtype not in STORED
            or state.dtype != torch.float32
            or not (window.is_cpu and window.is_contiguous() and state.is_contiguous())
        ):
            return None
        windows.append(window)
        states.append(state)
    return (windows, states) if len({window.dtype for window in windows}) == 1 else None


class BoundStep:
    """
    The compiled step on memory that stays where it is, to be run for one token after another.

    Args:
        packed: the weights. ids: `(B, T)` long, contiguous, read anew at each run.
        windows, states: as `cached_states` returns them, updated by each run. The caller answers for their shapes.

    Attributes:
        hidden: `(B, T, D)` final hidden states, of the weights' precision. logits: `(B, T, V)`. Both float32, and
            overwritten by each run.
    """

    def __init__(self, packed: PackedWeights, ids: Tensor, windows: list[Tensor], states: list[Tensor]):
        batch, length = ids.shape
        self.call = RunArgs(step=packed.args)
        self.args = args = self.call.step  # the same memory
        self.ids, self.dtype, self.packed = ids, packed.dtype, packed
        self.hidden = torch.empty(batch, length, args.hidden, dtype=torch.float32)
        self.logits = torch.empty(batch, length, args.vocab, dtype=torch.float32)
        args.ids, args.hidden_out, args.logits = ids.data_ptr(), self.hidden.data_ptr(), self.logits.data_ptr()
        args.batch, args.window_format = batch, STORED[windows[0].dtype]
        self.place = StateLog(windows, states)
        args.windows, args.states = self.place.window_pointers, self.place.state_pointers

    def keep_embeddings(self) -> Tensor:
        """From now on, let each run leave the embeddings of `ids`; returns their memory, `(B, T, D)` float32."""
        self.embedded = torch.zeros_like(self.hidden)
        self.args.embedded = self.embedded.data_ptr()
        return self.embedded

    def run(self, log: StateLog | None = None, length: int | None = None) -> None:
        """
        Read `ids`, or the first `length` of one row.

        Args:
            log: receives the states after each, from its beginning; the step's own stay, and the next run begins with
                them again. Without, there is one token a row, and its states take the place of the former.

        Raises:
            ValueError: where a log does not fit. IndexError, MemoryError: as `EMambaDecoder.step`.
        """
        self.prepare(log, length)
        self.check(DECODE_LIBRARY.mambaformer_decode_run(ctypes.byref(self.call)))
        if self.dtype != torch.float32:
            self.hidden.copy_(self.hidden.to(self.dtype))

    def prepare(self, log: StateLog | None = None, length: int | None = None) -> None:
        """Let `call` be what `run` does; the arguments are the same, and so is the `ValueError`."""
        call, args, batch = self.call, self.args, len(self.ids)
        length = self.ids.shape[1] if length is None else length
        to = self.place if log is None else log
        rows, tokens = (batch, length) if log is None else (length, batch)
        if tokens != 1 or rows > to.capacity or len(to.states) != args.layer_count:
            raise ValueError(f"{batch} rows of {length} tokens do not fit a log of {to.capacity} for one row.")
        call.length, call.window_log, call.state_log = length, to.window_pointers, to.state_pointers
        args.threads = self.packed.threads(batch * length)

    def check(self, error: int) -> None:
        """Raise what a call of the library tells: IndexError or MemoryError, as `EMambaDecoder.step`."""
        if error == 2:
            raise IndexError(f"a token id is outside [0, {self.args.vocab}): {self.ids.flatten().tolist()}")
        if error:
            raise MemoryError(
                f"a decoding step of {len(self.ids)} rows found no memory for its workspace; use a smaller batch"
            )


def run_step(
    packed: PackedWeights, ids: Tensor, windows: list[Tensor], states: list[Tensor], log: StateLog | None = None
) -> tuple[Tensor, Tensor]:
    """One run of a `BoundStep`; returns as `EMambaDecoder.step`."""
    step = BoundStep(packed, ids, windows, states)
    step.run(log)
    return step.hidden.to(packed.dtype), step.logits
