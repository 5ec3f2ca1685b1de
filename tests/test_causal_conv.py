# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled causal convolution against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from mambaformer.modeling_mambaformer.causal_conv import FORWARD, causal_conv_silu, native_conv_step
from mambaformer.modeling_mambaformer.native_library import LIBRARY

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the compiled operators are not built")


def make_inputs(batch, length, dim, kernel, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 2 * dim, generator=generator)[..., :dim]  # rows lie apart, as after a chunk
    weight = torch.randn(dim, kernel, generator=generator)
    bias = torch.randn(dim, generator=generator) if with_bias else None
    return [None if tensor is None else tensor.requires_grad_() for tensor in (x, weight, bias)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dim, kernel", [(64, 4), (7, 4), (100, 2), (130, 5), (9, 1)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 50])
def test_agrees_with_pytorch(length, dim, kernel, with_bias):
    inputs = make_inputs(3, length, dim, kernel, with_bias)
    tensors = [tensor for tensor in inputs if tensor is not None]
    expected, actual = (causal_conv_silu(*inputs, native=native) for native in (False, True))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for have, want in zip(
        torch.autograd.grad(actual, tensors, weights), torch.autograd.grad(expected, tensors, weights), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_steps_equal_the_sequence():
    x, weight, bias = (tensor.detach() for tensor in make_inputs(2, 9, 70, 4))
    expected = causal_conv_silu(x, weight, bias, native=True)
    window = torch.zeros(2, 70, 4)
    steps = [native_conv_step(x[:, t], window, weight, bias) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(window, x[:, -4:].transpose(1, 2))


def test_operator_is_registered_properly():
    for with_bias in (True, False):
        operator = getattr(torch.ops.mambaformer, FORWARD).default
        report = torch.library.opcheck(operator, tuple(make_inputs(2, 6, 5, 4, with_bias)))
        assert set(report.values()) == {"SUCCESS"}, report


def test_thread_count_changes_nothing():
    inputs = make_inputs(4, 200, 200, 4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = causal_conv_silu(*inputs, native=True)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
