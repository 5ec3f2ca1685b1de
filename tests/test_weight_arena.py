# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Copies in one piece of memory: right, apart from each other, and as long-lived as whoever holds one."""

from __future__ import annotations

import gc

import pytest
import torch

from mambaformer.modeling_mambaformer import weight_arena
from mambaformer.modeling_mambaformer.weight_arena import LINE, Arena, large_zeros


def test_copies_are_equal_and_apart(monkeypatch):
    """Of any dtype and shape, transposed or empty, across chunks, and larger than a chunk."""
    monkeypatch.setattr(weight_arena, "CHUNK_BYTES", 4096)
    torch.manual_seed(0)
    given = [torch.randn(7, 5), torch.randn(9, 4).T, torch.arange(100, dtype=torch.int8), torch.empty(0, 3)]
    given += [torch.randn(33).bfloat16(), torch.randn(40, 100), torch.tensor(3.0), torch.arange(5, dtype=torch.int32)]
    arena = Arena()
    copies = [arena.take(x) for x in given * 9]
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(given * 9, copies, strict=True))
    assert all(x.is_contiguous() and x.data_ptr() % LINE == 0 for x in copies if x.numel())
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in copies if x.numel())
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    for x in copies:
        x.zero_()
    assert given[0].abs().sum() > 0


def test_a_copy_outlives_its_arena():
    copies = [Arena().take(torch.full((1000,), float(i))) for i in range(20)]
    gc.collect()
    assert [float(x.mean()) for x in copies] == list(range(20))


@pytest.mark.parametrize("shape", [(3, 0, 2), (1,), (2, 3, 700, 501)])
def test_zeros_in_large_pages_are_zeros(shape):
    found = large_zeros(shape)
    assert torch.equal(found, torch.zeros(shape)) and found.dtype == torch.float32 and found.is_contiguous()
    found += 1  # nobody else's memory
    assert torch.equal(large_zeros(shape), torch.zeros(shape))


def test_systems_without_such_pages(monkeypatch):
    for name in ("MADV_HUGEPAGE", "MAP_ANONYMOUS"):
        monkeypatch.delattr(weight_arena.mmap, name, raising=False)
        assert torch.equal(Arena().take(torch.arange(10)), torch.arange(10))
