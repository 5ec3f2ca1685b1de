# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The short causal convolution of Mamba with its silu, channels last: compiled where that is built, else PyTorch.

The scan wants neighbouring channels in memory, PyTorch's depthwise convolution neighbouring time steps. The compiled
one (`native/causal_conv.cpp`) stays in the scan's layout and saves the copies, the silu's pass over memory and most of
a slow backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .native_library import ABI, LIBRARY, call, declare, is_registered, row_strides, rows

FORWARD = f"causal_conv_silu_v{ABI}"
BACKWARD = f"causal_conv_silu_backward_v{ABI}"

# Field for field the `ConvArgs` of native/causal_conv.cpp.
ConvArgs = declare(
    "ConvArgs",
    "x weight bias grad_out window out grad_x grad_weight grad_bias",
    "batch length dim kernel x_batch x_time grad_out_batch grad_out_time threads",
)


def native_conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`(B, L, D)` from `(B, L, D)`, without autograd."""
    x, weight, bias = rows(x), weight.contiguous(), None if bias is None else bias.contiguous()
    (batch, length, dim), kernel = x.shape, weight.shape[1]
    out = x.new_empty(batch, length, dim)
    tensors = {"x": x, "weight": weight, "bias": bias, "out": out}
    sizes = {"batch": batch, "length": length, "dim": dim, "kernel": kernel}
    call("mambaformer_conv_forward", ConvArgs, tensors, **sizes, **row_strides(x=x))
    return out


def native_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without bias)."""
    grad_out, x = rows(grad_out), rows(x)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    (batch, length, dim), kernel = x.shape, weight.shape[1]
    grad_x, grad_weight, grad_bias = _empty_gradients(grad_out, x, weight, bias)
    tensors = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "grad_out": grad_out,
        "grad_x": grad_x,
        "grad_weight": grad_weight,
    }
    tensors["grad_bias"] = None if bias is None else grad_bias
    sizes = {"batch": batch, "length": length, "dim": dim, "kernel": kernel}
    call("mambaformer_conv_backward", ConvArgs, tensors, **sizes, **row_strides(x=x, grad_out=grad_out))
    return grad_x, grad_weight, grad_bias


def native_conv_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One time step, without autograd: `x` `(B, D)` enters `window` `(B, D, K)` in place; returns `(B, D)`.

    `x` has neighbouring channels, `window`, `weight` `(D, K)` and `bias` `(D,)` are contiguous.
    """
    (batch, dim), kernel = x.shape, weight.shape[1]
    out = x.new_empty(batch, dim)
    tensors = {"x": x, "weight": weight, "bias": bias, "window": window, "out": out}
    call("mambaformer_conv_step", ConvArgs, tensors, batch=batch, dim=dim, kernel=kernel, x_batch=x.stride(0))
    return out


def _empty_gradients(grad_out, x, weight, bias) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(0 if bias is None else weight.shape[0]),
    )


def _register() -> None:
    """Register forward and backward as operators that autograd, FakeTensor and torch.compile understand."""
    forward = torch.library.custom_op(
        f"mambaformer::{FORWARD}",
        native_conv_forward,
        mutates_args=(),
        device_types="cpu",
        schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    )
    backward = torch.library.custom_op(
        f"mambaformer::{BACKWARD}",
        native_conv_backward,
        mutates_args=(),
        device_types="cpu",
        schema="(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    )

    def fake_forward(x, weight, bias):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad_out):
        saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them and lets them go
        grad_x, grad_weight, grad_bias = getattr(torch.ops.mambaformer, BACKWARD)(grad_out, *saved)
        return grad_x, grad_weight, None if saved[2] is None else grad_bias

    forward.register_fake(fake_forward)
    backward.register_fake(_empty_gradients)
    forward.register_autograd(differentiate, setup_context=setup_context)


if LIBRARY is not None and not is_registered(FORWARD):
    _register()


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, native: bool) -> Tensor:
    """`silu(bias + sum_k weight[:, k] x[t - K + 1 + k])`, `x` before its first step being zero.

    Args:
        x (`torch.Tensor`): `(batch, length, dim)`.
        weight (`torch.Tensor`): `(dim, K)`.
        bias (`torch.Tensor`, *optional*): `(dim,)`.
        native (`bool`): Whether to use the compiled operator; then every tensor is float32 on the CPU.

    Returns:
        `(batch, length, dim)` in the dtype of `x`.
    """
    if native and x.numel():
        return getattr(torch.ops.mambaformer, FORWARD)(x, weight, bias)
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0)).to(weight.dtype)  # (B, D, K - 1 + L)
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])).transpose(1, 2).to(x.dtype)
