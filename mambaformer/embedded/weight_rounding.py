# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Matrices rounded to 8 or 4 bits, and back: the formats that `native/matrix_products.h` multiplies.

`int8` has one float32 scale a row. `int4` has one bfloat16 scale for every 32 neighbouring columns, hence 4.5 bits a
weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # columns that share a scale in int4
GROUP_BYTES = GROUP // 2
TINY = torch.finfo(torch.float32).tiny


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Round a matrix `(rows, columns)` to int8, symmetrically, with one scale a row.

    Returns:
        int8 `(rows, columns)` in [-127, 127] and float32 scales `(rows,)`; their product is the rounded matrix.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127  # (rows,)
    whole = (weight / scale.clamp(min=TINY)[:, None]).round_()
    return whole.clamp_(-127, 127).to(torch.int8), scale


def dequantize_rows(whole: Tensor, scale: Tensor) -> Tensor:
    """Float32 `(rows, columns)` of int8 `(rows, columns)` and float scales `(rows,)`."""
    return whole.float() * scale.float()[:, None]


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Round a matrix `(rows, columns)` to 4 bits, with one scale for every `GROUP` columns.

    A group's largest magnitude becomes -8, so that its scale may be negative and all 16 values are of use. A row's
    last group is filled up with zeros.

    Returns:
        uint8 `(rows, groups * GROUP_BYTES)`, where the lower half of a group's byte i is its column i plus 8 and the
        upper half its column 16 + i plus 8; and bfloat16 scales `(rows, groups)`.
    """
    weight = weight.detach().float()
    rows, columns = weight.shape
    groups = F.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP)  # (rows, groups, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)  # (rows, groups)
    scale = (largest / -8).to(torch.bfloat16)
    divisor = scale.float()
    divisor = torch.where(divisor.abs() < TINY, torch.ones_like(divisor), divisor)  # a group of zeros
    whole = (groups / divisor[..., None]).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    packed = whole[..., :GROUP_BYTES] | (whole[..., GROUP_BYTES:] << 4)  # (rows, groups, GROUP_BYTES)
    return packed.flatten(1), scale


def dequantize_groups(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Float32 `(rows, columns)` of what `quantize_groups` returned for a matrix of so many columns."""
    packed = packed.unflatten(1, (-1, GROUP_BYTES))  # (rows, groups, GROUP_BYTES)
    whole = torch.cat([packed & 15, packed >> 4], dim=-1).float() - 8  # (rows, groups, GROUP)
    return (whole * scale.float()[..., None]).flatten(1)[:, :columns]
