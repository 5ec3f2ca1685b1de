# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The selective scan against transformers' loop over time, in every backend and every gradient."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mambaformer.modeling_mambaformer import native_library, selective_scan_native, selective_scan_torch
from mambaformer.modeling_mambaformer import selective_scan as scan_module
from mambaformer.modeling_mambaformer.selective_scan import scan_backend, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
FILES = ("native_library.py", "selective_scan.py", "selective_scan_native.py", "selective_scan_torch.py")
needs_native = pytest.mark.skipif(native_library.LIBRARY is None, reason="the compiled scan is not built")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("MAMBAFORMER_SCAN", request.param)
    return request.param


def make_inputs(batch, dim, length, state, absent=(), dtype=torch.float32, seed=0) -> dict:
    """Strong steps, strong decay and a large first state, so that no part's error can hide behind another's."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": randn(batch, length, dim).transpose(1, 2),
        "delta": 2 * randn(batch, length, dim).transpose(1, 2),
        "A": -torch.exp(randn(dim, state)),
        "B": randn(batch, length, state).transpose(1, 2),
        "C": randn(batch, length, state).transpose(1, 2),
        "D": randn(dim),
        "z": randn(batch, length, dim).transpose(1, 2),
        "delta_bias": randn(dim) - 1,
        "initial_state": 5 * randn(batch, dim, state),
    }
    return {name: None if name in absent else tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def loop_scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """The recurrence step by step, with a first state, which transformers' loop does not take."""
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias[:, None])
    h, outputs = initial_state, []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def reference(inputs: dict):
    if inputs["initial_state"] is not None:
        return loop_scan(**inputs)
    rest = {name: tensor for name, tensor in inputs.items() if name not in ("u", "initial_state")}
    rest["dt"] = rest.pop("delta")
    return mamba_selective_scan(inputs["u"], **rest, delta_softplus=True, return_last_state=True)


