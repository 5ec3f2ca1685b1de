# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The product of a rounded layer and any number of tokens in one call of compiled code (`native/linear.cpp`).

Each token is rounded to int8 with one scale, as in the decoding step, and whole numbers are multiplied. The weights
are read where the layer has them, and nothing is kept beside them. Where it does not apply it returns `None`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from .module_snapshot import is_plain_call
from .packed_weights import DECODE_LIBRARY, INT4, INT8, WIDEST_INT8, Matrix
from .rounded_weight import RoundedWeight
from .weight_rounding import GROUP, GROUP_BYTES

LINEAR_ABI = 1
FORMATS = {"int8": INT8, "int4": INT4}


class LinearArgs(ctypes.Structure):
    """`LinearArgs` of native/linear.cpp."""

    _fields_ = [("matrix", Matrix), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p)]
    _fields_ += [("tokens", ctypes.c_int64), ("threads", ctypes.c_int64)]


def can_multiply() -> bool:
    """Whether the compiled library is there and multiplies rounded layers."""
    if not hasattr(DECODE_LIBRARY, "mambaformer_linear_abi"):
        return False
    DECODE_LIBRARY.mambaformer_linear_abi.restype = ctypes.c_int64
    return DECODE_LIBRARY.mambaformer_linear_abi() == LINEAR_ABI


AVAILABLE = can_multiply()


def native_linear(layer: RoundedWeight, bias: Tensor | None, x: Tensor) -> Tensor | None:
    """
    The layer's product with float32 tokens on the CPU, for inference.

    A token's result depends neither on its neighbours nor on the number of threads.

    Args:
        layer: the matrix `(rows, columns)`. bias: `(rows,)` or none. x: `(…, columns)`.

    Returns:
        float32 `(…, rows)`; `None`, with nothing done, where something trains, differentiates, traces or casts this
        call, or the tensors are not as the compiled code reads them.

    Raises:
        MemoryError: where the workspace finds no memory.
    """
    if not (AVAILABLE and is_plain_call(layer) and is_served(layer, bias, x)):
        return None
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], layer.rows)
    matrix = Matrix(
        data=layer.qweight.data_ptr(),
        scale=layer.scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=layer.rows,
        columns=layer.columns,
        format=FORMATS[layer.weight_format],
    )
    tokens = x.numel() // layer.columns
    args = LinearArgs(matrix, x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads())
    error = DECODE_LIBRARY.mambaformer_linear(ctypes.byref(args))
    if error == 2:
        raise ValueError(f"a matrix of {layer.rows} rows and {layer.columns} columns is not served")
    if error:
        raise MemoryError(f"the product with {tokens} tokens found no memory for its workspace")
    return y


def is_served(layer: RoundedWeight, bias: Tensor | None, x: Tensor) -> bool:
    """Whether all tensors are plain ones on the CPU, of the dtypes and shapes that the compiled code reads."""
    rows, columns = layer.rows, layer.columns
    known: list[tuple[Tensor, torch.dtype, tuple[int, ...]]]
    if layer.weight_format == "int4":
        groups = -(-columns // GROUP)
        known = [(layer.qweight, torch.uint8, (rows, groups * GROUP_BYTES))]
        known.append((layer.scales, torch.bfloat16, (rows, groups)))
    else:
        known = [(layer.qweight, torch.int8, (rows, columns)), (layer.scales, torch.float32, (rows,))]
    if bias is not None:
        known.append((bias, torch.float32, (rows,)))
    return (
        not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.is_cpu
        and x.numel() > 0
        and x.shape[-1] == columns <= WIDEST_INT8
        and all(is_plain(tensor, dtype, shape) for tensor, dtype, shape in known)
    )


def is_plain(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether it is a parameter in one piece of the CPU's memory, of this dtype and shape."""
    return (
        type(tensor) is nn.Parameter
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.is_contiguous()
    )
