# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A matrix held as int8 or 4-bit numbers only: its tensors, its values, and that it is not trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .weight_rounding import GROUP, GROUP_BYTES, dequantize_groups, dequantize_rows, quantize_groups, quantize_rows


class RoundedWeight(nn.Module):
    """
    A matrix `(rows, columns)` of rounded numbers.

    Args:
        weight_format: `int8` or `int4`, see `weight_rounding`. like: the float layer, which is not kept; on the meta
            device the tensors are left empty, to be loaded. expert: whose matrix it is, for messages.
    """

    def __init__(self, weight_format: str, like: nn.Linear | nn.Embedding, expert: str = "EMamba"):
        super().__init__()
        self.training = False  # as `train` has it
        weight = like.weight
        self.weight_format, self.expert = weight_format, expert
        self.rows, self.columns = weight.shape
        if weight.is_meta:
            groups = -(-self.columns // GROUP)
            if weight_format == "int4":
                whole = torch.empty(self.rows, groups * GROUP_BYTES, dtype=torch.uint8, device="meta")
                scale = torch.empty(self.rows, groups, dtype=torch.bfloat16, device="meta")
            else:
                whole = torch.empty(self.rows, self.columns, dtype=torch.int8, device="meta")
                scale = torch.empty(self.rows, dtype=torch.float32, device="meta")
        else:
            whole, scale = (quantize_groups if weight_format == "int4" else quantize_rows)(weight)
        self.qweight = nn.Parameter(whole, requires_grad=False)
        self.scales = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """
        The shape and dtype of the matrix, without values, as code that knows the float layer asks for.

        It is on the meta device, so that whoever would compute with it gets an error; see `dequantize`.
        """
        return torch.empty(self.rows, self.columns, dtype=torch.float32, device="meta")

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows `first` to `last` in float32, `(last - first, columns)`."""
        whole, scale = self.qweight[first:last], self.scales[first:last]
        if self.weight_format == "int4":
            return dequantize_groups(whole, scale, self.columns)
        return dequantize_rows(whole, scale)

    def train(self, mode: bool = True) -> RoundedWeight:
        """Raises `ValueError` for `mode=True`: rounded numbers have no gradient."""
        if mode:
            raise ValueError(refusal([self.expert]))
        return super().train(mode)

    def extra_repr(self) -> str:
        """Shape and format, as `print(model)` shows them."""
        return f"{self.rows}, {self.columns}, {self.weight_format}"


def refusal(experts: Iterable[str]) -> str:
    """Why the weights of these experts are not trained, and what to do instead."""
    owners = " and ".join(f"{expert}'s" for expert in experts)
    return (
        f"{owners} weights are rounded and cannot be trained: train the model that they were made from, or call "
        "`model.dequantize()` first."
    )
