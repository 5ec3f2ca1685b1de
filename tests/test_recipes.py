# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The recipes for GPUs, as far as they can be tried without one: they parse, and FSDP's units are the right layers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser
from transformers.models.mamba.modeling_mamba import MambaBlock
from transformers.models.t5.modeling_t5 import T5Block

from mambaformer.trainer.adapters import load_trainable, prepare_stage, save_trainable
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.distillation import ask_both
from mambaformer.trainer.run import main
from mambaformer.trainer.run_arguments import RunArguments
from mambaformer.trainer.run_parsing import parse

RECIPES = ("flan_t5_base_mamba_130m", "flan_t5_large_mamba_370m_gpu")


@pytest.fixture
def fsdp_environment(repo_root, monkeypatch):
    """What `accelerate launch --config_file` would hand to its processes, but for the GPUs."""
    file = str(repo_root / "trainer" / "configs" / "accelerate_fsdp.yaml")
    config = load_config_from_file(file)
    assert config.distributed_type == "FSDP" and config.mixed_precision == "bf16" and config.num_processes == 2
    words = ["--config_file", file, "--main_process_port", "0", "trainer/run.py"]
    launched, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert launched.use_fsdp and launched.fsdp_version == 2 and launched.mixed_precision == "bf16"
    for name, value in prepare_multi_gpu_env(launched).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", RECIPES)
def test_gpu_recipes_agree_with_the_paper_and_with_each_other(repo_root, tmp_path, name):
    parser = HfArgumentParser([RunArguments, MambaFormerTrainingArguments])
    path = repo_root / "trainer" / "configs" / f"{name}.yaml"
    here = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true", "--report_to", "none"]
    run, stages = parse([str(path), *here, "--stages", "adapt", "distil", "joint"], parser)
    assert "bf16: true" in path.read_text(encoding="utf-8")
    for stage in stages.values():
        assert stage.per_device_train_batch_size * stage.gradient_accumulation_steps == 32
        assert stage.expert_budget == 0.038 and not stage.fp16
    for stage in ("adapt", "joint"):
        assert stages[stage].gradient_checkpointing
        assert stages[stage].gradient_checkpointing_kwargs == {"use_reentrant": False}
        assert stages[stage].emamba_lora_rank == stages[stage].et5_lora_rank == 16
        assert stages[stage].train_embeddings == ["emamba"]
    assert not stages["distil"].gradient_checkpointing  # EMamba is run there without gradients
    size = name.split("_")[2]
    assert run.et5 == f"google/flan-t5-{size}" and run.emamba.startswith("state-spaces/mamba-")


def test_fsdp_trains_one_stage_at_a_time(monkeypatch, repo_root, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    path = str(repo_root / "trainer" / "configs" / "smoke.yaml")
    here = ["--output_dir", str(tmp_path), "--model_name_or_path", "m", "--bf16", "false"]
    assert main([path, *here]) == 2
    assert "--stages adapt" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_fsdp_shards_the_experts_layers_and_keeps_their_gradients(fsdp_environment, model, batch, tmp_path):
    """On one process without a GPU: the units accelerate would make, the same gradients, and adapters taken up."""
    args = MambaFormerTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, stage="adapt", train_embeddings=["emamba"], report_to="none"
    )
    prepare_stage(model, args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    labels = torch.randint(2, 90, (4, 6))
    whole = copy.deepcopy(model)
    policy = fsdp2_prepare_auto_wrap_policy(FullyShardedDataParallelPlugin(), model)
    units = [module for module in model.modules() if policy(module)]
    assert {type(module) for module in units} == {T5Block, MambaBlock}
    layers = model.config.et5.num_layers + model.config.et5.num_decoder_layers
    assert len(units) == layers + model.config.emamba.num_hidden_layers
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in [*units, model]:
            fully_shard(module, mesh=mesh)
        for trained in (model, whole):
            output = ask_both(trained.train(), {**batch, "labels": labels})
            (output.et5_logits.logsumexp(-1).mean() + output.emamba_logits.logsumexp(-1).mean()).backward()
        found = 0
        for (name, sharded), (_, plain) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert isinstance(sharded, DTensor), name
            if plain.grad is not None:
                torch.testing.assert_close(sharded.grad.full_tensor(), plain.grad, rtol=1e-4, atol=1e-6, msg=name)
                found += 1
        assert found == sum(parameter.requires_grad for parameter in whole.parameters())
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.add_(1)
        load_trainable(model, save_trainable(whole, tmp_path / "saved").parent)
        for (name, sharded), (_, plain) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            if plain.requires_grad:
                assert torch.equal(sharded.full_tensor(), plain), name
    finally:
        dist.destroy_process_group()
