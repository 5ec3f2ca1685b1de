# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
ET5's encoder over a short source in one call of compiled code (`native/et5_pass.cpp`), where nothing forbids it.

The modules' frame costs a small model more than its products do. Long sources go to the modules, whose BLAS is faster
there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .et5_pass import OFF, CompiledStack, ET5Decoder, Et5Layer, PackedStack, call_pass

MOST_TOKENS = 64  # of all sources together, padding included


class PackedEncoder(PackedStack):
    """The compiled pass's view of ET5's encoder; arguments as of `PackedStack`."""

    def __init__(self, et5: nn.Module, weight_format: str):
        super().__init__(et5, et5.encoder, weight_format)
        self.args.is_encoder = 1
        self.checked = self.sample()


class ET5Encoder(CompiledStack[PackedEncoder]):
    """Runs ET5's encoder through the compiled pass; see `CompiledStack`."""

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
            states `(n, S, D)` in float32, of no meaning on padding; `None` where the modules have to be run.

        Raises:
            IndexError: for an id outside the vocabulary.
            MemoryError: where the workspace finds no memory.
        """
        if not 0 < ids.numel() <= MOST_TOKENS or not ids.is_cpu:
            return None
        packed = self.packed(et5, check=True)
        return None if packed is None else run_encoder(packed, ids.long(), mask)


def run_encoder(packed: PackedStack, ids: Tensor, mask: Tensor) -> Tensor:
    """Run the packed encoder; as `ET5Encoder.encode`."""
    (count, length), args = ids.shape, packed.args
    rows = torch.arange(count)
    room = torch.empty(2, count, args.heads, length, args.width, dtype=torch.float32)  # a layer's keys and values
    layers = (Et5Layer * len(packed.layers)).from_buffer_copy(packed.layers)
    for layer in layers:
        layer.keys, layer.values = room[0].data_ptr(), room[1].data_ptr()
    # As a position in the middle of twice the length sees all others: distances of both signs, (H, 2 S - 1).
    bias = packed.attention.compute_bias(1, 2 * length - 1, past_seen_tokens=length - 1)[0, :, 0].contiguous()
    states = torch.empty(count, length, args.hidden, dtype=torch.float32)
    return call_pass(packed, layers, ids, rows, rows, mask, bias, states, 0, length)


def compiled_parts(weight_format: str) -> tuple[ET5Encoder, ET5Decoder]:
    """
    Encoder and decoder for `config.et5_decode`. `int8` concerns the decoder, which reads its weights at each pass.

    Raises:
        ValueError: for an unknown `weight_format`.
    """
    decoder = ET5Decoder(weight_format)
    return ET5Encoder(OFF if weight_format == OFF else "float32"), decoder
