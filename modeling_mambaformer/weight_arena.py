# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Memory in large pages, for what compiled code reads from end to end at every step: weights, keys and values."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # asked for at a time
LINE = 64  # bytes; every copy begins with a line of the processor's cache


class Arena:
    """
    Memory for copies of weights, in pages of 2 MiB where the system has them.

    A step reads all weights once, and to find each page of 4 KiB costs it time of its own. What is taken stays valid
    as long as any tensor of it lives.
    """

    def __init__(self):
        self.chunk, self.used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor`, of any shape and dtype."""
        if not tensor.nbytes:
            return tensor.contiguous()
        first = -(-self.used // LINE) * LINE
        if first + tensor.nbytes > len(self.chunk):
            self.chunk, first = large_pages(max(CHUNK_BYTES, tensor.nbytes)), 0
        self.used = first + tensor.nbytes
        return self.chunk[first : self.used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def large_zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in float32, like `torch.zeros`, in large pages."""
    count = math.prod(shape)
    return large_pages(4 * count).view(torch.float32).view(shape) if count else torch.zeros(shape, dtype=torch.float32)


def large_pages(count: int) -> Tensor:
    """`count` bytes of zeros that nobody shares, uint8 `(count,)`; pages that are never written take no memory."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(count, dtype=torch.uint8)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without such pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
