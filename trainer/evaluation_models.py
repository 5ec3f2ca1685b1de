# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The models of an evaluation: the MambaFormer, and a plain T5 beside it; checked before any work is done."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from ..configuration.configuration_mambaformer import MambaFormerConfig
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from ..tokenizer.tokenization_mambaformer import MambaFormerTokenizer


def load_model(source: str) -> tuple[MambaFormerForConditionalGeneration, MambaFormerTokenizer]:
    """
    A trained model in float32, and its tokenizer.

    Raises:
        ValueError, OSError: naming what is missing or is no MambaFormer.
    """
    kind = checkpoint_kind("--model", source)
    if kind != MambaFormerConfig.model_type:
        raise ValueError(f"--model {source!r} is a {kind!r} checkpoint, not a MambaFormer: compose and train one.")
    model = MambaFormerForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    return model, MambaFormerTokenizer.from_pretrained(source)


def load_plain(source: str, tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """
    A plain T5 in float32, which is to answer the very token ids that the MambaFormer answers.

    Args:
        tokenizer: the MambaFormer's.

    Raises:
        ValueError, OSError: naming what is missing, is no T5, or has another vocabulary.
    """
    kind = checkpoint_kind("--plain", source)
    if kind != "t5":
        raise ValueError(f"--plain {source!r} is a {kind!r} checkpoint: give a T5, such as trainer.pretrain saves.")
    own = MambaFormerTokenizer.from_pretrained(source)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--plain {source!r} has a vocabulary of its own ({len(own)} pieces, the model has {len(tokenizer)}): "
            "train it on the same tokenizer, or neither sources nor scores compare."
        )
    return T5ForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()


def checkpoint_kind(option: str, source: str) -> str | None:
    """
    The `model_type` of a folder or Hub id that the command-line `option` names.

    Raises:
        ValueError, OSError: where there is no such checkpoint.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{option} {source!r} holds no config.json: give the folder of a saved model.")
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/"))):
        raise ValueError(f"{option} {source!r} does not exist: check the path, or give a Hub id such as owner/name.")
    return MambaFormerConfig.get_config_dict(source)[0].get("model_type")


def checkpoint_name(source: str) -> str:
    """A folder's last part, since results name no folders of a machine, or the Hub id."""
    return Path(source).name if Path(source).is_dir() else source


def weights_digest(source: str) -> str | None:
    """SHA-256 over a folder's safetensors files in the order of their names; `None` for a Hub id."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None
