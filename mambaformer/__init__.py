# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
MambaFormer: token-level routing between a pretrained T5 and a pretrained Mamba, native to the Hugging Face Hub.

Importing this package loads neither torch nor transformers. Its names are loaded when they are first used, and
transformers' Auto classes and `pipeline("text2text-generation")` know MambaFormer from then on.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from .registration import MODELING, register

if TYPE_CHECKING:
    from .configuration.configuration_mambaformer import MambaFormerConfig
    from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
    from .modeling_mambaformer.quantizer_mambaformer import MambaFormerQuantizationConfig
    from .tokenizer.source_format import format_source
    from .tokenizer.tokenization_mambaformer import MambaFormerTokenizer
    from .trainer.arguments import MambaFormerTrainingArguments
    from .trainer.trainer import MambaFormerTrainer

__version__ = "0.1.0"

__all__ = [
    "MambaFormerConfig",
    "MambaFormerForConditionalGeneration",
    "MambaFormerQuantizationConfig",
    "MambaFormerTokenizer",
    "MambaFormerTrainer",
    "MambaFormerTrainingArguments",
    "embedded_checkpoint",
    "format_source",
]

_HOME = {
    "MambaFormerConfig": ".configuration.configuration_mambaformer",
    "MambaFormerForConditionalGeneration": ".modeling_mambaformer.modeling_mambaformer",
    "MambaFormerQuantizationConfig": ".modeling_mambaformer.quantizer_mambaformer",
    "MambaFormerTokenizer": ".tokenizer.tokenization_mambaformer",
    "MambaFormerTrainer": ".trainer.trainer",
    "MambaFormerTrainingArguments": ".trainer.arguments",
    "format_source": ".tokenizer.source_format",
}


def embedded_checkpoint() -> Path:
    """
    Return the folder of the embedded default: a small MambaFormer with its tokenizer, for offline use.

    Raises:
        FileNotFoundError: where this installation does not carry it.
    """
    folder = Path(__file__).resolve().parent / "embedded"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no embedded checkpoint in {str(folder)!r}: install mambaformer from its repository or from a "
            "wheel that carries it, or give a model of your own, by folder or Hub id."
        )
    return folder


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "MambaFormerConfig":  # an AutoModel made from it needs the model's class
            importlib.import_module(MODELING)
        value = getattr(importlib.import_module(_HOME[name], __name__), name)
    except ModuleNotFoundError as error:
        if not _HOME[name].startswith(".trainer") or (error.name or "").split(".")[0] == __name__:
            raise
        raise ImportError(
            f'{name} needs the package {error.name!r}, which is not installed: pip install "mambaformer[train]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
