# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
How the two experts' distributions become one on a routed token.

A merger takes both experts' logits and the margin, and returns logits. To add one, write the function, enter it in
`MERGER_FUNCTIONS`, and name it in the configuration's `MERGERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def select(emamba_logits: torch.Tensor, et5_logits: torch.Tensor, margin: torch.Tensor, kappa: float) -> torch.Tensor:
    """ET5 alone, its logits untouched."""
    return et5_logits


def mix(emamba_logits: torch.Tensor, et5_logits: torch.Tensor, margin: torch.Tensor, kappa: float) -> torch.Tensor:
    """Log of the gated mixture: log(phi p_T + (1 - phi) p_M), phi = sigmoid(margin)."""
    log_t = torch.log_softmax(et5_logits.float(), dim=-1) + F.logsigmoid(margin.float())[..., None]
    log_m = torch.log_softmax(emamba_logits.float(), dim=-1) + F.logsigmoid(-margin.float())[..., None]
    return torch.logaddexp(log_t, log_m)


def complement(
    emamba_logits: torch.Tensor, et5_logits: torch.Tensor, margin: torch.Tensor, kappa: float
) -> torch.Tensor:
    """log p_T + kappa log p_M, up to normalisation (after FusionRoute, arXiv 2601.05106, Eq. 1)."""
    return torch.log_softmax(et5_logits.float(), dim=-1) + kappa * torch.log_softmax(emamba_logits.float(), dim=-1)


MERGER_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {"select": select, "mix": mix, "complement": complement}


def merge(
    name: str, emamba_logits: torch.Tensor, et5_logits: torch.Tensor, margin: torch.Tensor, kappa: float
) -> torch.Tensor:
    """
    Merge with the merger `name`.

    Args:
        emamba_logits, et5_logits: `(..., V)`.
        margin: `(...)`, used by `mix`.
        kappa: weight of EMamba in `complement`.

    Returns:
        `(..., V)` logits.
    """
    return MERGER_FUNCTIONS[name](emamba_logits, et5_logits, margin, kappa)
