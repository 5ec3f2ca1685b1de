# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Finding the compiled operators (`native/`) and calling them through ctypes.

The library is optional: `LIBRARY` is None where it was not built. Its functions take one structure of pointers and
64-bit integers; they release the GIL while they run and use as many OpenMP threads as PyTorch does at that moment.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

# Version of the interface and time steps between two saved states; a library with others is not used.
ABI = 2
CHUNK = 32


def _library_folders() -> list[Path]:
    """
    Folders that may hold the library: next to this room, or in an installed package if this file was copied out.

    The environment variable `MAMBAFORMER_NATIVE` names another folder instead, as for a build with sanitizers.
    """
    if os.environ.get("MAMBAFORMER_NATIVE"):
        return [Path(os.environ["MAMBAFORMER_NATIVE"])]
    here = Path(__file__).resolve().parent
    if here.name == "modeling_mambaformer":
        return [here.parent / "native"]
    try:
        spec = importlib.util.find_spec("mambaformer")
    except (ImportError, ValueError):
        return []
    roots = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    return [folder for root in roots for folder in (root / "native", root.parent / "native")]


def found_libraries(name: str) -> Iterator[ctypes.CDLL]:
    """Every library of this name that can be loaded, the nearest first."""
    for folder in _library_folders():
        for path in sorted(folder.glob(f"{name}*")):
            if path.suffix in (".so", ".pyd", ".dll", ".dylib"):
                with suppress(OSError):
                    yield ctypes.CDLL(str(path))


def load_library() -> ctypes.CDLL | None:
    """The first library found that this file can talk to, or None."""
    for library in found_libraries("_selective_scan"):
        with suppress(AttributeError):
            library.mambaformer_abi.restype = ctypes.c_int64
            library.mambaformer_scan_chunk.restype = ctypes.c_int64
            library.mambaformer_isa.restype = ctypes.c_char_p
            if (library.mambaformer_abi(), library.mambaformer_scan_chunk()) == (ABI, CHUNK):
                return library
    return None


LIBRARY = load_library()


def declare(name: str, pointers: str, integers: str) -> type[ctypes.Structure]:
    """A structure of pointers and then 64-bit integers, its field names separated by blanks."""
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def call(function: str, structure: type[ctypes.Structure], tensors: dict[str, Tensor | None], **integers: int) -> None:
    """Call one of the library's functions on the memory of `tensors`; the caller answers for shapes and strides.

    Raises:
        ValueError: A tensor is not float32 on the CPU.
        MemoryError: The library found no memory for its workspace.
    """
    pointers = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            if tensor.dtype != torch.float32 or not tensor.is_cpu:
                raise ValueError(f"{name} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}")
            pointers[name] = tensor.data_ptr()
    args = structure(**pointers, **integers, threads=torch.get_num_threads())
    if getattr(LIBRARY, function)(ctypes.byref(args)) != 0:
        raise MemoryError(f"{function} found no memory for its workspace; use a smaller batch or shorter sequences")


def rows(x: Tensor | None) -> Tensor | None:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Batch and time strides of `(batch, length, …)` tensors, as the fields `<name>_batch` and `<name>_time`."""
    strides = {}
    for name, x in tensors.items():
        if x is not None:
            strides[f"{name}_batch"], strides[f"{name}_time"] = x.stride(0), x.stride(1)
    return strides


def is_registered(operator: str) -> bool:
    """Whether `torch.ops.mambaformer` has this operator.

    A file that registers operators may be loaded a second time in one process, as remote code of a checkpoint next to
    the installed package. Operator names carry `ABI`, so whoever comes second uses the first one's.
    """
    return hasattr(torch.ops.mambaformer, operator)
