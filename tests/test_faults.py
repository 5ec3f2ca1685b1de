# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Broken checkpoints are told from whole ones; losses and gradients that are not finite stop training in time."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer_resume import TOKENIZER, make_trainer
from tiny_training import tiny_rows, write_jsonl

from mambaformer.trainer.adapters import TRAINABLE_FILE
from mambaformer.trainer.checkpoints import fault_of, last_whole_checkpoint, replaced, set_aside
from mambaformer.trainer.data import Collator, numbered, tokenize_qa
from mambaformer.trainer.finite import EXIT_CODE, NonFiniteLoss
from mambaformer.trainer.run import main


@pytest.fixture
def run_folder(et5_folder, emamba_folder, tmp_path) -> Path:
    """The folder of a small run with two checkpoints."""
    make_trainer(et5_folder, emamba_folder, tmp_path / "run", stage="joint").train()
    return tmp_path / "run"


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def test_each_missing_or_shortened_file_is_seen(run_folder):
    folder = run_folder / "checkpoint-6"
    files = sorted(path for path in folder.iterdir())
    assert {path.name for path in files} >= {TRAINABLE_FILE, "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert fault_of(folder) is None
    for path in files:
        content = path.read_bytes()
        cut(path)
        assert path.name in fault_of(folder), path
        path.unlink()
        if path.name != "routing_state.json":  # written before the optimizer's, which is asked for
            assert fault_of(folder) is not None, path
        path.write_bytes(content)
    assert fault_of(folder) is None
    renamed = folder.rename(folder.with_name("checkpoint-9"))
    assert "of step 6" in fault_of(renamed)


def test_the_last_whole_checkpoint_is_found_and_the_broken_one_named(run_folder, caplog):
    assert last_whole_checkpoint(run_folder) == str(run_folder / "checkpoint-6")
    cut(run_folder / "checkpoint-6" / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(run_folder) == str(run_folder / "checkpoint-3")
    assert str(run_folder / "checkpoint-6") in caplog.text and "optimizer.pt" in caplog.text
    assert sorted(path.name for path in run_folder.iterdir()) == ["broken-checkpoint-6", "checkpoint-3"]
    (run_folder / "checkpoint-3" / "scheduler.pt").unlink()
    assert last_whole_checkpoint(run_folder, resuming=False) == str(run_folder / "checkpoint-3")
    assert last_whole_checkpoint(run_folder) is None
    assert last_whole_checkpoint(run_folder / "absent") is None


def test_a_checkpoint_of_the_last_step_is_not_trained_on(run_folder, et5_folder, emamba_folder, tmp_path):
    again = make_trainer(et5_folder, emamba_folder, tmp_path / "again", stage="joint")
    assert not again.take_up_ended(str(run_folder / "checkpoint-3"))
    assert again.take_up_ended(str(run_folder / "checkpoint-6"))
    assert again.state.global_step == 6 and len([1 for entry in again.state.log_history if "loss" in entry]) == 6
    saved, parameters = load_file(run_folder / "checkpoint-6" / TRAINABLE_FILE), dict(again.model.named_parameters())
    assert saved and all(torch.equal(parameters[name], tensor) for name, tensor in saved.items())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with replaced(folder) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), replaced(folder) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    with replaced(folder) as partial:
        (partial / "b").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "b").is_file()
    assert not (folder / "a").exists()


def test_the_folder_of_an_earlier_run_is_set_aside(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "adapt").mkdir()
        (tmp_path / "adapt" / "a").write_text(text)
        set_aside(tmp_path / "adapt")
    assert [path.name for path in tmp_path.iterdir()] == ["adapt.earlier"]
    assert (tmp_path / "adapt.earlier" / "a").read_text() == "second"


def test_rows_keep_their_numbers():
    rows = numbered(Dataset.from_list(tiny_rows(12))).shuffle(seed=1).select(range(5))
    batch = Collator(TOKENIZER)(list(tokenize_qa(rows, TOKENIZER, 48, 16)))
    assert batch["row"].tolist() == rows["row"] != [0, 1, 2, 3, 4]
    plain = tokenize_qa(Dataset.from_list(tiny_rows(12)), TOKENIZER, 48, 16)
    assert plain["row"] == list(range(12))


@pytest.mark.parametrize("stage", ["adapt", "joint"])
def test_a_nan_loss_names_step_and_rows_and_spares_the_weights(et5_folder, emamba_folder, tmp_path, stage):
    """One row holds a word that the encoder reads as NaN."""
    trainer = make_trainer(et5_folder, emamba_folder, tmp_path, stage=stage, train_sampling_strategy="sequential")
    trainer.args.save_steps = trainer.state.save_steps = 1
    word = TOKENIZER.convert_tokens_to_ids("word10")
    trainer.model.et5.encoder.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == word).unsqueeze(-1), float("nan"))
    )
    with pytest.raises(NonFiniteLoss, match="loss is nan in optimizer step 3; rows of the batch: 8, 9, 10, 11 "):
        trainer.train()
    last = last_whole_checkpoint(tmp_path)
    assert Path(last).name == "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(Path(last) / TRAINABLE_FILE).values())


def test_an_infinite_gradient_names_all_rows_of_the_step(et5_folder, emamba_folder, tmp_path):
    trainer = make_trainer(
        et5_folder, emamba_folder, tmp_path, stage="adapt", train_sampling_strategy="sequential",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    seen = []
    parameter.register_hook(lambda g: g * float("inf") if seen.append(0) or len(seen) > 2 else g)
    with pytest.raises(NonFiniteLoss, match="gradients' norm is .* in optimizer step 2; .*: 8, 9, 10, 11, 12, 13, 14"):
        trainer.train()
    assert torch.isfinite(parameter).all(), name


def test_the_command_ends_with_its_own_code(repo_root, et5_folder, emamba_folder, tmp_path, capsys):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    command = [str(repo_root / "trainer" / "configs" / "smoke.yaml"), "--adapt.learning_rate", "1e30"]
    command += ["--et5", str(et5_folder), "--emamba", str(emamba_folder), "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--dataset", str(write_jsonl(tmp_path / "qa.jsonl", tiny_rows(20))), "--cost_table", "keep"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == EXIT_CODE
    said = capsys.readouterr().err
    assert "in optimizer step 2" in said and "rows of the batch" in said
    assert not (tmp_path / "out" / "model").exists()
