# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A rounded layer's compiled product: the rounded values' sums, whatever stands beside a token, and nothing kept."""

from __future__ import annotations

import copy
import ctypes
import io

import pytest
import torch
import torch.nn.functional as F
from test_emamba_decoder import begin, deviation
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from mambaformer.modeling_mambaformer import native_linear as module
from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.native_linear import LinearArgs, native_linear
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY, FLOAT32, INT8
from mambaformer.modeling_mambaformer.quantized_modules import RoundedLinear, round_emamba

pytestmark = pytest.mark.skipif(not module.AVAILABLE, reason="the compiled product is not built")
FORMATS = ("int8", "int4")
COUNTS = (1, 2, 3, 4, 5, 13, 252, 253, 300, 504, 505)


def rounded_layer(rows: int, columns: int, weight_format: str = "int8", bias: bool = False) -> RoundedLinear:
    torch.manual_seed(rows * columns)
    return RoundedLinear(weight_format, nn.Linear(columns, rows, bias=bias))


@torch.no_grad()
def product(layer: RoundedLinear, x: torch.Tensor) -> torch.Tensor:
    """By the compiled code, which must apply."""
    found = native_linear(layer, layer.bias, x)
    assert found is not None and torch.equal(layer(x), found)
    return found


def tokens(count: int, columns: int) -> torch.Tensor:
    """Random rows whose int8 numbers do not depend on how the last bit of a quotient is rounded."""
    whole = torch.randint(-126, 127, (count, columns)) + 0.8 * (torch.rand(count, columns) - 0.5)
    whole[:, 0] = 127.0
    return whole * torch.rand(count, 1).add(0.01)


@torch.no_grad()
def expected(layer: RoundedLinear, x: torch.Tensor) -> torch.Tensor:
    """In double precision, of the rounded weights and tokens rounded to int8 with one scale each."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scale > 0, x / scale.clamp(min=1e-30), x).round()
    y = F.linear(whole.double() * scale.double(), layer.dequantize().double())
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (5, 33), (16, 64), (17, 65), (40, 127), (70, 768), (33, 1030), (20, 2100)]
)
def test_sums_are_those_of_the_rounded_numbers(rows, columns, weight_format, instructions):
    x = tokens(COUNTS[-1], columns)
    x[3], x[4] = 0.0, x[4] * 1e20
    for bias in (False, True):
        layer = rounded_layer(rows, columns, weight_format, bias)
        whole, wanted = product(layer, x), expected(layer, x)
        for mine, theirs in zip(whole.split(1), wanted.split(1), strict=True):
            assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-6 * bias
        for count in COUNTS:
            assert torch.equal(product(layer, x[:count]), whole[:count])
            assert torch.equal(product(layer, x[count - 1]), whole[count - 1])
        batch = x[:299].view(13, 23, columns).transpose(0, 1)  # with gaps
        assert torch.equal(product(layer, batch), whole[:299].view(13, 23, rows).transpose(0, 1))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_threads_change_nothing(weight_format, instructions):
    layer, x, before = rounded_layer(200, 140, weight_format, True), torch.randn(260, 140), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([product(layer, x), product(layer, x[:8])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("hidden", [64, 48])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_they_are_the_very_sums_of_the_decoding_step(hidden, rows, instructions):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=90, hidden_size=hidden, num_hidden_layers=1, state_size=4)).eval()
    use_selective_scan(model)
    round_emamba(model, "int8")
    cache, ids = begin(model, rows)
    with torch.no_grad():
        states, logits = EMambaDecoder().step(model, cache, ids[:, :1])
    assert torch.equal(product(model.lm_head, states), logits)


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_not_finite_shows(weight_format, count, instructions):
    layer, x = rounded_layer(20, 70, weight_format), torch.randn(count, 70)
    x[1, 5] = float("nan")
    with torch.no_grad():
        found = layer(x)
        assert found[1].isnan().all() and found[0].isfinite().all()
        x[1, 5] = float("inf")
        assert layer(x)[1].isnan().all()


def test_nothing_is_kept_beside_the_weights():
    """So that copies, files and changes of any kind are what they seem."""
    layer, x = rounded_layer(30, 70, bias=True), torch.randn(6, 70)
    before, found = dict(layer.__dict__), product(layer, x)
    assert layer.__dict__ == before and list(layer.state_dict()) == ["qweight", "scales", "bias"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(product(other, x), found)
    layer.bias = None
    wanted = product(layer, x)
    layer.qweight.data.neg_()  # which PyTorch does not count
    assert torch.equal(product(layer, x), -wanted)
    layer.qweight = nn.Parameter(-layer.qweight, requires_grad=False)
    assert torch.equal(product(layer, x), wanted)
    skeleton = copy.deepcopy(layer).to("meta")
    with torch.no_grad():
        assert skeleton(x.to("meta")).shape == (6, 30) and layer(x[:0]).shape == (0, 30)


def test_it_steps_aside():
    """Gradients, precision, casts, traces: the rounded weights made float, with inputs as they are."""
    layer, x = rounded_layer(30, 70, bias=True), torch.randn(2, 3, 70)
    plain = F.linear(x, layer.dequantize(), layer.bias).detach()
    assert deviation(product(layer, x), plain) > 1e-4
    wanting = x.clone().requires_grad_()
    layer(wanting).sum().backward()
    torch.testing.assert_close(wanting.grad, layer.dequantize().sum(0).expand(2, 3, 70))
    torch.testing.assert_close(layer(x).detach(), plain)
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x.double()).dtype == torch.float64
        with torch.autocast("cpu"):
            assert native_linear(layer, layer.bias, x) is None
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), F.linear(2 * x, layer.dequantize(), layer.bias))
        for other in (torch.zeros(29), torch.zeros(30, dtype=torch.bfloat16)):
            assert native_linear(layer, nn.Parameter(other), x) is None
        whole, scales = layer.qweight, layer.scales
        for other in (whole[:29], whole[:, ::2], whole.short(), whole.t().contiguous().t()):
            layer.qweight = nn.Parameter(other, requires_grad=False)
            assert native_linear(layer, None, x) is None
        layer.qweight, layer.scales = whole, nn.Parameter(scales.bfloat16(), requires_grad=False)
        assert native_linear(layer, layer.bias, x) is None
        layer.scales = scales
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.randn(2, 71))


def test_defaults_of_pytorch_change_nothing():
    layer, x = rounded_layer(30, 70), torch.randn(2, 70)
    found, before = product(layer, x), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(product(layer, x), found)
    finally:
        torch.set_default_dtype(before)


def test_what_is_not_served_is_refused():
    """Before anything is touched: the pointers are null."""
    run = DECODE_LIBRARY.mambaformer_linear
    for weight_format, rows, columns, tokens in ((FLOAT32, 4, 4, 1), (INT8, 4, 0, 1), (INT8, 4, 2**40, 1)):
        matrix = module.Matrix(rows=rows, columns=columns, format=weight_format)
        assert run(ctypes.byref(LinearArgs(matrix, None, None, tokens, 1))) == 2
    assert run(ctypes.byref(LinearArgs(module.Matrix(rows=4, columns=4, format=INT8), None, None, 0, 1))) == 0
