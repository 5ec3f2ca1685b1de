# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What runs where a GPU is, tested without one: only the choice of backend is replaced, at its own boundary.

Kernels of mamba-ssm stand in as PyTorch functions of the same signature, and a dispatch mode looks for operations that
make the processor wait for the device, which no graph capture survives.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mixed_routing import ET5, mixed_model
from test_mamba_mixer import continued, make_model
from tiny_experts import random_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.mamba.modeling_mamba import MambaMixer

from mambaformer.modeling_mambaformer import mamba_mixer, router_step
from mambaformer.modeling_mambaformer import selective_scan as scan_module
from mambaformer.modeling_mambaformer.emamba_stream import head_logits, read_on
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.routing_pass import choose
from mambaformer.modeling_mambaformer.selective_scan import selective_scan
from mambaformer.modeling_mambaformer.selective_scan_torch import chunked_selective_scan

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal)


class Waits(TorchDispatchMode):
    """Names of the operations whose result the processor has to see before it can go on."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_gpu(monkeypatch) -> list[int]:
    """Mixers that believe to be where mamba-ssm runs; gets the length of every call of transformers' own path."""
    lengths: list[int] = []
    forward = MambaMixer.forward

    def noted(self, hidden_states, *given, **options):
        lengths.append(hidden_states.shape[1])
        return forward(self, hidden_states, *given, **options)

    monkeypatch.setattr(mamba_mixer, "scan_backend", lambda *_: "mamba_ssm")
    monkeypatch.setattr(MambaMixer, "forward", noted)
    monkeypatch.setenv("MAMBAFORMER_SCAN", "torch")  # what is left to our own scan runs in PyTorch, as on a GPU
    return lengths


def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """`selective_scan_fn` of mamba-ssm: channels before time, and parameters in float32."""
    assert all(x is None or x.dtype == torch.float32 for x in (A, D, delta_bias))
    sequences = [None if x is None else x.transpose(1, 2).float() for x in (u, delta, B, C, z)]
    u_, delta_, B_, C_, z_ = sequences
    out, last = chunked_selective_scan(u_, delta_, A, B_, C_, D, z_, delta_bias, delta_softplus, None)
    out = out.transpose(1, 2).to(u.dtype)
    return (out, last) if return_last_state else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_calls_the_kernel_as_it_wants_to_be_called(dtype, monkeypatch):
    monkeypatch.setattr(scan_module, "_mamba_ssm_scan", lambda: kernel)
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 6, 9, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(2, 4, 9, dtype=dtype) for _ in range(2))
    given = {"A": -torch.rand(6, 4), "B": B, "C": C, "D": torch.ones(6), "z": z, "delta_bias": torch.randn(6)}
    options = {"delta_softplus": True, "return_last_state": True}
    ours = selective_scan(u, delta, **given, **options)
    monkeypatch.setattr(scan_module, "scan_backend", lambda *_: "mamba_ssm")
    found = selective_scan(u, delta, **given, **options)
    for mine, theirs in zip(ours, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    state = torch.randn(2, 6, 4)
    monkeypatch.setattr(scan_module, "_mamba_ssm_scan", lambda: pytest.fail)  # it takes no initial state
    assert selective_scan(u, delta, **given, initial_state=state).isfinite().all()


def test_mixers_leave_fresh_sources_and_single_tokens_to_the_kernels(on_gpu):
    plain = make_model()
    adapted = copy.deepcopy(plain)
    use_selective_scan(adapted)
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(ids).logits
    on_gpu.clear()
    cache = DynamicCache(config=adapted.config)
    parts = [continued(adapted, cache, part) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert on_gpu == [5] * 3 + [1] * 3  # per layer; several tokens on a state are ours, the kernels take none


@pytest.fixture
def model(et5_folder, emamba_folder):
    made = mixed_model(et5_folder, emamba_folder, seed=3)
    return copy.deepcopy(made).pack_emamba("off").pack_et5("off")


def test_answers_are_those_of_a_cpu(model, on_gpu):
    batch = random_batch([9, 5, 7])
    asked = {"max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}
    found = model.generate(**batch, **asked)
    assert on_gpu
    with pytest.MonkeyPatch.context() as usual:
        usual.setattr(mamba_mixer, "scan_backend", scan_module.scan_backend)
        expected = model.pack_emamba("float32").generate(**batch, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.route_trace.expert, expected.route_trace.expert)
    assert bool((expected.route_trace.expert == ET5).any())


def test_a_token_makes_nobody_wait(model, on_gpu, monkeypatch):
    """EMamba's step and the router's choice; whether ET5 has to be asked is all that is looked at, after them."""
    monkeypatch.setattr(router_step, "may_run", lambda *_: False)
    output = model.generate(**random_batch([9, 5]), max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    cache, ids = output.past_key_values, output.sequences[:, -1:]
    scalars, gate_logit = cache.row_scalars(), cache.gate_logit[cache.row_source]
    with torch.no_grad(), Waits() as waits:
        hidden = read_on(model.emamba, cache.emamba, ids)
        logits = head_logits(model.emamba, hidden)
        ended = torch.zeros_like(ids, dtype=torch.bool)
        choose(model, cache.request, ids, ended, hidden, cache.router, scalars, gate_logit, emamba_logits=logits)
    assert waits.found == []
    with Waits() as waits:
        bool(ended.any())
    assert waits.found  # the instrument sees one
