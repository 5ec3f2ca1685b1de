# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba's weights in the form in which the compiled decoding step (`native/decode_step.cpp`) reads them.

`float32` keeps every value as it is: a matrix that bfloat16 holds exactly, as after loading a bfloat16 file, is read
from such a copy, half the bytes, and any other where it is. `bfloat16` and `int8` hold rounded copies beside the
model. Matrices that are rounded in the model itself (`quantized_modules`) are read where they are, whatever the
format. In every format, norms, convolution, the projection of step sizes, A and D are float32.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from .module_snapshot import Snapshot
from .native_library import found_libraries
from .rounded_weight import RoundedWeight
from .weight_arena import Arena
from .weight_rounding import GROUP, quantize_rows

DECODE_ABI = 13
FLOAT32, BFLOAT16, INT8, INT4, PANELS = range(5)  # of native/matrices.h
BYTES = 64  # columns of an int8 matrix are filled up to a multiple of this
LOG2_E = 1.4426950408889634
PANEL_ROWS = 16  # of a matrix, side by side; a thread takes whole panels of each half of in_proj
WIDEST_INT8 = 65536  # columns, whose int8 products still add up in 32 bits
WIDTHS = {FLOAT32: 4, BFLOAT16: 2, PANELS: 2, INT8: 1}  # bytes of a value
STORED = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
WEIGHT_FORMATS = ("float32", "bfloat16", "int8")
ROWS_AT_A_TIME = 256
PRODUCTS_A_THREAD = 2**21
"""
Multiplications that are worth a thread. The threads of a step meet in every layer, and one that has to wait for its
processor holds up the others.
"""


class Matrix(ctypes.Structure):
    """`Matrix` of native/decode_step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "scale", "bias", "sums")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "columns", "format")]


class Layer(ctypes.Structure):
    """`Layer` of native/decode_step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("norm", "conv_weight", "conv_bias", "A2", "D")]
    _fields_ += [(name, Matrix) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]


class StepArgs(ctypes.Structure):
    """`StepArgs` of native/decode_step.cpp."""

    _fields_ = [("layers", ctypes.POINTER(Layer)), ("ids", ctypes.c_void_p), ("embedding", ctypes.c_void_p)]
    _fields_ += [("embedding_scale", ctypes.c_void_p), ("norm", ctypes.c_void_p)]
    _fields_ += [("windows", ctypes.POINTER(ctypes.c_void_p))]
    _fields_ += [("states", ctypes.POINTER(ctypes.c_void_p)), ("hidden_out", ctypes.c_void_p)]
    _fields_ += [("logits", ctypes.c_void_p), ("embedded", ctypes.c_void_p)]
    _fields_ += [("head", Matrix), ("epsilon", ctypes.c_double)]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in (
            "layer_count",
            "batch",
            "hidden",
            "dim",
            "state",
            "kernel",
            "rank",
            "vocab",
            "embedding_format",
            "embedding_row",
            "window_format",
            "threads",
        )
    ]


class RunArgs(ctypes.Structure):
    """`RunArgs` of native/decode_step.cpp."""

    _fields_ = [("step", StepArgs)] + [(name, ctypes.c_int64) for name in ("length", "begin", "log_begin")]
    _fields_ += [(name, ctypes.POINTER(ctypes.c_void_p)) for name in ("window_log", "state_log")]


def load_decode_library() -> ctypes.CDLL | None:
    """The first library found whose structures are those above, or None."""
    for library in found_libraries("_decode_step"):
        if hasattr(library, "mambaformer_decode_abi"):
            library.mambaformer_decode_abi.restype = ctypes.c_int64
            library.mambaformer_decode_isa.restype = ctypes.c_char_p
            if library.mambaformer_decode_abi() == DECODE_ABI:
                return library
    return None


DECODE_LIBRARY = load_decode_library()


