# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
A pass of ET5's decoder in one call of compiled code (`native/et5_pass.cpp`), where nothing forbids it.

It reads the parameters of transformers' modules and keeps keys and values where `LazyET5State` has them. Where it does
not apply it returns `None`, and the modules are run.
"""

from __future__ import annotations

import ctypes
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

from .module_snapshot import Snapshot, is_plain_call, report
from .packed_weights import BFLOAT16, DECODE_LIBRARY, FLOAT32, WIDEST_INT8, Matrix, Packing, PackingKeeper
from .quantized_modules import ROUNDED, RoundedEmbedding, RoundedLinear
from .relative_bias import DistanceBiasMT5Attention, DistanceBiasT5Attention

OFF = "off"
ET5_FORMATS = ("float32", "int8")
MATRICES = ("q", "k", "v", "o", "cross_q", "cross_o", "wi", "gate", "wo")
MODELS = (T5ForConditionalGeneration, MT5ForConditionalGeneration)
PARTS = ["Stack", "Block", "LayerSelfAttention", "LayerCrossAttention", "LayerFF", "Attention", "LayerNorm"]
PARTS += ["DenseActDense", "DenseGatedActDense"]
KNOWN = {getattr(modeling_t5, f"T5{part}") for part in PARTS} | {getattr(modeling_mt5, f"MT5{part}") for part in PARTS}
KNOWN |= {DistanceBiasT5Attention, DistanceBiasMT5Attention}
KNOWN |= {nn.Linear, nn.Embedding, nn.ModuleList, nn.Dropout, RoundedLinear, RoundedEmbedding}
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_new": 2}  # of native/et5_pass.cpp
MOST_TOKENS = 96  # of all rows of a pass; more of them keep a BLAS busy, whose products are then faster


class Et5Layer(ctypes.Structure):
    """`Et5Layer` of native/et5_model.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("norm", "cross_norm", "ff_norm")]
    _fields_ += [(name, Matrix) for name in MATRICES]
    _fields_ += [(name, ctypes.c_void_p) for name in ("keys", "values", "cross_keys", "cross_values")]


class Et5Model(ctypes.Structure):
    """`Et5Model` of native/et5_model.h."""

    _fields_ = [("layers", ctypes.POINTER(Et5Layer))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("embedding", "embedding_scale", "norm")]
    _fields_ += [("epsilon", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_int64) for name in ("layer_count", "hidden", "heads", "width", "ff", "vocab")]
    _fields_ += [(name, ctypes.c_int64) for name in ("embedding_format", "embedding_row", "activation")]


class Et5Args(ctypes.Structure):
    """`Et5Args` of native/et5_pass.cpp."""

    _fields_ = [("model", Et5Model)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("ids", "rows", "sources", "mask", "distance_bias", "logits")]
    _fields_ += [("head", Matrix), ("scale", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "length", "start", "kept", "capacity")]
    _fields_ += [(name, ctypes.c_int64) for name in ("source_length", "bias_row", "ids_row", "threads")]


class PackedStack(Packing):
    """
    The compiled pass's view of ET5's encoder or decoder.

    Args:
        et5: whose modules the caller has found to be the plain ones, float32 on the CPU. stack: one of its two.
        weight_format: one of `ET5_FORMATS`; `int8` holds rounded copies of the stack's matrices beside the model.
    """

    checked: Tensor

    def __init__(self, et5: nn.Module, stack: nn.Module, weight_format: str):
        super().__init__(weight_format)
        config = et5.config
        self.layers = (Et5Layer * len(stack.block))()
        for layer, block in zip(self.layers, stack.block, strict=True):
            self._fill(layer, block.layer[0], block.layer[-1], config.is_gated_act)
        self.attention = stack.block[0].layer[0].SelfAttention
        self.sources += self.attention.relative_attention_bias.parameters()  # `biases` are made from them
        self.biases: Tensor | None = None
        self.model = Et5Model(
            layers=self.layers,
            norm=self._float(stack.final_layer_norm.weight),
            epsilon=config.layer_norm_epsilon,
            layer_count=len(stack.block),
            hidden=config.d_model,
            heads=config.num_heads,
            width=config.d_kv,
            ff=config.d_ff,
            activation=ACTIVATIONS[config.dense_act_fn],
        )
        self._embed(self.model, stack.embed_tokens)

    def distance_bias(self, before: int, after: int) -> tuple[Tensor, int]:
        """
        Bias of a position to those at most so far before and after it.

        Returns:
            contiguous float32 `(heads, more than before + after)`, and the column of the one `before` positions ago.
        """
        biases = self.biases
        if biases is None or biases.shape[1] // 2 < max(before, after):
            farthest = 2 * max(before, after, 32)
            biases = self.attention.compute_bias(1, 2 * farthest + 1, past_seen_tokens=farthest)
            self.biases = biases = biases[0, :, 0].contiguous()  # (heads, 2 farthest + 1)
        return biases, biases.shape[1] // 2 - before

    def _fill(self, layer: Et5Layer, own: nn.Module, feed: nn.Module, gated: bool) -> None:
        """Enter self-attention and feed-forward part."""
        dense = feed.DenseReluDense
        layer.norm, layer.ff_norm = self._float(own.layer_norm.weight), self._float(feed.layer_norm.weight)
        for name in "qkvo":
            setattr(layer, name, self._matrix(getattr(own.SelfAttention, name)))
        layer.wi = self._matrix(dense.wi_0 if gated else dense.wi)
        if gated:
            layer.gate = self._matrix(dense.wi_1)
        layer.wo = self._matrix(dense.wo)


