# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Runs that are killed again and again, also while they write, end where an undisturbed run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import SIZES, losses, rows
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.trainer.checkpoints import last_whole_checkpoint

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Starter:
    """Runs commands through `stop_at.py`, each in a process of its own, and says how they ended."""

    def __init__(self, log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "stop_at.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, command: list[str], **how: str) -> int:
        """The exit code of a command."""
        self.process.stdin.write(json.dumps({"command": command, "log": str(self.log), **how}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self, command: list[str]) -> str:
        """Run a command to its end; what it said."""
        code = self.run(command)
        said = self.log.read_text(encoding="utf-8")
        assert code == 0, said[-3000:]
        return said

    def kill(self, command: list[str], **how: str) -> str:
        """Run a command that is killed -9 as `how` says; what it said till then."""
        code = self.run(command, **how)
        said = self.log.read_text(encoding="utf-8")
        assert code == -signal.SIGKILL, f"{how} never came to be: {said[-3000:]}"
        return said


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """Forks trainings."""
    made = Starter(tmp_path_factory.mktemp("killed") / "said.txt")
    yield made
    made.process.stdin.close()
    made.process.wait()


def same_tensors(first: Path, second: Path) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def without_times(figures: dict) -> dict:
    """Figures but for those of time, and those that transformers takes over the part since the last start."""
    return {name: value for name, value in figures.items() if not name.startswith("train_") and name != "total_flos"}


def test_a_run_killed_seven_times(starter, repo_root, et5_folder, emamba_folder, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "qa.jsonl", tiny_rows(40))
    command = [str(repo_root / "trainer" / "run.py"), str(repo_root / "trainer" / "configs" / "smoke.yaml")]
    command += ["--et5", str(et5_folder), "--emamba", str(emamba_folder), "--dataset", str(tmp_path / "qa.jsonl")]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--cost_table", "keep", "--save_strategy", "steps"]
    command += ["--save_steps", "3", "--save_total_limit", "1", "--seed", "5", "--adapt.lora_dropout", "0.1"]
    command += ["--adapt.max_steps", "24", "--distil.max_steps", "6", "--report_to", "none"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    starter.finish([*command, "--output_dir", str(whole)])

    command += ["--output_dir", str(parts), "--resume", "true"]
    starter.kill(command, once=str(parts / "adapt" / "checkpoint-3" / "trainer_state.json"))
    starter.kill(command, half="adapt/checkpoint-18/trainable.safetensors")
    said = starter.kill(command, half="adapt/checkpoint-21/optimizer.pt")
    assert "checkpoint-18 is not whole" in said and (parts / "adapt" / "broken-checkpoint-18").is_dir()
    said = starter.kill(command, half="adapt/checkpoint-24/trainer_state.json")
    assert "checkpoint-21 is not whole" in said
    said = starter.kill(command, half="adapt/finished.partial/trainable.safetensors")
    assert "checkpoint-24 is not whole" in said
    starter.kill(command, half="distil/checkpoint-3/trainer_state.json")
    starter.kill(command, half="model.partial/model.safetensors")
    assert not (parts / "model").exists()
    starter.finish(command)

    same_tensors(parts / "model" / "model.safetensors", whole / "model" / "model.safetensors")
    for name in ("adapt", "distil"):
        last = [Path(last_whole_checkpoint(folder / name)) for folder in (parts, whole)]
        assert last[0].name == last[1].name
        histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in last]
        first, second = ([(entry["step"], entry["loss"]) for entry in history] for history in histories)
        assert len(second) == (24 if name == "adapt" else 6) and first == second
    first, second = (json.loads((folder / "training_report.json").read_text()) for folder in (parts, whole))
    for name in ("calibration", "scores", "samples"):
        assert first[name] == second[name], name
    for name in ("adapt", "distil"):
        assert without_times(first["stages"][name]) == without_times(second["stages"][name])


def test_a_pretraining_killed_four_times(starter, tmp_path):
    dental = tmp_path / "dental"
    dental.mkdir()
    for split, chosen in (("train", rows()), ("validation", rows()[:12])):
        (dental / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    module = "mambaformer.trainer.pretrain"
    fields = {**SIZES, "dental_qa": dental, "expert": "emamba", "max_steps": 24, "save_minutes": 0.0, "probe_rows": 0}
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    starter.finish([module, *options, "--output_dir", str(whole), "--stage", "data"])
    parts.mkdir()
    (parts / "data").symlink_to(whole / "data")
    starter.finish([module, *options, "--output_dir", str(whole)])

    command = [module, *options, "--output_dir", str(parts)]
    starter.kill(command, once=str(parts / "emamba" / "checkpoints" / "checkpoint-2" / "trainer_state.json"))
    starter.kill(command, half="checkpoint-20/model.safetensors")
    said = starter.kill(command, half="checkpoint-22/optimizer.pt")
    assert "checkpoint-20 is not whole" in said
    log = parts / "emamba.jsonl"
    log.write_bytes(log.read_bytes()[:-7])  # as if the stop had cut the log's last line
    said = starter.kill(command, half="checkpoint-23/trainer_state.json")
    assert "checkpoint-22 is not whole" in said
    assert "checkpoint-23 is not whole" in starter.finish(command)
    same_tensors(parts / "emamba" / "model.safetensors", whole / "emamba" / "model.safetensors")
    complete = "\n".join(line for line in log.read_text().splitlines() if line.endswith("}"))
    log.write_text(complete, encoding="utf-8")
    first, second = losses(parts, "emamba"), losses(whole, "emamba")
    assert second.keys() == set(range(1, 25)) and all(second[step] == value for step, value in first.items())
