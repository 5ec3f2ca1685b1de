# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Shared fixtures: tiny random experts on disk, a composed model, and the optional shared data."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # sums that do not depend on where a tensor lies in memory

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from instruction_sets import VARIABLE, instruction_sets
from tiny_experts import save_tiny_emamba, save_tiny_et5

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets and tokenizers kept beside the repository; tests that need them are skipped where absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"shared data is absent: {folder.name} beside the repository")
    return folder


@pytest.fixture(params=instruction_sets())
def instructions(request, monkeypatch) -> None:
    """Compiled code with each set of instructions that this processor has."""
    monkeypatch.setenv(VARIABLE, request.param)


@pytest.fixture(scope="session")
def et5_folder(tmp_path_factory) -> Path:
    """A tiny random flan-style T5 checkpoint."""
    return save_tiny_et5(tmp_path_factory.mktemp("experts") / "et5", "v1.1")


@pytest.fixture(scope="session")
def emamba_folder(tmp_path_factory) -> Path:
    """A tiny random Mamba checkpoint of the same vocabulary."""
    return save_tiny_emamba(tmp_path_factory.mktemp("experts") / "emamba")


@pytest.fixture
def model(et5_folder, emamba_folder):
    """A composed model whose router is random but decided: its margins spread around zero."""
    from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    torch.manual_seed(3)
    model = MambaFormerForConditionalGeneration.from_experts_pretrained(str(et5_folder), str(emamba_folder))
    with torch.no_grad():
        model.router.score.weight.mul_(8)
        model.router.domain_weight.normal_()
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four right-padded sources of different lengths."""
    from tiny_experts import random_batch

    return random_batch([7, 3, 11, 5], seed=1)
