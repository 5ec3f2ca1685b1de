# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled operators at the edges: nothing, one of each, odd sizes, huge strides, memory that is not there."""

from __future__ import annotations

import pytest
import torch
from test_selective_scan import loop_scan, make_inputs, worst

from mambaformer.modeling_mambaformer.causal_conv import (
    ConvArgs,
    causal_conv_silu,
    native_conv_backward,
    native_conv_forward,
    native_conv_step,
)
from mambaformer.modeling_mambaformer.native_library import LIBRARY, call
from mambaformer.modeling_mambaformer.selective_scan_native import ScanArgs, native_backward, native_forward

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="the compiled operators are not built"),
    pytest.mark.usefixtures("instructions"),
]
SEQUENCES = ("u", "delta", "B", "C", "z")


def scan_inputs(batch, length, dim, state, absent=()) -> dict:
    """As `make_inputs`, each without a gradient and channels last, as the compiled scan takes them."""
    inputs = make_inputs(batch, dim, length, state, absent)
    return {
        name: x if x is None else x.detach().transpose(1, 2).contiguous() if name in SEQUENCES else x.detach()
        for name, x in inputs.items()
    }


def run_scan(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, last state and gradients of the sum of both."""
    out, last, checkpoints = native_forward(**inputs, delta_softplus=True, save_checkpoints=True)
    given = {name: x for name, x in inputs.items() if name != "initial_state"}
    return (
        out,
        last,
        native_backward(
            torch.ones_like(out), torch.ones_like(last), **given, checkpoints=checkpoints, delta_softplus=True
        ),
    )


@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")])
@pytest.mark.parametrize("sizes", [(0, 5, 7, 3), (2, 0, 7, 3), (2, 5, 0, 3), (0, 0, 0, 0), (2, 5, 7, 0)])
def test_a_scan_of_nothing(sizes, absent):
    batch, length, dim, state = sizes
    inputs = scan_inputs(*sizes, absent=absent)
    out, last, gradients = run_scan(inputs)
    assert out.shape == (batch, length, dim) and last.shape == (batch, dim, state)
    if length == 0:
        first = inputs["initial_state"]
        assert torch.equal(last, torch.zeros_like(last) if first is None else first)
        assert torch.equal(gradients[8], torch.ones_like(last))  # a state that only passes through
    for gradient in gradients[:3]:
        assert torch.isfinite(gradient).all()
    if batch == 0 or length == 0:
        assert not gradients[2].any()


@pytest.mark.parametrize("state", [1, 5, 17])
@pytest.mark.parametrize("batch, dim", [(1, 1), (2, 63), (1, 65), (1, 129)])
@pytest.mark.parametrize("length", [1, 33])
def test_a_scan_of_odd_sizes(batch, length, dim, state):
    inputs = scan_inputs(batch, length, dim, state)
    double = {
        name: (x.transpose(1, 2) if name in SEQUENCES else x).double().requires_grad_() for name, x in inputs.items()
    }
    expected, state_there = loop_scan(**double)
    wanted = torch.autograd.grad(expected.sum() + state_there.sum(), list(double.values()))
    out, last, gradients = run_scan(inputs)
    assert worst(out.transpose(1, 2), expected) < 1e-5 and worst(last, state_there) < 1e-5
    for name, have, want in zip(double, gradients, wanted, strict=True):
        assert worst(have.transpose(1, 2) if name in SEQUENCES else have, want) < 1e-4, name


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4)])
def test_a_convolution_of_nothing(sizes, with_bias):
    batch, length, dim, kernel = sizes
    x, weight = torch.randn(batch, length, dim), torch.randn(dim, kernel)
    bias = torch.randn(dim) if with_bias else None
    out = native_conv_forward(x, weight, bias)
    grad_x, grad_weight, grad_bias = native_conv_backward(torch.ones_like(out), x, weight, bias)
    assert out.shape == grad_x.shape == (batch, length, dim) and grad_weight.shape == weight.shape
    assert not grad_weight.any() and not grad_bias.any()
    window = torch.zeros(batch, dim, kernel)
    assert native_conv_step(torch.randn(batch, dim), window, weight, bias).shape == (batch, dim)


@pytest.mark.parametrize("dim", [1, 63, 65])
@pytest.mark.parametrize("length, kernel", [(1, 7), (2, 3), (5, 1)])
def test_a_convolution_of_odd_sizes(length, dim, kernel):
    x, weight, bias = torch.randn(2, length, dim), torch.randn(dim, kernel), torch.randn(dim)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = causal_conv_silu(*tensors, native=False)
    wanted = torch.autograd.grad(out.sum(), tensors)
    plain = [tensor.detach() for tensor in tensors]
    torch.testing.assert_close(native_conv_forward(*plain), out.detach(), rtol=1e-5, atol=1e-5)
    for have, want in zip(native_conv_backward(torch.ones(2, length, dim), *plain), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_long_sequence():
    """Decay to nothing and back, over more steps than a 16-bit number counts."""
    inputs = scan_inputs(1, 70_001, 1, 1)
    out, last, gradients = run_scan(inputs)
    tail = {name: x[:, -200:] if name in SEQUENCES else x for name, x in inputs.items()} | {"initial_state": None}
    again, end, _ = run_scan(tail)
    assert worst(out[:, -50:], again[:, -50:]) < 1e-5 and worst(last, end) < 1e-5  # what lies far back is forgotten
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_strides_beyond_32_bits(tmp_path):
    """Two sequences that lie more than 2**31 floats apart, in a file that takes no room."""
    apart = 2**31 + 64
    try:
        store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 4096, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"no sparse file of {4 * apart >> 30} GiB can be mapped here: {error}")
    x = store.as_strided((2, 6, 10), (apart, 10, 1))
    x.copy_(torch.randn(2, 6, 10))
    weight, bias = torch.randn(10, 4), torch.randn(10)
    assert torch.equal(native_conv_forward(x, weight, bias), native_conv_forward(x.contiguous(), weight, bias))
    inputs = scan_inputs(2, 6, 10, 3)
    inputs["u"] = x
    near = native_forward(**{**inputs, "u": x.contiguous()})
    assert all(torch.equal(have, want) for have, want in zip(native_forward(**inputs), near, strict=True))


def test_memory_that_is_not_there():
    """The library asks for its workspace first, and touches nothing where there is none."""
    tensor = torch.zeros(4)
    conv = dict.fromkeys(("x", "weight", "out", "grad_out", "grad_x", "grad_weight"), tensor)
    for function in ("mambaformer_conv_forward", "mambaformer_conv_backward"):
        with pytest.raises(MemoryError, match=function):
            call(function, ConvArgs, conv, batch=1, length=1, dim=1, kernel=2**50)
    scan = dict.fromkeys(("u", "delta", "A", "B", "C", "out", "last_state"), tensor)
    for function in ("mambaformer_scan_forward", "mambaformer_scan_backward"):
        with pytest.raises(MemoryError, match=function):
            call(function, ScanArgs, scan, batch=1, length=1, dim=1, state=2**46)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 2, 3, dtype=torch.float64), torch.zeros(1, 2, 3, device="meta")])
def test_other_dtypes_and_devices_are_refused(wrong):
    with pytest.raises(ValueError, match="must be float32 on the CPU"):
        native_conv_forward(wrong, torch.zeros(3, 4), None)
