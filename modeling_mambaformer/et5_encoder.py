# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
ET5's encoder in one call of compiled code (`native/et5_encoder.cpp`), where nothing forbids it.

The modules' frame costs a small model more than its products do, and a long source's matrix of all pairs of positions
costs memory and time. Neither is needed.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from .et5_pass import OFF, CompiledStack, ET5Decoder, Et5Model, PackedStack, check_error
from .packed_weights import DECODE_LIBRARY


class EncoderArgs(ctypes.Structure):
    """`EncoderArgs` of native/et5_encoder.cpp."""

    _fields_ = [("model", Et5Model)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("ids", "lengths", "distance_bias", "states")]
    _fields_ += [(name, ctypes.c_int64) for name in ("sources", "longest", "threads")]


class PackedEncoder(PackedStack):
    """The compiled encoder's view of ET5's encoder; arguments as of `PackedStack`."""

    def __init__(self, et5: nn.Module, weight_format: str):
        super().__init__(et5, et5.encoder, weight_format)
        self.checked = self.sample()


class ET5Encoder(CompiledStack[PackedEncoder]):
    """Runs ET5's encoder in compiled code; see `CompiledStack`."""

    WHAT = "ET5's compiled encoder"
    pack = staticmethod(PackedEncoder)

    @staticmethod
    def modules(et5: nn.Module) -> tuple[nn.Module, ...]:
        """The encoder."""
        return (et5.encoder,)

    def encode(self, et5: nn.Module, ids: Tensor, mask: Tensor) -> Tensor | None:
        """
        Read sources `ids` `(n, S)` of whole numbers, `mask` `(n, S)` being zero on padding.

        Returns:
            states `(n, S, D)` in float32, zero on padding; `None` where the modules have to be run.

        Raises:
            IndexError: for an id outside the vocabulary.
            MemoryError: where the workspace finds no memory.
        """
        if not ids.numel() or not ids.is_cpu or not is_whole(mask):
            return None
        packed = self.packed(et5, check=True)
        return None if packed is None else run_encoder(packed, ids.long(), mask)


def is_whole(mask: Tensor) -> bool:
    """Whether no row of a mask `(n, S)` has padding between its tokens."""
    begins = torch.nn.functional.pad(mask.bool(), (1, 0)).diff(dim=1) & mask.bool()  # (n, S)
    return bool((begins.sum(1) <= 1).all())


def run_encoder(packed: PackedEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Run the packed encoder; as `ET5Encoder.encode`."""
    mask = mask.bool()
    lengths = mask.sum(1)  # (n,)
    tokens = ids[mask]  # (N,), source after source
    longest = max(1, int(lengths.max()))
    biases, first = packed.distance_bias(before=longest - 1, after=longest - 1)
    bias = biases[:, first : first + 2 * longest - 1].contiguous()  # (H, 2 L - 1)
    found = torch.empty(len(tokens), packed.model.hidden, dtype=torch.float32)
    args = EncoderArgs(
        model=packed.model,
        ids=tokens.data_ptr(),
        lengths=lengths.data_ptr(),
        distance_bias=bias.data_ptr(),
        states=found.data_ptr(),
        sources=len(lengths),
        longest=longest,
        threads=packed.threads(len(tokens)),
    )
    error = DECODE_LIBRARY.mambaformer_et5_encode(ctypes.byref(args))
    check_error(error, f"sources of {len(tokens)} tokens together", tokens, packed.model.vocab)
    if len(tokens) == mask.numel():
        return found.view(*mask.shape, -1)
    states = torch.zeros(*mask.shape, packed.model.hidden, dtype=torch.float32)
    states[mask] = found
    return states


def compiled_parts(weight_format: str) -> tuple[ET5Encoder, ET5Decoder]:
    """
    Encoder and decoder for `config.et5_decode`. `int8` concerns the decoder, which reads its weights at each pass.

    Raises:
        ValueError: for an unknown `weight_format`.
    """
    decoder = ET5Decoder(weight_format)
    return ET5Encoder(OFF if weight_format == OFF else "float32"), decoder
