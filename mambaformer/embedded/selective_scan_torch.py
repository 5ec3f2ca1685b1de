# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The selective scan in plain PyTorch: always there, any device and dtype, differentiable any number of times.

Time is cut into chunks which all run side by side, so that a scan over `L` steps takes about `3 sqrt(L)` rounds of
tensor operations instead of `L`. Decays only ever multiply, nothing is divided by a product of decays and no positive
sum is exponentiated unless `A` itself is positive: strong decay underflows to zero and nothing overflows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Upper bound of elements of one (batch, steps, dim, state) tensor: longer sequences are run in several segments.
MAX_EXPANDED_ELEMENTS = 2**24


def chunked_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba (Gu and Dao 2023, equation 2 with the discretisation of equation 4, `B` by Euler).

    Sequences come with channels last, unlike in `selective_scan`: `u`, `delta`, `z` are `(batch, length, dim)`,
    `B`, `C` are `(batch, length, state)`; `A` is `(dim, state)`, `D` and `delta_bias` are `(dim,)`, `initial_state`
    is `(batch, dim, state)`. All of one floating dtype.

    Returns:
        The output `(batch, length, dim)` and the state after the last step `(batch, dim, state)`.
    """
    batch, length, dim = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state  # (B, D, N)
    segment = max(1, min(length, MAX_EXPANDED_ELEMENTS // max(1, batch * dim * A.shape[1])))
    outputs = []
    for first in range(0, length, segment):
        part = slice(first, first + segment)
        y, state = _scan_segment(delta[:, part], (delta * u)[:, part], A, B[:, part], C[:, part], state)
        outputs.append(y)
    out = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]  # (B, L, D)
    if D is not None:
        out = out + D * u
    if z is not None:
        out = out * F.silu(z)
    return out, state


def _scan_segment(
    delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan `(B, L, D)` step sizes and inputs (already multiplied by their step size) from `state` `(B, D, N)`."""
    batch, length, dim = delta.shape
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    # Steps of size zero at the end change no state.
    padding = (0, 0, 0, chunks * steps - length)
    delta, inputs, B, C = (
        F.pad(x, padding).unflatten(1, (chunks, steps)) for x in (delta, inputs, B, C)
    )  # (B, chunks, steps, D or N)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (B, chunks, steps, D, N)
    drive = inputs.unsqueeze(-1) * B.unsqueeze(-2)  # (B, chunks, steps, D, N)
    decays, drives = decay.unbind(2), drive.unbind(2)

    # What each chunk adds on its own, and how much it keeps of what came before.
    added = drives[0]  # (B, chunks, D, N)
    for t in range(1, steps):
        added = torch.addcmul(drives[t], decays[t], added)
    kept = torch.exp(delta.sum(2).unsqueeze(-1) * A)  # (B, chunks, D, N)
    starts = []
    for chunk_kept, chunk_added in zip(kept.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(chunk_added, chunk_kept, state)  # (B, D, N)

    # The same chunks again, now from their true first states.
    h = torch.stack(starts, dim=1)  # (B, chunks, D, N)
    states = []
    for t in range(steps):
        h = torch.addcmul(drives[t], decays[t], h)
        states.append(h)
    y = torch.matmul(torch.stack(states, dim=2), C.unsqueeze(-1)).squeeze(-1)  # (B, chunks, steps, D)
    return y.flatten(1, 2)[:, :length], state
