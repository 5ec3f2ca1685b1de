# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba's matrices held as int8 or 4-bit numbers only, in place of its float layers.

The compiled decoding step reads these tensors as they are. Everything else (sources, several tokens at once, machines
without the compiled step) multiplies with some rows at a time made float again, so that no float copy is kept. The
projection of step sizes, convolution, norms, A and D stay as they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight_rounding import GROUP, GROUP_BYTES, dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

ROUNDED_FORMATS = ("int8", "int4")
FAMILY = "mamba"
BLOCK = 2**18  # weights that are made float at a time: what a core's cache holds
COARSE = ("in_proj", "out_proj")  # 4 bits wide in `int4`; the other matrices are int8 there too


class RoundedWeight(nn.Module):
    """
    A matrix `(rows, columns)` of rounded numbers.

    Args:
        weight_format: `int8` or `int4`, see `weight_rounding`. like: the float layer, which is not kept; on the meta
            device the tensors are left empty, to be loaded.
    """

    def __init__(self, weight_format: str, like: nn.Linear | nn.Embedding):
        super().__init__()
        weight = like.weight
        self.weight_format = weight_format
        self.rows, self.columns = weight.shape
        if weight.is_meta:
            groups = -(-self.columns // GROUP)
            if weight_format == "int4":
                whole = torch.empty(self.rows, groups * GROUP_BYTES, dtype=torch.uint8, device="meta")
                scale = torch.empty(self.rows, groups, dtype=torch.bfloat16, device="meta")
            else:
                whole = torch.empty(self.rows, self.columns, dtype=torch.int8, device="meta")
                scale = torch.empty(self.rows, dtype=torch.float32, device="meta")
        else:
            whole, scale = (quantize_groups if weight_format == "int4" else quantize_rows)(weight)
        self.qweight = nn.Parameter(whole, requires_grad=False)
        self.scales = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """
        The shape and dtype of the matrix, without values, as code that knows the float layer asks for.

        It is on the meta device, so that whoever would compute with it gets an error; see `dequantize`.
        """
        return torch.empty(self.rows, self.columns, dtype=torch.float32, device="meta")

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows `first` to `last` in float32, `(last - first, columns)`."""
        whole, scale = self.qweight[first:last], self.scales[first:last]
        if self.weight_format == "int4":
            return dequantize_groups(whole, scale, self.columns)
        return dequantize_rows(whole, scale)

    def train(self, mode: bool = True) -> RoundedWeight:
        """Raises `ValueError` for `mode=True`: rounded numbers have no gradient."""
        if mode:
            refuse_training(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Shape and format, as `print(model)` shows them."""
        return f"{self.rows}, {self.columns}, {self.weight_format}"


class RoundedLinear(RoundedWeight):
    """`nn.Linear` of rounded weights; products are made in the dtype of the input."""

    def __init__(self, weight_format: str, like: nn.Linear):
        super().__init__(weight_format, like)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
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

    def __init__(self, like: nn.Embedding):
        super().__init__("int8", like)
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
    """Raise `ValueError` where a matrix inside `module` is rounded."""
    if is_rounded(module):
        raise ValueError(
            "EMamba's weights are rounded and cannot be trained: train the model that they were made from, or call "
            "`model.dequantize()` first."
        )


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