class PackedET5(PackedStack):
    """The compiled pass's view of ET5's decoder and head; arguments as of `PackedStack`."""

    def __init__(self, et5: nn.Module, weight_format: str):
        super().__init__(et5, et5.decoder, weight_format)
        projections = []  # of the source to keys and values, layer by layer
        for layer, block in zip(self.layers, et5.decoder.block, strict=True):
            cross = block.layer[1]
            layer.cross_norm = self._float(cross.layer_norm.weight)
            layer.cross_q, layer.cross_o = map(self._matrix, (cross.EncDecAttention.q, cross.EncDecAttention.o))
            projections += [cross.EncDecAttention.k, cross.EncDecAttention.v]
        self.head, self.scale = self._matrix(et5.lm_head), head_scale(et5)
        products = self.products
        self.cross = (Matrix * len(projections))(*(self._matrix(x, rounded=False) for x in projections))
        self.products = products  # a source is read once, and a pass has none of these
        self.checked = self.sample()

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that one pass reads, whatever the number of its tokens."""
        matrices = [getattr(layer, name) for layer in self.layers for name in MATRICES] + [self.head]
        return sum(m.rows * m.columns * {FLOAT32: 4, BFLOAT16: 2}.get(m.format, 1) for m in matrices if m.data)


def head_scale(et5: nn.Module) -> float:
    """What final decoder states are multiplied by before the head: T5 v1.0 scales them, as its checkpoint says."""
    config = et5.config  # mT5 never scales, whatever its configuration says of tying
    scales = config.model_type != "mt5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if scales else 1.0


def obstacle(et5: nn.Module, snapshot: Snapshot, weight_format: str) -> str | None:
    """Why the compiled pass does not apply to this ET5, or `None` if it does."""
    if not hasattr(DECODE_LIBRARY, "mambaformer_et5_pass"):
        return "the library was not built; install mambaformer with a C++ compiler at hand"
    if type(et5) not in MODELS:
        return f"it serves T5 and mT5 as transformers has them, and this is a {type(et5).__name__}"
    if snapshot.hooked():
        return "hooks or replaced forward methods want to see its modules run"
    for module in snapshot.modules:
        if type(module) not in KNOWN and (module._parameters or module._modules):
            return f"it has a {type(module).__name__} inside; merge adapters to have it back"
    if et5.config.dense_act_fn not in ACTIVATIONS:
        return f"its activation is {et5.config.dense_act_fn!r}"
    for _, name, parameter in snapshot.slots:
        if parameter is None:
            continue
        known = name == ROUNDED or parameter.dtype == torch.float32
        if parameter.device.type != "cpu" or not known or type(parameter) is not nn.Parameter:
            return f"its {name} is {parameter.dtype} on {parameter.device}, not float32 on the CPU"
        rounded = weight_format == "int8" or name == ROUNDED
        if rounded and parameter.ndim == 2 and parameter.shape[1] > WIDEST_INT8:
            return f"its {name} has {parameter.shape[1]} columns, more than int8 products can sum in 32 bits"
    return None


Packed = TypeVar("Packed", bound=PackedStack)


class CompiledStack(PackingKeeper[Packed]):
    """
    Packs a part of ET5 for the compiled pass: when first needed, and again when PyTorch tells that its weights or
    modules have changed. A copy starts without packed weights.

    Args:
        weight_format (`str`): `float32` (the weights as they are, exact), `int8`, or `off`.

    Raises:
        ValueError: for an unknown `weight_format`.
    """

    WHAT: str

    def __init__(self, weight_format: str = "float32"):
        if weight_format not in (OFF, *ET5_FORMATS):
            raise ValueError(f"weight_format is {weight_format!r}: choose one of {[OFF, *ET5_FORMATS]}.")
        super().__init__(weight_format)

    @staticmethod
    def modules(et5: nn.Module) -> tuple[nn.Module, ...]:
        """What is packed."""
        raise NotImplementedError

    @staticmethod
    def pack(et5: nn.Module, weight_format: str) -> Packed:
        """Pack it."""
        raise NotImplementedError

    def packed(self, et5: nn.Module, check: bool) -> Packed | None:
        """
        The packed weights of `et5`, or `None` where its modules have to be run, which is logged once.

        Args:
            check: also compare a sample of the values, for changes that PyTorch does not count.
        """
        if self.weight_format == OFF or not is_plain_call(et5):
            return None
        modules = self.modules(et5)
        if self._unchanged(*modules, check=check):
            return self._ready[1]
        snapshot, packed = Snapshot(*modules), None
        reason = obstacle(et5, snapshot, self.weight_format)
        if reason is None:
            packed = self.pack(et5, self.weight_format)
        else:
            report(self.WHAT, reason, "info" if self.weight_format == "float32" else "warning")
        self._ready = (snapshot, packed)
        return packed


class ET5Decoder(CompiledStack[PackedET5]):
    """Runs ET5's decoder through the compiled pass; see `CompiledStack`."""

    WHAT = "ET5's compiled decoder pass"
    pack = staticmethod(PackedET5)

    @staticmethod
    def modules(et5: nn.Module) -> tuple[nn.Module, ...]:
        """Decoder and head."""
        return et5.decoder, et5.lm_head


