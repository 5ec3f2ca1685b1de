# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""How fast this machine multiplies large matrices: PyTorch's products, and on a CPU our compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ..modeling_mambaformer.et5_source import read_sources
from ..modeling_mambaformer.packed_weights import DECODE_LIBRARY, FLOAT32, INT8, Matrix
from .machine import best_seconds

SIZE, REPEATS = 1024, 5  # rows and columns of both matrices
HEADS = 16  # into which the compiled product writes its rows


def operations_a_second(product: Callable[[], object]) -> float:
    """Of a product of two square matrices of `SIZE`, the best of some."""
    return 2 * SIZE**3 / best_seconds(product, REPEATS)


def torch_speed(device: str) -> float:
    """Float32 operations a second in PyTorch's product."""
    left, right = (torch.ones(SIZE, SIZE, device=device) for _ in range(2))
    return operations_a_second(lambda: (left @ right)[0, 0].item())


def torch_int8_speed() -> float:
    """Operations a second in PyTorch's int8 product on a CPU, rounding included."""
    weights = torch.quantize_per_tensor(torch.ones(SIZE, SIZE), 1.0, 0, torch.qint8)
    packed, values = torch.ops.quantized.linear_prepack(weights, None), torch.ones(SIZE, SIZE)
    return operations_a_second(lambda: torch.ops.quantized.linear_dynamic(values, packed))


def compiled_speed(dtype: torch.dtype) -> float:
    """Operations a second in our product of float32 tokens with a matrix of float32 or int8; 0 without the library."""
    if not hasattr(DECODE_LIBRARY, "mambaformer_et5_source"):
        return 0.0
    weights, scales = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE)
    fields = {"data": weights.data_ptr(), "rows": SIZE, "columns": SIZE}
    matrix = Matrix(**fields, scale=scales.data_ptr(), format=INT8 if dtype == torch.int8 else FLOAT32)
    packed: Any = SimpleNamespace(  # what `read_sources` looks at
        cross=(Matrix * 2)(matrix, matrix),
        model=SimpleNamespace(heads=HEADS, width=SIZE // HEADS, hidden=SIZE),
        threads=lambda tokens: torch.get_num_threads(),
    )
    states, mask = torch.ones(1, SIZE, SIZE), torch.ones(1, SIZE)
    pair = (torch.empty(1, HEADS, SIZE, SIZE // HEADS), torch.empty(1, HEADS, SIZE, SIZE // HEADS))
    return 2 * operations_a_second(lambda: read_sources(packed, states, mask, [0], [pair]))


def exact_share() -> float:
    """
    The share of PyTorch's int8 rate that is left to products of all eight bits, summed exactly.

    AVX2 has no instruction for them. PyTorch's product there takes three for 32 of them (multiply and add pairs, add
    pairs, add), and is exact for activations of seven bits only: the sum of a pair has 16. To keep the eighth takes a
    fourth, which moves the activations' signs to the weights.
    """
    return 0.75 if DECODE_LIBRARY is not None and DECODE_LIBRARY.mambaformer_decode_isa() == b"avx2" else 1.0


def gemm_speeds(device: str) -> dict[str, float]:
    """
    Operations a second in large products, the higher of PyTorch's rate and ours.

    Returns:
        `gemm_flops` of float32; `int8_ops` of int8, and `exact_int8_ops` where no bit is given up. On a device other
        than a CPU all are PyTorch's of float32.
    """
    floats = torch_speed(device)
    if device != "cpu":
        return dict.fromkeys(("gemm_flops", "int8_ops", "exact_int8_ops"), floats)
    torch_int8, ours = torch_int8_speed(), compiled_speed(torch.int8)
    return {
        "gemm_flops": max(floats, compiled_speed(torch.float32)),
        "int8_ops": max(torch_int8, ours),
        "exact_int8_ops": max(exact_share() * torch_int8, ours),
    }
