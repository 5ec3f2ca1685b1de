# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Both experts of a model rounded and made float again: what its quantisation configuration says, done or undone."""

from __future__ import annotations

import torch
from torch import nn

from .quantized_et5 import check_et5, restore_et5, round_et5
from .quantized_modules import is_rounded, list_tied_weights, restore_emamba, round_emamba

CHILDREN = {"EMamba": "emamba", "ET5": "et5"}


def round_experts(model: nn.Module, weights: str | None, et5: str | None) -> None:
    """
    Hold the matrices of one expert or both as rounded numbers only.

    Args:
        model: with the children `emamba` and `et5`; on the meta device it becomes a skeleton, for loading.
        weights, et5: the format of EMamba's and of ET5's matrices; `None` leaves that expert as it is.

    Raises:
        ValueError: with nothing done, for an unknown format or family, or a model that is rounded already.
    """
    rounded = [name for name, child in CHILDREN.items() if is_rounded(getattr(model, child))]
    if rounded:
        raise ValueError(
            f"{rounded[0]}'s weights are rounded already: load the model that they were made from, and name "
            "the formats of both experts at once."
        )
    if et5 is not None:
        check_et5(model.et5, et5)  # before EMamba is changed
    if weights is not None:
        round_emamba(model.emamba, weights)
        list_tied_weights(model, "emamba")
    if et5 is not None:
        round_et5(model.et5, et5)
        list_tied_weights(model, "et5")


def restore_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers of the rounded values, in `dtype`, in place of all rounded ones."""
    if is_rounded(model.emamba):
        restore_emamba(model.emamba, dtype)
        list_tied_weights(model, "emamba")
    if is_rounded(model.et5):
        restore_et5(model.et5, dtype)
        list_tied_weights(model, "et5")