class BoundET5:
    """
    An `ET5Decoder` for one answer, during which nobody changes the model: its modules are looked at once.

    Args:
        decoder: whose packed weights are kept from their first use on.
    """

    def __init__(self, decoder: ET5Decoder):
        self.decoder = decoder
        self.found: tuple[PackedET5 | None] | None = None

    def packed(self, et5: nn.Module, check: bool) -> PackedET5 | None:
        """As of `CompiledStack`."""
        if self.found is None:
            self.found = (self.decoder.packed(et5, check),)
        return self.found[0]


class PassMemory:
    """
    What stays from pass to pass of one request: packed weights, and where the keys and values of rows and sources are.

    Args:
        own: keys and values `(B, H, capacity, K)` of each layer, which passes write at new positions.
        cross: keys and values `(B0, H, S, K)` of each layer. mask: `(B0, S)`, zero on the sources' padding.
    """

    def __init__(
        self,
        packed: PackedET5,
        own: list[tuple[Tensor, Tensor]],
        cross: list[tuple[Tensor, Tensor]],
        mask: Tensor,
    ):
        self.packed, self.own, self.cross, self.mask = packed, own, cross, mask.bool().contiguous()
        self.layers = (Et5Layer * len(packed.layers)).from_buffer_copy(packed.layers)
        for layer, mine, theirs in zip(self.layers, own, cross, strict=True):
            layer.keys, layer.values = (x.data_ptr() for x in mine)
            layer.cross_keys, layer.cross_values = (x.data_ptr() for x in theirs)
        model = Et5Model.from_buffer_copy(packed.model)
        model.layers = self.layers
        self.args = Et5Args(
            model=model,
            mask=self.mask.data_ptr(),
            head=packed.head,
            scale=packed.scale,
            capacity=own[0][0].shape[2],
            source_length=self.mask.shape[1],
        )


def run_pass(
    memory: PassMemory, ids: Tensor, rows: list[int], sources: list[int], start: int, end: int, kept: int
) -> Tensor:
    """
    Positions from `start` to `end` (exclusive) of R rows.

    Args:
        memory: of which keys and values are known before `start`, and written from there on.
        ids: `(B, end or more)` long, what all rows have been given.
        rows, sources: R each, of the memory. kept: how many of the last positions' logits are wanted.

    Returns:
        logits `(R, kept, V)` in float32.

    Raises:
        IndexError: for an id outside the vocabulary, and for rows or positions that `ids` does not have.
        MemoryError: where the workspace finds no memory.
    """
    if min(rows) < 0 or max(rows) >= ids.shape[0] or end > ids.shape[1]:
        raise IndexError(f"rows {rows} up to position {end} are not in ids of shape {tuple(ids.shape)}")
    packed, args, batch, length = memory.packed, memory.args, len(rows), end - start
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    logits = torch.empty(batch, kept, args.model.vocab, dtype=torch.float32)
    numbers = (ctypes.c_int64 * (2 * batch))(*rows, *sources)
    args.rows = ctypes.addressof(numbers)
    args.sources = args.rows + 8 * batch
    args.ids, args.ids_row, args.logits = ids.data_ptr(), ids.stride(0), logits.data_ptr()
    args.batch, args.length, args.start, args.kept = batch, length, start, kept
    biases, first = packed.distance_bias(before=end - 1, after=0)
    args.distance_bias, args.bias_row = biases.data_ptr() + 4 * first, biases.shape[1]
    args.threads = packed.threads(batch * length)
    error = DECODE_LIBRARY.mambaformer_et5_pass(ctypes.byref(args))
    if error:
        check_error(error, f"a pass of {batch} rows and {length} positions", ids[rows, start:end], args.model.vocab)
    return logits


def check_error(error: int, what: str, ids: Tensor | None = None, vocab: int = 0) -> None:
    """
    Raise what a call of the library tells.

    Args:
        ids: which the call has read, if any.

    Raises:
        IndexError: for an id outside the vocabulary.
        MemoryError: where the workspace found no memory.
    """
    if error == 2:
        outside = ids[(ids < 0) | (ids >= vocab)]
        raise IndexError(f"a token id is outside [0, {vocab}): {outside.flatten().tolist()}")
    if error:
        raise MemoryError(f"{what} found no memory; use a smaller batch")
