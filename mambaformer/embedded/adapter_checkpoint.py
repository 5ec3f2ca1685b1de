# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The small form of a saved model: adapters and router on named bases, without the bases' weights.

The folder holds `config.json`, which names both bases and their revisions, a folder of PEFT's own format for each
expert's adapter, and one safetensors file with router, gate, rebuilt embeddings and a sample of each base's weights.
Loading puts these on the bases and refuses bases of other weights. PEFT is imported here only when it is needed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .adapter_bases import AUTO_CLASSES, check_sample, load_base, replace_parameters
from .checkpoint_loading import check_finite, reading_weights
from .composition import assemble, portable_name

ADAPTED_FILE = "mambaformer_adapted.safetensors"
"""Router, gate and rebuilt embeddings under the model's names, and samples of the bases under `SAMPLE` + expert."""
ADAPTER_FOLDERS = {"et5": "et5_adapter", "emamba": "emamba_adapter"}
SAMPLE = "base_sample."
WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PEFT_PREFIX = "base_model.model."
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WITHOUT_EFFECT = ("adapter_kwargs", "code_revision", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")


def is_adapter_checkpoint(source: str | os.PathLike | None, **hub_options: Any) -> bool:
    """Whether `source`, a folder or a Hub id, holds adapters on named bases and no whole weights."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    options = {name: hub_options[name] for name in HUB_OPTIONS if hub_options.get(name) is not None}

    def holds(name: str) -> bool:
        return cached_file(source, name, **options, **quiet) is not None

    try:
        return source is not None and holds(ADAPTED_FILE) and not any(holds(name) for name in WHOLE_WEIGHTS)
    except (OSError, ValueError):  # no such place: whoever loads it says so
        return False


def load_adapter_checkpoint(
    cls: type[PreTrainedModel],
    source: str | os.PathLike,
    et5: str | os.PathLike | None = None,
    emamba: str | os.PathLike | None = None,
    *,
    merge: bool = True,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """
    Put the adapters, router and rebuilt embeddings of `source` on their bases; one copy of the weights in memory.

    Args:
        cls: the model class to make.
        source: a folder or a Hub id of this form.
        et5, emamba: the bases, where they lie elsewhere than `config.json` says; the same as the configuration's
            fields `et5_name_or_path` and `emamba_name_or_path`, which may be given too, as may their revisions.
        merge: fold the adapters into plain weights. Otherwise PEFT's layers stay, as training needs them.
        config, dtype, device_map, output_loading_info: as transformers' `from_pretrained` takes them; `device_map`
            names one device.
        kwargs: options of the Hub, and fields of the configuration to override.

    Returns:
        the model, in evaluation mode; with `output_loading_info` also a report, in which nothing is missing.

    Raises:
        ImportError: where PEFT is not installed.
        OSError: for a file or a base that cannot be found or read.
        ValueError: for a base that is not the one the adapters were trained on, files that do not belong together, or
            an option that this form does not take.
    """
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    dtype = kwargs.pop("torch_dtype", dtype)
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **hub, **kwargs)
    config = copy.deepcopy(config)
    for name in [name for name in kwargs if hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    for name, value in kwargs.items():
        if value is not None and not name.startswith("_") and name not in WITHOUT_EFFECT:
            raise ValueError(
                f"{name}={value!r} is not taken for adapters on named bases: write the whole model first, with "
                "`mambaformer merge`, and load that."
            )
    if et5 is not None:
        config.et5_name_or_path = os.fspath(et5)
    if emamba is not None:
        config.emamba_name_or_path = os.fspath(emamba)
    dtype = config.dtype if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32

    path = cached_file(source, ADAPTED_FILE, **hub)
    with reading_weights(source):
        saved = load_file(path)
    sources, parts = {}, {}
    for expert in AUTO_CLASSES:
        sources[expert] = getattr(config, f"{expert}_name_or_path")
        part = load_base(config, expert, dtype)
        rebuilt = take(saved, f"{expert}.")
        check_sample(part, rebuilt, saved[SAMPLE + expert], expert, sources[expert])
        replace_parameters(part, {name: tensor.to(dtype) for name, tensor in rebuilt.items()})
        part.config.vocab_size = config.vocab_size
        folder = adapter_folder(source, expert, hub)
        if folder is not None:
            add_saved_adapter(part, folder, expert)
            if merge:
                merge_expert(part)
        parts[expert] = part
    for expert, part in parts.items():
        part.config._name_or_path = portable_name(sources[expert])
        setattr(config, expert, part.config)
        setattr(config, f"{expert}_name_or_path", portable_name(sources[expert]))
    config.dtype = dtype
    model = assemble(cls, config, parts["et5"], parts["emamba"], dtype)
    model.expert_sources = sources
    for name in ("router", "gate"):
        with reading_weights(source):
            getattr(model, name).load_state_dict(take(saved, f"{name}."))
    if cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    check_finite(model, source)
    model.name_or_path = str(source)
    if device_map is not None:
        model.to(one_device(device_map))
    if not output_loading_info:
        return model
    return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def adapter_folder(source: str | os.PathLike, expert: str, hub: dict[str, Any]) -> Path | None:
    """The local folder of an expert's adapter, `None` where `source` has none."""
    inside = os.path.join(hub.get("subfolder") or "", ADAPTER_FOLDERS[expert])
    options = {**hub, "subfolder": inside}
    config = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **options)
    if config is None:
        return None
    return Path(cached_file(source, "adapter_model.safetensors", **options)).parent


def add_saved_adapter(part: PreTrainedModel, folder: Path, expert: str) -> None:
    """
    Put the adapter in `folder`, in PEFT's format, into `part`.

    Raises:
        ImportError: where PEFT is not installed.
        ValueError: where the adapter's tensors are not those that its configuration asks for.
    """
    try:
        from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(
            "A model saved as adapters on named bases needs the package 'peft' to load, which is not installed: "
            "pip install peft, or write the whole model where it is installed, with `mambaformer merge`."
        ) from error
    with reading_weights(folder):
        saved = load_file(folder / "adapter_model.safetensors")
    saved = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), part)
    expected = get_peft_model_state_dict(part, save_embedding_layers=False)
    wrong = sorted(set(saved) ^ set(expected)) + sorted(
        name for name in set(saved) & set(expected) if saved[name].shape != expected[name].shape
    )
    if wrong:
        raise ValueError(
            f"The adapter of {expert} in {str(folder)!r} does not fit its adapter_config.json: {len(wrong)} tensors, "
            f"the first {wrong[0]!r}. Fetch or save the adapters again."
        )
    set_peft_model_state_dict(part, saved)


def merge_expert(part: nn.Module) -> int:
    """Fold every adapter inside `part` into its layer's plain weight, in place; returns how many there were."""
    adapted = [
        (name, layer)
        for name, layer in part.named_modules()
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer")
    ]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(part, "peft_config"):
        del part.peft_config
    part.requires_grad_(True)
    return len(adapted)


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def one_device(device_map: Any) -> Any:
    """The device that `device_map` names for everything; `ValueError` where it splits the model."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        return device_map[""]
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"device_map is {device_map!r}: name one device for adapters on named bases, or write the whole model "
            "first, with `mambaformer merge`."
        )
    return device_map
