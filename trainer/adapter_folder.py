# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Save a trained model as adapters and router on named bases: `modeling_mambaformer/adapter_checkpoint.py` describes the
folder and loads it.

Collecting compares the model with its bases, weight by weight: what may differ is kept in full (rebuilt embeddings and
heads), anything else that differs is an error, since adapters mean nothing on other weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, TaskType, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_mambaformer.adapter_bases import base_sample, load_base
from ..modeling_mambaformer.adapter_checkpoint import (
    ADAPTED_FILE,
    ADAPTER_FOLDERS,
    PEFT_PREFIX,
    SAMPLE,
    WHOLE_WEIGHTS,
)
from ..modeling_mambaformer.composition import portable_name
from .adapters import adapted_layers

TASKS = {"et5": TaskType.SEQ_2_SEQ_LM, "emamba": TaskType.CAUSAL_LM}


@dataclass
class CollectedAdapters:
    """Each expert's adapter by expert, rebuilt embeddings and samples by name, and the bases' names and revisions."""

    configs: dict[str, PeftConfig] = field(default_factory=dict)
    adapters: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bases: dict[str, str | None] = field(default_factory=dict)


def collect_adapters(model: PreTrainedModel, et5: str | None = None, emamba: str | None = None) -> CollectedAdapters:
    """
    Copy what `model` adds to its bases, whose weights are read again, one expert at a time.

    Args:
        model: with its adapters in place, not merged; an expert without an adapter must be its base.
        et5, emamba: folders or Hub ids of the bases; default those that the model was composed of, else those that
            its configuration names.

    Raises:
        OSError: for a base that cannot be found.
        ValueError: for weights that are neither adapted, rebuilt embeddings, nor the base's.
    """
    named = copy.deepcopy(model.config)
    known = getattr(model, "expert_sources", {})
    found = CollectedAdapters()
    for expert, given in (("et5", et5), ("emamba", emamba)):
        part = getattr(model, expert)
        source = given or known.get(expert) or getattr(named, f"{expert}_name_or_path")
        setattr(named, f"{expert}_name_or_path", source)
        base = load_base(named, expert, part.dtype)
        rebuilt = rebuilt_parameters(part, base, expert, source)
        found.tensors |= {f"{expert}.{name}": tensor for name, tensor in rebuilt.items()}
        found.tensors[SAMPLE + expert] = base_sample(base, rebuilt)
        found.bases[f"{expert}_name_or_path"] = name = portable_name(source)
        found.bases[f"{expert}_revision"] = revision = (
            getattr(named, f"{expert}_revision") or base.config._commit_hash if name == source else None
        )
        if adapted_layers(part):
            config = copy.deepcopy(part.peft_config["default"])
            config.base_model_name_or_path, config.revision = name, revision
            config.task_type, config.inference_mode = TASKS[expert], True
            found.configs[expert] = config
            state = get_peft_model_state_dict(part, save_embedding_layers=False)
            found.adapters[expert] = {PEFT_PREFIX + key: copied(tensor) for key, tensor in state.items()}
    return found


def rebuilt_parameters(part: nn.Module, base: nn.Module, expert: str, source: str) -> dict[str, torch.Tensor]:
    """
    Copies of the embeddings and heads of `part` that are not those of `base`.

    Raises:
        ValueError: where another weight differs from the base's.
    """
    rows = [part.get_input_embeddings(), part.get_output_embeddings()]
    may_differ = {id(parameter) for module in rows if module is not None for parameter in module.parameters()}
    plain, rebuilt, wrong = dict(base.named_parameters()), {}, []
    for name, parameter in part.named_parameters():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        same = plain.get(name)
        if same is not None and same.shape == parameter.shape and torch.equal(same.to(parameter.device), parameter):
            continue
        if id(parameter) in may_differ and same is not None:
            rebuilt[name] = copied(parameter)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {expert} are not those of its base {source!r}, the first is {wrong[0]!r}: "
            f"adapters can only be saved on the base that they were trained on. Name it with {expert}=…, or save the "
            "merged model."
        )
    return rebuilt


def write_adapters(
    model: PreTrainedModel,
    collected: CollectedAdapters,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """
    Write `collected`, with router, gate and configuration as `model` has them now, into `folder`.

    Raises:
        ValueError: for a folder that holds whole weights, which would be loaded instead.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in WHOLE_WEIGHTS):
        raise ValueError(f"{str(folder)!r} holds the weights of a whole model: name another folder for the adapters.")
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    for name, value in collected.bases.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for expert, adapter in collected.adapters.items():
        inside = folder / ADAPTER_FOLDERS[expert]
        collected.configs[expert].save_pretrained(str(inside))
        save_file(adapter, inside / "adapter_model.safetensors", {"format": "pt"})
    routing = {
        f"{name}.{key}": copied(tensor)
        for name in ("router", "gate")
        for key, tensor in getattr(model, name).state_dict().items()
    }
    save_file({**collected.tensors, **routing}, folder / ADAPTED_FILE, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def save_adapters(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    et5: str | None = None,
    emamba: str | None = None,
) -> Path:
    """
    Save adapters, router, gate, rebuilt embeddings and, where it is given, the tokenizer, without the bases' weights.

    See `collect_adapters` for `et5`, `emamba` and the errors. A base that is a folder is named by its last part only:
    whoever loads the adapters says where it lies.

    Example::

        save_adapters(model, "adapters/", tokenizer)
        model = MambaFormerForConditionalGeneration.from_pretrained("adapters/")
    """
    return write_adapters(model, collect_adapters(model, et5, emamba), folder, tokenizer)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in main memory, that shares with nothing."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
