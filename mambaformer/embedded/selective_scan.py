# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The selective scan of Mamba: one function, and the choice between what can compute it.

| backend     | where                                          | what                                  |
|-------------|------------------------------------------------|---------------------------------------|
| `native`    | CPU, float32 (and 16-bit, computed in float32) | C++, vectorised over channels, OpenMP |
| `mamba_ssm` | CUDA, no initial state                         | the kernels of the `mamba-ssm` package |
| `torch`     | everywhere                                     | chunked PyTorch                       |

The environment variable `MAMBAFORMER_SCAN` (`torch` or `native`) forces a choice.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from .native_library import LIBRARY
from .selective_scan_native import native_selective_scan
from .selective_scan_torch import chunked_selective_scan


@functools.cache
def _mamba_ssm_scan():
    """`selective_scan_fn` of the mamba-ssm package, or None where it is not installed."""
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except Exception:  # a broken CUDA build raises more than ImportError
        return None


def scan_backend(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Which implementation serves tensors of `dtype` on `device`: `"native"`, `"torch"` or `"mamba_ssm"`.

    Raises:
        ValueError: `MAMBAFORMER_SCAN` holds an unknown name, or asks for a native library that is not built.
    """
    forced = os.environ.get("MAMBAFORMER_SCAN", "")
    if forced not in ("", "torch", "native"):
        raise ValueError(f"MAMBAFORMER_SCAN={forced!r} is not known; set it to 'torch' or 'native', or unset it")
    if forced == "native" and LIBRARY is None:
        raise ValueError(
            "MAMBAFORMER_SCAN='native', but the compiled scan was not found; install mambaformer with a C++ compiler "
            "at hand, or unset the variable"
        )
    device_type = torch.device(device).type
    if forced == "torch" or dtype == torch.float64:
        return "torch"
    if device_type == "cuda":
        return "torch" if forced == "native" or _mamba_ssm_scan() is None else "mamba_ssm"
    return "native" if device_type == "cpu" and LIBRARY is not None else "torch"


def _check(u: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for the first tensor whose rank, size, dtype or device does not fit."""
    A = others["A"]
    if u.ndim != 3 or u.shape[2] == 0:
        raise ValueError(f"u must have shape (batch, dim, length) with length >= 1, got {tuple(u.shape)}")
    if A.ndim != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"A must have shape (dim, state) with dim {u.shape[1]} as in u, got {tuple(A.shape)}")
    (batch, dim, length), state = u.shape, A.shape[1]
    expected = {
        "u": (batch, dim, length),
        "delta": (batch, dim, length),
        "A": (dim, state),
        "B": (batch, state, length),
        "C": (batch, state, length),
        "D": (dim,),
        "z": (batch, dim, length),
        "delta_bias": (dim,),
        "initial_state": (batch, dim, state),
    }
    for name, tensor in {"u": u, **others}.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} but u is on {u.device}; move them to one device")
        if (tensor.dtype == torch.float64) != (u.dtype == torch.float64):
            raise ValueError(f"{name} is {tensor.dtype} but u is {u.dtype}; float64 does not mix with other dtypes")


def selective_scan(
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
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.2, algorithm 2), with a state in and out.

    With `dt = softplus(delta + delta_bias)`:
    `h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t` and `out_t = (C_t · h_t + D u_t) silu(z_t)`.

    Every tensor argument receives gradients, also through the last state. Any strides will do; memory in which
    neighbouring channels are adjacent, i.e. `(batch, length, dim)` seen through `transpose(1, 2)`, costs no copy.

    Args:
        u (`torch.Tensor`): Input, `(batch, dim, length)`.
        delta (`torch.Tensor`): Step sizes before bias and softplus, `(batch, dim, length)`.
        A (`torch.Tensor`): Continuous-time decay, `(dim, state)`, usually negative.
        B (`torch.Tensor`): Input projection of every step, `(batch, state, length)`.
        C (`torch.Tensor`): Output projection of every step, `(batch, state, length)`.
        D (`torch.Tensor`, *optional*): Skip connection, `(dim,)`.
        z (`torch.Tensor`, *optional*): Gate, `(batch, dim, length)`.
        delta_bias (`torch.Tensor`, *optional*): `(dim,)`.
        delta_softplus (`bool`, *optional*, defaults to `False`): Whether step sizes pass through a softplus.
        initial_state (`torch.Tensor`, *optional*): State before the first step, `(batch, dim, state)`; zero if None.
        return_last_state (`bool`, *optional*, defaults to `False`): Whether to return the last state too.

    Returns:
        `(batch, dim, length)` in the dtype of `u`, computed in float32 (float64 for float64); with
        `return_last_state` also the state after the last step, `(batch, dim, state)` in float32 (float64).

    Raises:
        ValueError: A tensor's shape, dtype or device does not fit; `MAMBAFORMER_SCAN` holds an unknown value.
    """
    _check(u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    backend = scan_backend(u.device, u.dtype)
    if backend == "mamba_ssm" and initial_state is None:
        as_float = [None if x is None else x.float() for x in (D, delta_bias)]
        return _mamba_ssm_scan()(
            u, delta, A.float(), B, C, as_float[0], z, as_float[1], delta_softplus, return_last_state
        )
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    sequences = [None if x is None else x.transpose(1, 2).to(dtype) for x in (u, delta, B, C, z)]  # (B, L, D or N)
    rest = [None if x is None else x.to(dtype) for x in (A, D, delta_bias, initial_state)]
    scan = native_selective_scan if backend == "native" and u.numel() else chunked_selective_scan
    u_, delta_, B_, C_, z_ = sequences
    A_, D_, delta_bias_, initial_state_ = rest
    out, last_state = scan(u_, delta_, A_, B_, C_, D_, z_, delta_bias_, delta_softplus, initial_state_)
    out = out.transpose(1, 2).to(u.dtype)  # (B, D, L)
    return (out, last_state) if return_last_state else out