def worst(actual, expected) -> float:
    """Largest deviation, relative to the largest expected value where that exceeds one."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def run_with_gradients(function, inputs: dict):
    out, last_state = function()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, last_state)]
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    gradients = torch.autograd.grad([out, last_state], list(present.values()), weights)
    return out, last_state, dict(zip(present, gradients, strict=True))


def scan_with_gradients(inputs: dict):
    return run_with_gradients(lambda: selective_scan(**inputs, delta_softplus=True, return_last_state=True), inputs)


@pytest.mark.parametrize("state", [16, 8, 3])
@pytest.mark.parametrize("batch, dim", [(1, 64), (3, 7), (2, 100)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("continued", [False, True])
def test_agrees_with_the_loop(backend, length, batch, dim, state, continued):
    inputs = make_inputs(batch, dim, length, state, absent=() if continued else ("initial_state",))
    expected = run_with_gradients(lambda: reference(inputs), inputs)
    actual = scan_with_gradients(inputs)
    assert worst(actual[0], expected[0]) < 1e-5
    assert worst(actual[1], expected[1]) < 1e-5
    for name, gradient in expected[2].items():
        assert worst(actual[2][name], gradient) < 1e-4, name


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias", "initial_state")])
def test_optional_inputs_may_be_left_out(backend, absent):
    inputs = make_inputs(2, 20, 40, 4, absent=absent)
    expected = run_with_gradients(lambda: reference(inputs), inputs)
    actual = scan_with_gradients(inputs)
    assert worst(actual[0], expected[0]) < 1e-5
    for name, gradient in expected[2].items():
        assert worst(actual[2][name], gradient) < 1e-4, name


def test_without_softplus(backend):
    inputs = make_inputs(2, 10, 40, 4, absent=("delta_bias", "initial_state"))
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    raw = {name: tensor for name, tensor in inputs.items() if name not in ("u", "delta", "initial_state")}
    expected = mamba_selective_scan(inputs["u"], inputs["delta"], **raw, return_last_state=True)
    actual = selective_scan(**inputs, return_last_state=True)
    for have, want in zip(actual, expected, strict=True):
        assert worst(have, want) < 1e-5


def test_last_state_alone_carries_gradients(backend):
    inputs = make_inputs(2, 9, 45, 8)
    names = ("u", "delta", "A", "B", "delta_bias", "initial_state")
    tensors = [inputs[name] for name in names]
    actual = torch.autograd.grad(
        selective_scan(**inputs, delta_softplus=True, return_last_state=True)[1].square().sum(), tensors
    )
    expected = torch.autograd.grad(loop_scan(**inputs)[1].square().sum(), tensors)
    for name, have, want in zip(names, actual, expected, strict=True):
        assert want.abs().max() > 1e-3, name
        assert worst(have, want) < 1e-4, name


def test_two_halves_equal_the_whole(backend):
    inputs = make_inputs(2, 24, 75, 8)
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    sequences = ("u", "delta", "B", "C", "z")
    first = {name: x[..., :41] if name in sequences else x for name, x in inputs.items()}
    out, state = selective_scan(**first, delta_softplus=True, return_last_state=True)
    second = {name: x[..., 41:] if name in sequences else x for name, x in inputs.items()} | {"initial_state": state}
    rest, end = selective_scan(**second, delta_softplus=True, return_last_state=True)
    assert worst(torch.cat([out, rest], -1), whole) < 1e-5
    assert worst(end, last) < 1e-5


def test_any_memory_layout(backend):
    inputs = make_inputs(2, 70, 40, 8)
    expected = scan_with_gradients(inputs)

    def with_stride_two(x):
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]

    for layout in (torch.Tensor.contiguous, with_stride_two):
        changed = {name: layout(x.detach()).requires_grad_() for name, x in inputs.items()}
        actual = scan_with_gradients(changed)
        assert worst(actual[0], expected[0]) < 1e-6
        for name in NAMES:
            assert worst(actual[2][name], expected[2][name]) < 1e-6, name
    # A gradient without strides of its own, as `sum()` sends it, and one input broadcast over the batch.
    out = selective_scan(**inputs, delta_softplus=True)
    dense = torch.autograd.grad(out, inputs["u"], torch.ones_like(out), retain_graph=True)[0]
    assert worst(torch.autograd.grad(out.sum(), inputs["u"])[0], dense) < 1e-6
    row = {name: x.detach() for name, x in make_inputs(1, 70, 40, 8).items()}
    shared = {name: x if name in ("A", "D", "delta_bias") else x.expand(2, -1, -1) for name, x in row.items()}
    twice = selective_scan(**shared, delta_softplus=True)
    assert worst(twice, selective_scan(**row, delta_softplus=True).expand(2, -1, -1)) < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_decay(backend, scale):
    inputs = {name: x.detach() for name, x in make_inputs(2, 16, 50, 8).items()}
    inputs["A"] = inputs["A"] * scale
    actual, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    expected, expected_state = loop_scan(**inputs)
    assert torch.isfinite(actual).all()
    assert worst(actual, expected) < 1e-5 and worst(state, expected_state) < 1e-5


def test_growing_states(backend):
    inputs = {name: x.detach() for name, x in make_inputs(1, 8, 20, 4).items()}
    inputs["A"] = -0.1 * inputs["A"]
    actual, expected = selective_scan(**inputs, delta_softplus=True), loop_scan(**inputs)[0]
    assert expected.abs().max() > 1e3
    assert worst(actual, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_swallowed(backend, name):
    inputs = {key: x.detach().clone() for key, x in make_inputs(1, 8, 10, 4).items()}
    inputs[name][(0,) * inputs[name].ndim] = float("nan")
    assert selective_scan(**inputs, delta_softplus=True).isnan().any()


def test_bfloat16_is_computed_in_float32(backend):
    inputs = {name: x.detach() for name, x in make_inputs(2, 12, 40, 8).items()}
    low = {name: x.bfloat16() if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    out, state = selective_scan(**low, delta_softplus=True, return_last_state=True)
    exact, exact_state = selective_scan(
        **{name: x.float() for name, x in low.items()}, delta_softplus=True, return_last_state=True
    )
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(out, exact.bfloat16()) and torch.equal(state, exact_state)


@pytest.mark.parametrize("length", [1, 7])
def test_pytorch_scan_in_float64(length):
    inputs = make_inputs(2, 3, length, 2, dtype=torch.float64)

    def scan(*tensors):
        return selective_scan(**dict(zip(NAMES, tensors, strict=True)), delta_softplus=True, return_last_state=True)

    assert scan_backend(dtype=torch.float64) == "torch"
    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))
    expected = loop_scan(**inputs)
    assert all(worst(have, want) < 1e-13 for have, want in zip(scan(*inputs.values()), expected, strict=True))


def test_pytorch_scan_in_segments(monkeypatch):
    inputs = make_inputs(2, 3, 50, 2, dtype=torch.float64)
    whole = scan_with_gradients(inputs)
    monkeypatch.setattr(selective_scan_torch, "MAX_EXPANDED_ELEMENTS", 2 * 3 * 2 * 7)
    parts = scan_with_gradients(inputs)
    assert worst(parts[0], whole[0]) < 1e-13 and worst(parts[1], whole[1]) < 1e-13
    assert all(worst(parts[2][name], whole[2][name]) < 1e-12 for name in NAMES)


@needs_native
def test_thread_count_changes_nothing():
    inputs = make_inputs(2, 300, 70, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(scan_with_gradients(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        assert all(torch.equal(other[2][name], results[0][2][name]) for name in NAMES)


@needs_native
def test_portable_instructions(monkeypatch, tmp_path):
    """The code for processors without AVX2 gives the same numbers."""
    inputs = make_inputs(2, 70, 40, 8)
    expected = scan_with_gradients(inputs)
    library = Path(native_library.LIBRARY._name)
    shutil.copy(library, tmp_path / library.name)
    monkeypatch.setenv("MAMBAFORMER_ISA", "portable")
    monkeypatch.setattr(native_library, "_library_folders", lambda: [tmp_path])
    monkeypatch.setattr(native_library, "LIBRARY", native_library.load_library())
    assert native_library.LIBRARY.mambaformer_isa() == b"portable"
    actual = scan_with_gradients(inputs)
    assert worst(actual[0], expected[0]) < 1e-5
    assert all(worst(actual[2][name], expected[2][name]) < 1e-5 for name in NAMES)


@needs_native
@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")])
def test_operator_is_registered_properly(absent):
    inputs = make_inputs(2, 6, 35, 4, absent=absent)
    channels_last = [
        x.detach().transpose(1, 2).requires_grad_() if x is not None and name in ("u", "delta", "B", "C", "z") else x
        for name, x in inputs.items()
    ]
    operator = getattr(torch.ops.mambaformer, selective_scan_native.FORWARD).default
    report = torch.library.opcheck(operator, (*channels_last, True, True))
    assert set(report.values()) == {"SUCCESS"}, report


def test_compiles_into_one_graph(backend):
    inputs = make_inputs(2, 6, 20, 4)

    def scan(inputs):
        return selective_scan(**inputs, delta_softplus=True, return_last_state=True)

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    expected = scan_with_gradients(inputs)
    actual = run_with_gradients(lambda: compiled(inputs), inputs)
    assert worst(actual[0], expected[0]) < 1e-5
    assert all(worst(actual[2][name], expected[2][name]) < 1e-5 for name in NAMES)


def load_flat_copy(folder: Path, name: str):
    """Import copies of the scan's files as a flat package, as remote code of a checkpoint is imported."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    for file in FILES:
        shutil.copy(Path(scan_module.__file__).with_name(file), package / file)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.selective_scan")
    finally:
        sys.path.remove(str(folder))


