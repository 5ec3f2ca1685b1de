# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The bases under saved adapters: found by name, told from others by a sample of their weights, given new rows."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from .configuration_mambaformer import MambaFormerConfig
from .composition import load_expert

AUTO_CLASSES = {"emamba": AutoModelForCausalLM, "et5": AutoModelForSeq2SeqLM}
SAMPLED = 16
"""Values of each tensor in a sample."""


def load_base(config: MambaFormerConfig, expert: str, dtype: torch.dtype) -> PreTrainedModel:
    """
    The base that `config` names for `expert` (`et5`, `emamba`), with its own vocabulary.

    Raises:
        OSError: where it cannot be found.
        ValueError: where it is not a checkpoint of this expert's shapes.
    """
    base, revision = getattr(config, f"{expert}_name_or_path"), getattr(config, f"{expert}_revision")
    where = f"The base {base!r} of {expert}" + (f" at revision {revision!r}" if revision else "")
    remedy = f"give the folder or Hub id of the right one as {expert}_name_or_path=…"
    if base is None:
        raise ValueError(f"The configuration names no base of {expert}: {remedy}.")
    revision = None if os.path.isdir(base) else revision
    try:
        found = AutoConfig.from_pretrained(base, revision=revision)
    except OSError as error:
        raise OSError(
            f"{where} is neither a folder with a config.json nor a checkpoint that could be fetched from the Hub: "
            f"{remedy} ({error})."
        ) from error
    own = copy.deepcopy(getattr(config, expert))
    if found.model_type != own.model_type:
        raise ValueError(f"{where} has model_type {found.model_type!r}, not {own.model_type!r}: {remedy}.")
    own.vocab_size = found.vocab_size
    try:
        part = load_expert(AUTO_CLASSES[expert], base, revision, dtype, own)
    except ValueError as error:
        reason = "its weights have other shapes" if isinstance(error.__cause__, RuntimeError) else str(error)
        raise ValueError(f"{where} is not the one that the adapters were trained on, {reason}: {remedy}.") from error
    part.config._commit_hash = getattr(found, "_commit_hash", None)
    return part


def base_sample(part: nn.Module, without: dict[str, Any]) -> torch.Tensor:
    """`(tensors, SAMPLED)`: values at even distances of each of `part`'s parameters, by name, but for `without`."""
    rows = []
    for name, parameter in sorted(part.named_parameters()):
        if name not in without:
            at = torch.linspace(0, parameter.numel() - 1, SAMPLED, dtype=torch.float64).long()
            rows.append(parameter.detach().flatten()[at.to(parameter.device)].cpu())
    return torch.stack([row.to(rows[0].dtype) for row in rows])


def check_sample(part: nn.Module, rebuilt: dict[str, Any], saved: torch.Tensor, expert: str, base: str) -> None:
    """Raise `ValueError`, naming the first tensor that differs, where `part` is not the base that `saved` is of."""
    found = base_sample(part, rebuilt)
    names = sorted(name for name, _ in part.named_parameters() if name not in rebuilt)
    wrong = names
    if found.shape == saved.shape:
        precision = 2 * max(torch.finfo(found.dtype).eps, torch.finfo(saved.dtype).eps)
        near = torch.isclose(found.double(), saved.double(), rtol=precision, atol=1e-7).all(-1)  # (tensors,)
        wrong = [name for name, same in zip(names, near.tolist(), strict=True) if not same]
    if wrong:
        raise ValueError(
            f"The base {base!r} of {expert} is not the one that the adapters were trained on: {len(wrong)} of its "
            f"{len(names)} weights differ, the first is {wrong[0]!r}. Give the right one as {expert}_name_or_path=…, "
            f"its revision as {expert}_revision=…"
        )


def replace_parameters(part: nn.Module, new: dict[str, torch.Tensor]) -> None:
    """Put other tensors, of as many rows as they like, in place of parameters by name, wherever these are tied to."""
    for name, tensor in new.items():
        old, parameter = part.get_parameter(name), nn.Parameter(tensor)
        for module in part.modules():
            for leaf in [leaf for leaf, held in module.named_parameters(recurse=False) if held is old]:
                setattr(module, leaf, parameter)
                if isinstance(module, nn.Embedding):
                    module.num_embeddings, module.padding_idx = len(tensor), None
                elif isinstance(module, nn.Linear):
                    module.out_features = len(tensor)
