# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
PEFT's LoRA on each expert, inside the expert: `model.et5` and `model.emamba` stay transformers' own classes.

Router, gate and rebuilt embeddings are trained in full, beside the adapters. `merge_adapters` folds the adapters into
plain weights; `save_trainable` writes only what was trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..modeling_mambaformer.adapter_checkpoint import merge_expert
from ..modeling_mambaformer.quantized_modules import refuse_training
from .arguments import EXPERTS, MambaFormerTrainingArguments

ET5_TARGETS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
EMAMBA_TARGETS = ("in_proj", "x_proj")
REFUSED = {
    "dt_proj": "its weight is read without calling the layer, so an adapter there would never act",
    "conv1d": "the fused kernels read its weight without calling the layer",
    "out_proj": "the fused kernels read its weight without calling the layer",
}
TRAINABLE_FILE = "trainable.safetensors"


def lora_config(expert: str, args: MambaFormerTrainingArguments) -> LoraConfig | None:
    """
    The `LoraConfig` of an expert, `None` where its rank is 0.

    Raises:
        ValueError: for a target that this expert does not have, or in which an adapter has no effect.
    """
    rank, alpha = getattr(args, f"{expert}_lora_rank"), getattr(args, f"{expert}_lora_alpha")
    targets = list(getattr(args, f"{expert}_lora_targets"))
    if rank == 0:
        return None
    known = ET5_TARGETS if expert == "et5" else EMAMBA_TARGETS
    for name in targets:
        if expert == "emamba" and name in REFUSED:
            raise ValueError(f"{expert}_lora_targets names {name!r}: {REFUSED[name]}. Choose from {list(known)}.")
        if name not in known:
            raise ValueError(f"{expert}_lora_targets names {name!r}: choose from {list(known)}.")
    if not targets:
        raise ValueError(f"{expert}_lora_targets is empty: choose from {list(known)}, or set {expert}_lora_rank to 0.")
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=targets, bias="none")


def add_adapters(model: nn.Module, args: MambaFormerTrainingArguments) -> dict[str, int]:
    """
    Put fresh adapters into both experts; an expert that has some keeps them.

    Returns:
        how many layers of each expert carry an adapter.

    Raises:
        ValueError: for a target that matches no layer of the expert.
    """
    count = {}
    for expert in EXPERTS:
        config = lora_config(expert, args)
        part = getattr(model, expert)
        if config is not None and not adapted_layers(part):
            present = {
                name.rsplit(".", 1)[-1] for name, module in part.named_modules() if isinstance(module, nn.Linear)
            }
            wanted = expand_targets(config.target_modules, present)
            missing = [name for name in wanted if name not in present]
            if missing:
                raise ValueError(
                    f"{expert}_lora_targets {missing} match no layer of {type(part).__name__}, which has "
                    f"{sorted(present)}."
                )
            config.target_modules = set(wanted)
            inject_adapter_in_model(config, part)
        count[expert] = len(adapted_layers(part))
    return count


def expand_targets(targets: list[str] | set[str], present: set[str]) -> list[str]:
    """`wi` stands for the gated pair where the checkpoint has one."""
    gated = {"wi_0", "wi_1"} <= present
    return sorted({full for name in targets for full in (("wi_0", "wi_1") if name == "wi" and gated else (name,))})


def adapted_layers(part: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """Names and layers inside `part` that carry an adapter."""
    return [(name, module) for name, module in part.named_modules() if isinstance(module, BaseTunerLayer)]


def prepare_stage(model: nn.Module, args: MambaFormerTrainingArguments) -> None:
    """
    Freeze what the stage does not train, and add adapters where it trains the experts.

    adapt: adapters and chosen embeddings. distil: router and gate. joint: all of these.

    Raises:
        ValueError: where an expert's weights are rounded, or nothing is left to train.
    """
    refuse_training(model)
    experts, routing = args.stage != "distil", args.stage != "adapt"
    if experts:
        add_adapters(model, args)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(experts and "lora_" in name)
    for part in (model.et5, model.emamba):  # adapters kept from an earlier stage are plain weights to the router
        for _, layer in adapted_layers(part):
            for dropout in layer.lora_dropout.values():
                dropout.p = args.lora_dropout if experts else 0.0
    for part in (model.router, model.gate):
        part.requires_grad_(routing)
    if experts:
        for expert in args.train_embeddings:
            part = getattr(model, expert)
            part.get_input_embeddings().weight.requires_grad_(True)
            part.get_output_embeddings().weight.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"Stage {args.stage!r} has nothing to train: give et5_lora_rank or emamba_lora_rank a rank above 0, or "
            "name experts in train_embeddings."
        )


def merge_adapters(model: nn.Module) -> int:
    """Fold every adapter into its layer's plain weight, in place; returns how many there were."""
    merged = sum(merge_expert(getattr(model, expert)) for expert in EXPERTS)
    model.requires_grad_(True)
    return merged


def trainable_tensors(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The trained tensors by name, tied ones once; from `state` where it is given."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = model.state_dict() if state is None else state
    return {name: state[name].detach().contiguous() for name in names}


def save_trainable(model: nn.Module, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the trained tensors alone (adapters, router, gate, rebuilt embeddings) as safetensors into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / TRAINABLE_FILE
    save_file(trainable_tensors(model, state), path)
    return path


def load_trainable(model: nn.Module, folder: str | Path) -> None:
    """
    Read what `save_trainable` wrote back into a model prepared for the same stage.

    Raises:
        FileNotFoundError: where `folder` has no such file.
        ValueError: where names or shapes differ, as after another rank or other targets.
    """
    path = Path(folder) / TRAINABLE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint of a run of this trainer.")
    saved, trained = load_file(path), trainable_tensors(model)
    wrong = sorted(set(saved) ^ set(trained)) + sorted(
        name for name in set(saved) & set(trained) if saved[name].shape != trained[name].shape
    )
    if wrong:
        raise ValueError(
            f"{path} holds {len(saved)} tensors, this stage trains {len(trained)}; {len(wrong)} do not match, the "
            f"first is {wrong[0]!r}: resume with the stage, ranks, targets and train_embeddings of the saved run."
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            own = parameters[name]
            if isinstance(own, DTensor):  # sharded by FSDP
                tensor = distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
            own.copy_(tensor)
