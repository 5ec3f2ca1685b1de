# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
ET5's matrices held as int8 numbers only, in place of its float layers.

Projections of the attention, feed-forward matrices, embeddings and head of encoder and decoder are rounded, with one
scale a row. Norms and the bias of distances are float32, whatever the precision of the rest of the model: so are then
the states, which compiled products and the compiled decoder pass read.
"""

from __future__ import annotations

import torch
from torch import nn

from .quantized_modules import RoundedEmbedding, RoundedLinear, is_rounded

ET5_ROUNDED = ("int8",)
FAMILIES = ("t5", "mt5", "umt5")
EXPERT = "ET5"
TENSORS = ("qweight", "scales")
STACKS = ("encoder.embed_tokens", "decoder.embed_tokens")  # both are `shared`


def check_et5(et5: nn.Module, weight_format: str) -> None:
    """Raise `ValueError` where `round_et5` cannot serve this ET5 or format."""
    if weight_format not in ET5_ROUNDED:
        raise ValueError(f"et5 is {weight_format!r}: choose one of {list(ET5_ROUNDED)}, or leave it out.")
    if et5.config.model_type not in FAMILIES:
        raise ValueError(
            f"ET5 is of the family {et5.config.model_type!r}, and only {list(FAMILIES)} can be held in "
            f"{weight_format}: keep its float weights."
        )
    if is_rounded(et5):
        raise ValueError("ET5's weights are rounded already: load the model that they were made from.")


def round_et5(et5: nn.Module, weight_format: str) -> None:
    """
    Put rounded layers in place of ET5's matrices, in turn; a tied head stays tied, an untied one is rounded by itself.

    Args:
        et5 (`T5ForConditionalGeneration` or its mT5 or umT5 sister): on the meta device it becomes a skeleton, for
            loading, whose head is tied unless the file has one.
        weight_format: `int8`.

    Raises:
        ValueError: for another format or family, or weights that are rounded already.
    """
    check_et5(et5, weight_format)
    shared, head = et5.get_input_embeddings(), et5.get_output_embeddings()
    tied = head.weight is shared.weight or (head.weight.is_meta and "lm_head.weight" in et5.all_tied_weights_keys)
    if tied:  # its tensors are those of the embeddings, and not made twice
        head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    et5.set_input_embeddings(RoundedEmbedding(shared, EXPERT))
    et5.set_output_embeddings(RoundedLinear(weight_format, head, EXPERT))
    tie_et5(et5, tied)
    for stack in (et5.encoder, et5.decoder):
        for parent in list(stack.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, RoundedLinear(weight_format, layer, EXPERT))
    cast(et5, torch.float32)


def restore_et5(et5: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers of the rounded values in place of the rounded ones, in `dtype`; a tied head is tied again."""
    shared, head = et5.get_input_embeddings(), et5.get_output_embeddings()
    tied = head.qweight is shared.qweight
    et5.set_input_embeddings(shared.restored().to(dtype))
    if tied:
        restored = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        restored.weight = et5.get_input_embeddings().weight
    else:
        restored = head.restored().to(dtype)
    et5.set_output_embeddings(restored)
    for stack in (et5.encoder, et5.decoder):
        for parent in list(stack.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, RoundedLinear):
                    setattr(parent, name, layer.restored().to(dtype))
    cast(et5, dtype)
    et5.__dict__.pop("_tied_weights_keys", None)  # the class's own serves again
    et5.all_tied_weights_keys = et5.get_expanded_tied_weights_keys()
    if not tied:
        et5.all_tied_weights_keys.pop("lm_head.weight", None)


def tie_et5(et5: nn.Module, head_too: bool) -> None:
    """Let the head have the embeddings' tensors if it is to, and say what is tied where transformers looks for it."""
    shared, head = et5.get_input_embeddings(), et5.get_output_embeddings()
    if head_too:
        head.qweight, head.scales = shared.qweight, shared.scales
    tied = (*STACKS, "lm_head") if head_too else STACKS
    et5._tied_weights_keys = {f"{path}.{name}": f"shared.{name}" for path in tied for name in TENSORS}
    et5.all_tied_weights_keys = dict(et5._tied_weights_keys)


def cast(et5: nn.Module, dtype: torch.dtype) -> None:
    """Norms and biases of distance to `dtype`, in place; scales stay float32."""
    for name, parameter in et5.named_parameters():
        if parameter.is_floating_point() and not name.endswith(".scales"):
            parameter.data = parameter.data.to(dtype)
