# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled selective scan (`native/selective_scan.cpp`) as a PyTorch operator with a backward pass.

Only where `native_library.LIBRARY` is not None. Tensors here are float32 on the CPU with channels last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native_library import ABI, CHUNK, LIBRARY, call, declare, is_registered, row_strides, rows

FORWARD = f"selective_scan_v{ABI}"
BACKWARD = f"selective_scan_backward_v{ABI}"

# Field for field the `ScanArgs` of native/selective_scan.cpp.
ScanArgs = declare(
    "ScanArgs",
    "u delta A B C D z delta_bias initial_state out last_state checkpoints grad_out grad_last_state "
    "grad_u grad_delta grad_A grad_B grad_C grad_D grad_z grad_delta_bias grad_initial_state",
    "batch length dim state u_batch u_time delta_batch delta_time B_batch B_time C_batch C_time z_batch z_time "
    "grad_out_batch grad_out_time delta_softplus threads",
)


def native_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = False,
    save_checkpoints: bool = False,
    last_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(B, L, D)`, last state `(B, D, N)` and the checkpoints for the backward pass, without autograd.

    `last_state`, if given, is overwritten; it may be `initial_state` itself (contiguous).
    """
    (batch, length, dim), state = u.shape, A.shape[1]
    u, delta, B, C, z = rows(u), rows(delta), rows(B), rows(C), rows(z)
    A = A.contiguous()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    out = u.new_empty(batch, length, dim)
    last_state = u.new_empty(batch, dim, state) if last_state is None else last_state
    checkpoints = u.new_empty(batch, -(-length // CHUNK), state, dim) if save_checkpoints else u.new_empty(0)
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
    tensors |= {"out": out, "last_state": last_state, "checkpoints": checkpoints if save_checkpoints else None}
    sizes = {"batch": batch, "length": length, "dim": dim, "state": state, "delta_softplus": int(delta_softplus)}
    strides = row_strides(u=u, delta=delta, B=B, C=C, z=z)
    call("mambaformer_scan_forward", ScanArgs, tensors, **sizes, **strides)
    return out, last_state, checkpoints


def _empty_gradients(u, A, B, D, z, delta_bias) -> tuple[Tensor, ...]:
    """Room for the gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; empty where there is no input."""
    (batch, length, dim), state = u.shape, A.shape[1]
    return (
        u.new_empty(batch, length, dim),
        u.new_empty(batch, length, dim),
        u.new_empty(dim, state),
        u.new_empty(batch, length, state),
        u.new_empty(batch, length, state),
        u.new_empty(0 if D is None else dim),
        u.new_empty((0,) if z is None else (batch, length, dim)),
        u.new_empty(0 if delta_bias is None else dim),
        u.new_empty(batch, dim, state),
    )


def native_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `_empty_gradients`'s nine inputs."""
    (batch, length, dim), state = u.shape, A.shape[1]
    grad_out, u, delta, B, C, z = rows(grad_out), rows(u), rows(delta), rows(B), rows(C), rows(z)
    A, grad_last_state = A.contiguous(), None if grad_last_state is None else grad_last_state.contiguous()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    gradients = _empty_gradients(u, A, B, D, z, delta_bias)
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "checkpoints": checkpoints,
    }
    tensors |= {"grad_out": grad_out, "grad_last_state": grad_last_state}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for name, gradient in zip(names, gradients, strict=True):
        tensors[f"grad_{name}"] = gradient if gradient.numel() else None
    sizes = {"batch": batch, "length": length, "dim": dim, "state": state, "delta_softplus": int(delta_softplus)}
    strides = row_strides(u=u, delta=delta, B=B, C=C, z=z, grad_out=grad_out)
    call("mambaformer_scan_backward", ScanArgs, tensors, **sizes, **strides)
    return gradients


def _register() -> None:
    """Register forward and backward as operators that autograd, FakeTensor and torch.compile understand."""
    inputs = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
    forward = torch.library.custom_op(
        f"mambaformer::{FORWARD}",
        native_forward,
        mutates_args=(),
        device_types="cpu",
        schema=f"({inputs}, Tensor? initial_state, bool delta_softplus, bool save_checkpoints) -> "
        "(Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        f"mambaformer::{BACKWARD}",
        native_backward,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor grad_out, Tensor? grad_last_state, {inputs}, Tensor checkpoints, bool delta_softplus) -> "
        f"({', '.join(['Tensor'] * 9)})",
    )

    def fake_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, save_checkpoints):
        (batch, length, dim), state = u.shape, A.shape[1]
        saved = (batch, (length + CHUNK - 1) // CHUNK, state, dim) if save_checkpoints else (0,)
        return u.new_empty(batch, length, dim), u.new_empty(batch, dim, state), u.new_empty(saved)

    def fake_backward(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, checkpoints, delta_softplus):
        return _empty_gradients(u, A, B, D, z, delta_bias)

    def setup_context(ctx, inputs, output):
        *tensors, initial_state, delta_softplus, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.delta_softplus = delta_softplus
        ctx.has_initial_state = initial_state is not None

    def differentiate(ctx, grad_out, grad_last_state, _):
        *tensors, checkpoints = ctx.saved_tensors
        operator = getattr(torch.ops.mambaformer, BACKWARD)
        gradients = list(operator(grad_out, grad_last_state, *tensors, checkpoints, ctx.delta_softplus))
        present = [tensor is not None for tensor in tensors] + [ctx.has_initial_state]
        return *(gradient if here else None for gradient, here in zip(gradients, present, strict=True)), None, None

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup_context)


if LIBRARY is not None and not is_registered(FORWARD):
    _register()


def native_selective_scan(
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
    """Output `(B, L, D)` and last state `(B, D, N)`, differentiable once with respect to every tensor."""
    operator = getattr(torch.ops.mambaformer, FORWARD)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, last_state, _ = operator(*tensors, delta_softplus, differentiable)
    return out, last_state
