# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled selective scan: finding the shared library, calling it through ctypes, registering it with PyTorch.

The library (`native/selective_scan.cpp`) is optional. `LIBRARY` is None where it was not built; everything else in
this file may be used only where it is not. Tensors here are float32 on the CPU with channels last.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

ABI = 1
CHUNK = 32

_POINTERS = (
    "u delta A B C D z delta_bias initial_state out last_state checkpoints grad_out grad_last_state "
    "grad_u grad_delta grad_A grad_B grad_C grad_D grad_z grad_delta_bias grad_initial_state"
).split()
_INTEGERS = (
    "batch length dim state u_batch u_time delta_batch delta_time B_batch B_time C_batch C_time z_batch z_time "
    "grad_out_batch grad_out_time delta_softplus threads"
).split()


class ScanArgs(ctypes.Structure):
    """Field for field the `ScanArgs` of `native/selective_scan.cpp`."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _INTEGERS]


def _library_folders() -> list[Path]:
    """Folders that may hold the library: next to this room, or in an installed package if this file was copied out."""
    here = Path(__file__).resolve().parent
    if here.name == "modeling_mambaformer":
        return [here.parent / "native"]
    try:
        spec = importlib.util.find_spec("mambaformer")
    except (ImportError, ValueError):
        return []
    roots = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    return [folder for root in roots for folder in (root / "native", root.parent / "native")]


def load_library() -> ctypes.CDLL | None:
    """The first library found that this file can talk to, or None."""
    for folder in _library_folders():
        for path in sorted(folder.glob("_selective_scan*")):
            if path.suffix not in (".so", ".pyd", ".dll", ".dylib"):
                continue
            try:
                library = ctypes.CDLL(str(path))
                library.mambaformer_scan_abi.restype = ctypes.c_int64
                library.mambaformer_scan_chunk.restype = ctypes.c_int64
                library.mambaformer_scan_isa.restype = ctypes.c_char_p
                if (library.mambaformer_scan_abi(), library.mambaformer_scan_chunk()) != (ABI, CHUNK):
                    continue
                for name in ("forward", "backward"):
                    function = getattr(library, f"mambaformer_scan_{name}")
                    function.argtypes, function.restype = [ctypes.POINTER(ScanArgs)], ctypes.c_int
            except (OSError, AttributeError):
                continue
            return library
    return None


LIBRARY = load_library()


def _call(name: str, tensors: dict[str, Tensor | None], integers: dict[str, int]) -> None:
    """Call the library. Its OpenMP threads are as many as PyTorch's own at this moment."""
    args = ScanArgs(**integers, threads=torch.get_num_threads())
    for key, tensor in tensors.items():
        if tensor is not None:
            setattr(args, key, tensor.data_ptr())
    if getattr(LIBRARY, f"mambaformer_scan_{name}")(ctypes.byref(args)) != 0:
        raise MemoryError(f"the selective scan's {name} pass found no memory for its workspace; use a smaller batch")


def _rows(x: Tensor | None) -> Tensor | None:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Batch and time strides of `(batch, length, …)` tensors under the names that `ScanArgs` gives them."""
    strides = {}
    for name, x in tensors.items():
        if x is not None:
            strides[f"{name}_batch"], strides[f"{name}_time"] = x.stride(0), x.stride(1)
    return strides


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
    u, delta, B, C, z = _rows(u), _rows(delta), _rows(B), _rows(C), _rows(z)
    A = A.contiguous()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    out = u.new_empty(batch, length, dim)
    last_state = u.new_empty(batch, dim, state) if last_state is None else last_state
    checkpoints = u.new_empty(batch, -(-length // CHUNK), state, dim) if save_checkpoints else u.new_empty(0)
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    tensors |= dict(out=out, last_state=last_state, checkpoints=checkpoints if save_checkpoints else None)
    sizes = dict(batch=batch, length=length, dim=dim, state=state, delta_softplus=int(delta_softplus))
    _call("forward", tensors, sizes | _strides(u=u, delta=delta, B=B, C=C, z=z))
    return out, last_state, checkpoints


def _empty_gradients(u, A, B, D, z, delta_bias) -> tuple[Tensor, ...]:
    """Room for the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; empty where there is no input."""
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
    grad_out, u, delta, B, C, z = _rows(grad_out), _rows(u), _rows(delta), _rows(B), _rows(C), _rows(z)
    A, grad_last_state = A.contiguous(), None if grad_last_state is None else grad_last_state.contiguous()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    gradients = _empty_gradients(u, A, B, D, z, delta_bias)
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, checkpoints=checkpoints)
    tensors |= dict(grad_out=grad_out, grad_last_state=grad_last_state)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for name, gradient in zip(names, gradients, strict=True):
        tensors[f"grad_{name}"] = gradient if gradient.numel() else None
    sizes = dict(batch=batch, length=length, dim=dim, state=state, delta_softplus=int(delta_softplus))
    _call("backward", tensors, sizes | _strides(u=u, delta=delta, B=B, C=C, z=z, grad_out=grad_out))
    return gradients


def _register() -> None:
    """Register forward and backward as operators that autograd, FakeTensor and torch.compile understand.

    The names carry the version of the interface. This file may be loaded a second time in one process, as remote code
    of a checkpoint next to the installed package: the operators of the first time then serve both.
    """
    inputs = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
    forward = torch.library.custom_op(
        f"mambaformer::selective_scan_v{ABI}",
        lambda *args: native_forward(*args, save_checkpoints=True),
        mutates_args=(),
        device_types="cpu",
        schema=f"({inputs}, Tensor? initial_state, bool delta_softplus) -> (Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        f"mambaformer::selective_scan_backward_v{ABI}",
        native_backward,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor grad_out, Tensor? grad_last_state, {inputs}, Tensor checkpoints, bool delta_softplus) -> "
        f"({', '.join(['Tensor'] * 9)})",
    )

    def fake_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus):
        (batch, length, dim), state = u.shape, A.shape[1]
        chunks = (length + CHUNK - 1) // CHUNK
        return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(batch, dim, state), u.new_empty(
            batch, chunks, state, dim
        )

    def fake_backward(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, checkpoints, delta_softplus):
        return _empty_gradients(u, A, B, D, z, delta_bias)

    def setup_context(ctx, inputs, output):
        *tensors, initial_state, delta_softplus = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.delta_softplus = delta_softplus
        ctx.has_initial_state = initial_state is not None

    def differentiate(ctx, grad_out, grad_last_state, _):
        *tensors, checkpoints = ctx.saved_tensors
        operator = getattr(torch.ops.mambaformer, f"selective_scan_backward_v{ABI}")
        gradients = list(operator(grad_out, grad_last_state, *tensors, checkpoints, ctx.delta_softplus))
        present = [tensor is not None for tensor in tensors] + [ctx.has_initial_state]
        return *(gradient if here else None for gradient, here in zip(gradients, present, strict=True)), None

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup_context)


if LIBRARY is not None and not hasattr(torch.ops.mambaformer, f"selective_scan_v{ABI}"):
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
    operator = getattr(torch.ops.mambaformer, f"selective_scan_v{ABI}")
    out, last_state, _ = operator(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
    return out, last_state