class Packing:
    """
    Matrices and vectors of a model in the form in which compiled code reads them.

    It owns what it copied and refers to the rest, and knows both well enough to notice a change.

    Args:
        weight_format (`str`): one of `WEIGHT_FORMATS`, for matrices that the model holds in float32 or bfloat16.

    Attributes:
        checked: a `sample` of the values that were packed.
    """

    checked: Tensor

    def __init__(self, weight_format: str):
        self.weight_format = weight_format
        self.plain: list[Tensor] = []  # parameters whose own memory the structures point to
        self.copies: list[Tensor] = []  # what was made from parameters, and is pointed to
        self.arena = Arena()
        self.sources: list[Tensor] = []  # the parameters it was made from
        self.sampled: list[Tensor] | None = None  # where `sample` reads
        self.products = 0  # a token, in all matrices
        self.filled: dict[int, tuple[int, int]] = {}  # of int8 matrices: parameter -> addresses of rows and their sums

    @property
    def copied_bytes(self) -> int:
        """Memory taken beside the parameters, in bytes."""
        return sum(x.nbytes for x in self.copies)

    def threads(self, tokens: int) -> int:
        """How many of PyTorch's threads so many tokens are worth; at least one."""
        return max(1, min(torch.get_num_threads(), self.products * tokens // PRODUCTS_A_THREAD))

    def sample(self) -> Tensor:
        """Some values of every copied parameter, which tell of changes that PyTorch does not count (`.data`)."""
        if self.sampled is None:
            unique = {id(parameter): parameter.detach() for parameter in self.sources}
            self.sampled = [some_of(x) for x in unique.values()]
        return torch.cat([torch.empty(0), *(x.float() for x in self.sampled)])

    def _matrix(self, linear: nn.Module, rounded: bool = True) -> Matrix:
        """A linear layer's matrix and bias; `rounded=False` keeps it float32 whatever the format."""
        weight, (rows, columns) = linear.weight, linear.weight.shape
        matrix = Matrix(bias=self._float(linear.bias), rows=rows, columns=columns)
        self.products += rows * columns
        if isinstance(linear, RoundedWeight):
            if linear.weight_format == "int4":
                matrix.data, matrix.format = self._plain(linear.qweight).data_ptr(), INT4
                matrix.scale = self._as(linear.scales, torch.bfloat16)
            else:
                (matrix.data, matrix.sums), matrix.format = self._rows(linear.qweight), INT8
                matrix.scale = self._float(linear.scales)
        elif not rounded:
            matrix.data, matrix.format = self._float(weight), FLOAT32
        elif self.weight_format == "int8":
            whole, scale = quantize_rows(weight)
            (matrix.data, matrix.sums), matrix.format = self._rows(whole, weight), INT8
            matrix.scale = self._copy(weight, scale)
        elif weight.dtype != torch.bfloat16 and (self.weight_format == "bfloat16" or is_bfloat16(weight)):
            half, fits = weight.detach().to(torch.bfloat16), rows % (2 * PANEL_ROWS) == 0
            matrix.data, matrix.format = (
                self._copy(weight, panels(half) if fits else half),
                PANELS if fits else BFLOAT16,
            )
        else:
            matrix.data, matrix.format = self._plain(weight).data_ptr(), STORED[weight.dtype]
        return matrix

    def _embed(self, args: ctypes.Structure, embeddings: nn.Module) -> torch.dtype:
        """Enter the embeddings in `args`; returns the dtype in which the modules read them."""
        rounded = isinstance(embeddings, RoundedWeight)
        weight = embeddings.qweight if rounded else self._plain(embeddings.weight)
        args.vocab, width = weight.shape
        if rounded:
            args.embedding, args.embedding_scale = self._rows(weight)[0], self._float(embeddings.scales)
            args.embedding_format, args.embedding_row = INT8, -(-width // BYTES) * BYTES
            return torch.float32
        args.embedding, args.embedding_format, args.embedding_row = weight.data_ptr(), STORED[weight.dtype], width
        return weight.dtype

    def _rows(self, whole: Tensor, source: Tensor | None = None) -> tuple[int, int]:
        """Addresses of int8 rows, filled up with zeros, and of their sums; `source` is what they were rounded from."""
        if source is None and id(whole) in self.filled:  # a head that is tied to the embeddings
            return self.filled[id(whole)]
        parameter = whole if source is None else source
        rest = -whole.shape[1] % BYTES
        if rest or source is not None:
            data = self._copy(parameter, torch.nn.functional.pad(whole.detach(), (0, rest)))
        else:
            data = self._plain(whole).data_ptr()
        addresses = data, self._copy(parameter, row_sums(whole.detach()))
        if source is None:
            self.filled[id(whole)] = addresses
        return addresses

    def _float(self, parameter: Tensor | None) -> int | None:
        """Address of a parameter in float32, the parameter's own where possible."""
        return None if parameter is None else self._as(parameter, torch.float32)

    def _as(self, parameter: Tensor, dtype: torch.dtype) -> int:
        """Address of a parameter in `dtype`, the parameter's own where possible."""
        if parameter.dtype == dtype:
            return self._plain(parameter).data_ptr()
        return self._copy(parameter, parameter.detach().to(dtype))

    def _plain(self, parameter: Tensor) -> Tensor:
        """The parameter itself, or a contiguous copy."""
        if not parameter.is_contiguous():
            self._copy(parameter, parameter.detach())
            return self.copies[-1]
        self.plain.append(parameter.detach())
        return self.plain[-1]

    def _copy(self, parameter: Tensor, tensor: Tensor) -> int:
        """Keep `tensor`, made from `parameter`; returns its address."""
        self.sources.append(parameter)
        self.copies.append(self.arena.take(tensor.detach()))
        return self.copies[-1].data_ptr()


Packed = TypeVar("Packed", bound=Packing)


class PackingKeeper(Generic[Packed]):
    """
    Keeps a packing as long as nothing that it was made from has changed. A copy starts with nothing packed.

    Args:
        weight_format (`str`): of the packing.
    """

    def __init__(self, weight_format: str):
        self.weight_format = weight_format
        self._ready: tuple[Snapshot, Packed | None] | None = None

    def __getstate__(self) -> dict:
        return {"weight_format": self.weight_format, "_ready": None}  # addresses mean nothing elsewhere

    def _unchanged(self, *roots: nn.Module, check: bool = True) -> bool:
        """
        Whether `_ready` still holds for `roots`, be it a packing or that there is none.

        Args:
            check: also compare a sample of the values, for changes that PyTorch does not count.
        """
        if self._ready is None or not self._ready[0].holds(*roots):
            return False
        packed = self._ready[1]
        return packed is None or not check or torch.equal(packed.checked, packed.sample())


def some_of(tensor: Tensor) -> Tensor:
    """About 64 values of a tensor, a view `(n,)`; of one that is not contiguous, of its first column."""
    line = tensor.view(-1) if tensor.is_contiguous() else tensor
    while line.ndim > 1:
        line = line.select(-1, 0)
    return line[:: max(1, line.numel() // 64)]


def row_sums(whole: Tensor) -> Tensor:
    """Sums of int8 rows `(rows, columns)` in int32, some rows at a time: PyTorch would hold all of them in int32."""
    sums = torch.empty(len(whole), dtype=torch.int32)
    for some, to in zip(whole.split(ROWS_AT_A_TIME), sums.split(ROWS_AT_A_TIME), strict=True):
        torch.sum(some, 1, dtype=torch.int32, out=to)
    return sums


def panels(matrix: Tensor) -> Tensor:
    """A `(rows, columns)` matrix as `PANELS`, `(rows / 16, columns, 8, 2)`: rows i and i + 8 side by side."""
    return matrix.reshape(-1, 2, PANEL_ROWS // 2, matrix.shape[1]).permute(0, 3, 2, 1).contiguous()


def is_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 holds every value of a float32 tensor exactly."""
    bits = weight.detach().contiguous().view(torch.int32).flatten()
    return not any(bool((part & 0xFFFF).any()) for part in bits.split(2**18))


class PackedWeights(Packing):
    """
    The decoding step's view of one EMamba; it owns what it copied and refers to the rest.

    Args:
        emamba (`MambaForCausalLM`): whose modules the caller has found to be the plain ones, on the CPU.
        weight_format (`str`): one of `WEIGHT_FORMATS`.
    """

    def __init__(self, emamba: nn.Module, weight_format: str):
        super().__init__(weight_format)
        backbone, config = emamba.base_model, emamba.config
        blocks = list(backbone.layers)
        self.layers = (Layer * len(blocks))()
        for layer, block in zip(self.layers, blocks, strict=True):
            self._fill(layer, block)
        mixer = blocks[0].mixer
        self.args = StepArgs(
            layers=self.layers,
            norm=self._float(backbone.norm_f.weight),
            head=self._matrix(emamba.get_output_embeddings()),
            epsilon=config.layer_norm_epsilon,
            layer_count=len(blocks),
            hidden=mixer.hidden_size,
            dim=mixer.intermediate_size,
            state=mixer.ssm_state_size,
            kernel=mixer.conv_kernel_size,
            rank=mixer.time_step_rank,
        )
        self.dtype = self._embed(self.args, backbone.embeddings)
        self.window_shape = (mixer.intermediate_size, mixer.conv_kernel_size)
        self.state_shape = (mixer.intermediate_size, mixer.ssm_state_size)
        self.checked = self.sample()

    @cached_property
    def step_bytes(self) -> int:
        """Bytes of weights that one step reads: all matrices, whatever the batch."""
        matrices = [m for layer in self.layers for m in (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)]
        matrices.append(self.args.head)
        groups = sum(m.rows * -(-m.columns // GROUP) * (GROUP // 2 + 2) for m in matrices if m.format == INT4)
        return groups + sum(m.rows * m.columns * WIDTHS[m.format] for m in matrices if m.format != INT4)

    def _fill(self, layer: Layer, block: nn.Module) -> None:
        mixer = block.mixer
        layer.norm = self._float(block.norm.weight)
        layer.conv_weight = self._float(mixer.conv1d.weight)
        layer.conv_bias = self._float(mixer.conv1d.bias)
        layer.A2 = self._copy(mixer.A_log, -torch.exp(mixer.A_log.detach().float()) * LOG2_E)
        layer.D = self._float(mixer.D)
        layer.in_proj = self._matrix(mixer.in_proj)
        layer.x_proj = self._matrix(mixer.x_proj)
        layer.dt_proj = self._matrix(mixer.dt_proj, rounded=False)
        layer.out_proj = self._matrix(mixer.out_proj)
