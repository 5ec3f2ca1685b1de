# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Rounded weights in transformers' own terms: `quantization_config`, saved and loaded as any quantised model is.

`config.json` of such a checkpoint carries `{"quant_method": "mambaformer", "weights": "int8"}`, with `"et5": "int8"`
where ET5 is rounded too, and its safetensors file int8 (or packed 4-bit) tensors `…qweight` with float `…scales`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_et5 import ET5_ROUNDED
from .quantized_modules import ROUNDED_FORMATS

METHOD = "mambaformer"


class MambaFormerQuantizationConfig(QuantizationConfigMixin):
    """
    How the experts' matrices are held; the router and what is accuracy-critical in either expert stay float.

    Args:
        weights (`str`, *optional*): of EMamba: `int8`, one scale a row; or `int4`, which holds the two large
            projections of each layer in 4 bits, one scale for 32 weights, and the other matrices in int8. `None`
            keeps EMamba float, and ET5 alone is rounded.
        et5 (`str`, *optional*): of ET5: `int8`, one scale a row. `None` keeps ET5 float.

    Raises:
        ValueError: for other formats, none at all, or a field that this version does not know.

    Example::

        model = MambaFormerForConditionalGeneration.from_pretrained(
            "mambaformer/", quantization_config=MambaFormerQuantizationConfig("int8")
        )
        model.save_pretrained("mambaformer-int8/")
    """

    def __init__(self, weights: str | None = "int8", et5: str | None = None, **kwargs: Any):
        self.quant_method = kwargs.pop("quant_method", METHOD)
        self.weights, self.et5 = weights, et5
        if weights not in ROUNDED_FORMATS and (weights is not None or et5 is None):
            raise ValueError(f"quantization_config.weights is {weights!r}: choose one of {list(ROUNDED_FORMATS)}.")
        if et5 is not None and et5 not in ET5_ROUNDED:
            raise ValueError(
                f"quantization_config.et5 is {et5!r}: choose one of {list(ET5_ROUNDED)}, or leave it out."
            )
        if kwargs:
            name, value = next(iter(kwargs.items()))
            raise ValueError(f"quantization_config.{name} is {value!r}, a field that is not known: leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """The fields, without `et5` where it is float, as versions that round EMamba alone write and read them."""
        fields = super().to_dict()
        if fields.get("et5") is None:
            fields.pop("et5", None)
        return fields

    def apply(self, model: nn.Module) -> None:
        """Round the matrices of `model`, whose code may be of a version that rounds EMamba alone."""
        model._round_weights(self.weights, *([] if self.et5 is None else [self.et5]))


class MambaFormerQuantizer(HfQuantizer):
    """
    Called by `from_pretrained`: before loading for a rounded checkpoint, after it for a float one.

    The work is the model's own (`_round_weights`, `_restore_weights`): its code may be another copy than this, as
    remote code of a checkpoint beside the installed package.
    """

    quantization_config: MambaFormerQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not hasattr(model, "_round_weights"):
            raise ValueError(
                f"quantization_config.quant_method is {METHOD!r}, which {type(model).__name__} does not have: use "
                "another method."
            )
        if self.pre_quantized:
            self.quantization_config.apply(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.quantization_config.apply(model)
        for name, parameter in model.named_parameters():
            if name.endswith((".qweight", ".scales")):
                parameter.requires_grad_(False)  # loading makes every float parameter trainable

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        model._restore_weights(dtype)
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: no."""
        return False


def quantize_loaded(model: nn.Module, weights: str | None, et5: str | None = None) -> None:
    """Do to a model in memory what `from_pretrained(…, quantization_config=…)` does to one that it loads."""
    config = MambaFormerQuantizationConfig(weights, et5)
    config.apply(model)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer = MambaFormerQuantizer(config)
    model.hf_quantizer.postprocess_model(model)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # whichever copy of this file is loaded first serves all
    register_quantizer(METHOD)(MambaFormerQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(MambaFormerQuantizationConfig)
