# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Layers of rounded weights, and EMamba's matrices held as int8 or 4-bit numbers only, in place of its float layers.

Compiled code reads these tensors as they are: EMamba's decoding step, and the product of a layer on a CPU. Everything
else multiplies with some rows at a time made float again, so that no float copy is kept. EMamba's projection of step
sizes, convolution, norms, A and D stay as they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native_linear import native_linear
from .rounded_weight import RoundedWeight, refusal

ROUNDED_FORMATS = ("int8", "int4")
ROUNDED = "qweight"  # the tensor of a rounded layer that is neither float32 nor bfloat16
FAMILY = "mamba"
BLOCK = 2**18  # weights that are made float at a time: what a core's cache holds
COARSE = ("in_proj", "out_proj")  # 4 bits wide in `int4`; the other matrices are int8 there too


class RoundedLinear(RoundedWeight):
    """
    `nn.Linear` of rounded weights.

    Inference in float32 on a CPU rounds its input too and multiplies whole numbers, as the decoding step does, where
    the compiled code is there. Otherwise products are made in the dtype of the input.
    """

    def __init__(self, weight_format: str, like: nn.Linear, expert: str = "EMamba"):
        super().__init__(weight_format, like, expert)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        product = native_linear(self, self.bias, x)
        if product is not None:
            return product
        step = max(1, BLOCK // max(1, self.columns))
        parts = [F.linear(x, self.dequantize(r, r + step).to(x.dtype)) for r in range(0, self.rows, step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def restored(self) -> nn.Linear:
        """The float32 layer of these weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.dequantize())
        layer.bias = self.bias
        return layer


class RoundedEmbedding(RoundedWeight):
    """`nn.Embedding` of rounded weights, always int8; rows come out in float32."""

    def __init__(self, like: nn.Embedding, expert: str = "EMamba"):
        super().__init__("int8", like, expert)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Long ids of any shape to float32 `(…, embedding_dim)`."""
        return self.qweight[ids].float() * self.scales[ids].float()[..., None]

    def restored(self) -> nn.Embedding:
        """The float32 layer of these weights."""
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        layer.weight = nn.Parameter(self.dequantize())
        return layer


def is_rounded(module: nn.Module) -> bool:
    """Whether a matrix inside `module` is rounded."""
    return any(isinstance(child, RoundedWeight) for child in module.modules())


def refuse_training(module: nn.Module) -> None:
    """Raise `ValueError` where a matrix inside `module` is rounded, naming the experts whose it is."""
    experts = {child.expert for child in module.modules() if isinstance(child, RoundedWeight)}
    if experts:
        raise ValueError(refusal(sorted(experts)))


def round_emamba(emamba: nn.Module, weight_format: str) -> None:
    """
    Put rounded layers in place of EMamba's projections, embeddings and head, in turn; a tied head stays tied.

    Args:
        emamba (`MambaForCausalLM`): on the meta device it becomes a skeleton, for loading.
        weight_format: `int8`, or `int4`: 4 bits for `COARSE` projections, int8 for the others.

    Raises:
        ValueError: for another format or family, or weights that are rounded already.
    """
    if weight_format not in ROUNDED_FORMATS:
        raise ValueError(f"weights is {weight_format!r}: choose one of {list(ROUNDED_FORMATS)}.")
    if emamba.config.model_type != FAMILY:
        raise ValueError(
            f"EMamba is of the family {emamba.config.model_type!r}, and only {FAMILY!r} can be held in "
            f"{weight_format}: keep its float weights."
        )
    if is_rounded(emamba):
        raise ValueError("EMamba's weights are rounded already: load the model that they were made from.")
    embeddings, head = emamba.get_input_embeddings(), emamba.get_output_embeddings()
    tied = emamba.config.tie_word_embeddings and (head.weight.is_meta or head.weight is embeddings.weight)
    if tied:
        head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    emamba.set_input_embeddings(RoundedEmbedding(embeddings))
    emamba.set_output_embeddings(RoundedLinear("int8", head))
    emamba.all_tied_weights_keys = {}
    if tied:
        tie_rounded(emamba)
    for block in emamba.base_model.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            layer = getattr(block.mixer, name)
            setattr(block.mixer, name, RoundedLinear(weight_format if name in COARSE else "int8", layer))


def tie_rounded(emamba: nn.Module) -> None:
    """Let the head have the embeddings' tensors, and say so where transformers looks for it."""
    head, embeddings = emamba.get_output_embeddings(), emamba.get_input_embeddings()
    head.qweight, head.scales = embeddings.qweight, embeddings.scales
    path = f"{emamba.base_model_prefix}.embeddings"
    emamba._tied_weights_keys = {f"lm_head.{name}": f"{path}.{name}" for name in ("qweight", "scales")}
    emamba.all_tied_weights_keys = dict(emamba._tied_weights_keys)


def list_tied_weights(model: nn.Module, child: str) -> None:
    """Bring the list of tied weights of `model` up to date with that of its `child`."""
    kept = {name: to for name, to in model.all_tied_weights_keys.items() if not name.startswith(f"{child}.")}
    own = {f"{child}.{name}": f"{child}.{to}" for name, to in getattr(model, child).all_tied_weights_keys.items()}
    model.all_tied_weights_keys = {**kept, **own}


def restore_emamba(emamba: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers of the rounded values in place of the rounded ones, in `dtype`; a tied head is tied again."""
    emamba.set_input_embeddings(emamba.get_input_embeddings().restored().to(dtype))
    emamba.set_output_embeddings(emamba.get_output_embeddings().restored().to(dtype))
    for block in emamba.base_model.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            setattr(block.mixer, name, getattr(block.mixer, name).restored().to(dtype))
    emamba.__dict__.pop("_tied_weights_keys", None)  # the class's own serves again
    emamba.all_tied_weights_keys = emamba.get_expanded_tied_weights_keys()
    emamba.tie_weights()