@needs_native
def test_a_second_copy_in_one_process(tmp_path):
    copy = load_flat_copy(tmp_path, "scan_copy_beside_the_package")
    assert copy.LIBRARY is not None and copy.LIBRARY is not scan_module.LIBRARY
    inputs = make_inputs(2, 10, 40, 4)
    expected = scan_with_gradients(inputs)
    actual = run_with_gradients(
        lambda: copy.selective_scan(**inputs, delta_softplus=True, return_last_state=True), inputs
    )
    again = scan_with_gradients(inputs)
    for result in (actual, again):
        assert torch.equal(result[0], expected[0]) and torch.equal(result[2]["A"], expected[2]["A"])


def test_a_copy_without_the_package_uses_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    copy = load_flat_copy(tmp_path, "scan_copy_alone")
    assert copy.LIBRARY is None and copy.scan_backend() == "torch"
    inputs = make_inputs(2, 10, 40, 4)
    assert worst(copy.selective_scan(**inputs, delta_softplus=True), loop_scan(**inputs)[0]) < 1e-5
    monkeypatch.setenv("MAMBAFORMER_SCAN", "native")
    with pytest.raises(ValueError, match="was not found"):
        copy.scan_backend()


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("MAMBAFORMER_SCAN", "fortran")
    with pytest.raises(ValueError, match="'fortran'"):
        scan_backend()


def test_backend_on_cuda(monkeypatch):
    monkeypatch.delenv("MAMBAFORMER_SCAN", raising=False)
    monkeypatch.setattr(scan_module, "_mamba_ssm_scan", lambda: None)
    assert scan_backend("cuda") == "torch"
    monkeypatch.setattr(scan_module, "_mamba_ssm_scan", lambda: object)
    assert scan_backend("cuda") == "mamba_ssm" and scan_backend("cuda", torch.float64) == "torch"
    monkeypatch.setenv("MAMBAFORMER_SCAN", "torch")
    assert scan_backend("cuda") == "torch"


def test_empty_batch(backend):
    inputs = make_inputs(0, 4, 5, 2)
    assert selective_scan(**inputs, delta_softplus=True).shape == (0, 4, 5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("u", torch.zeros(2, 6), r"u must have shape .* got \(2, 6\)"),
        ("u", torch.zeros(2, 6, 0), r"length >= 1, got \(2, 6, 0\)"),
        ("u", torch.zeros(2, 6, 10, dtype=torch.long), "u must be of a floating point dtype, got torch.int64"),
        ("delta", torch.zeros(2, 6, 9), r"delta must have shape \(2, 6, 10\), got \(2, 6, 9\)"),
        ("A", torch.zeros(5, 4), r"A must have shape .* 6 .* got \(5, 4\)"),
        ("B", torch.zeros(2, 10, 4), r"B must have shape \(2, 4, 10\), got \(2, 10, 4\)"),
        ("C", torch.zeros(2, 4, 10, dtype=torch.float64), "C is torch.float64 but u is torch.float32"),
        ("D", torch.zeros(7), r"D must have shape \(6,\), got \(7,\)"),
        ("z", torch.zeros(1, 6, 10), r"z must have shape \(2, 6, 10\), got \(1, 6, 10\)"),
        ("delta_bias", torch.zeros(6, 1), r"delta_bias must have shape \(6,\), got \(6, 1\)"),
        ("initial_state", torch.zeros(2, 6, 5), r"initial_state must have shape \(2, 6, 4\), got \(2, 6, 5\)"),
        ("initial_state", torch.zeros(2, 6, 4, device="meta"), "initial_state is on meta but u is on cpu"),
    ],
)
def test_bad_input_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make_inputs(2, 6, 10, 4) | {name: value}))
