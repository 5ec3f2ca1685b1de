# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A run that was stopped and taken up again gives the same losses as one that was not."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from mambaformer.trainer.adapters import TRAINABLE_FILE, load_trainable
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import tokenize_qa
from mambaformer.trainer.trainer import MambaFormerTrainer

TOKENIZER = tiny_tokenizer()


def make_trainer(et5_folder, emamba_folder, folder, **fields) -> MambaFormerTrainer:
    """A trainer over a freshly composed model, always the same one."""
    torch.manual_seed(3)
    model = MambaFormerForConditionalGeneration.from_experts_pretrained(str(et5_folder), str(emamba_folder))
    args = MambaFormerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_steps=6,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **fields,
    )
    rows = tokenize_qa(Dataset.from_list(tiny_rows(16)), TOKENIZER, 48, 16)
    return MambaFormerTrainer(model=model, args=args, train_dataset=rows, processing_class=TOKENIZER)


@pytest.mark.parametrize("stage", ["adapt", "distil", "joint"])
def test_resumed_equals_uninterrupted(et5_folder, emamba_folder, tmp_path, stage):
    whole = make_trainer(et5_folder, emamba_folder, tmp_path, stage=stage, lora_dropout=0.1)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / TRAINABLE_FILE).stat().st_size < 200_000
    resumed = make_trainer(et5_folder, emamba_folder, tmp_path / "again", stage=stage, lora_dropout=0.1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("loss", "grad_norm", *(("lambda", "tau") if stage != "adapt" else ())):
        first, second = (
            [entry[name] for entry in trainer.state.log_history if name in entry] for trainer in (whole, resumed)
        )
        assert len(first) == 6 and second == pytest.approx(first, rel=1e-5), name
    assert resumed.routing == whole.routing
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)


def test_a_checkpoint_of_other_adapters_is_refused(et5_folder, emamba_folder, tmp_path):
    whole = make_trainer(et5_folder, emamba_folder, tmp_path, stage="adapt")
    whole.save_model(str(tmp_path / "saved"), _internal_call=True)
    other = make_trainer(et5_folder, emamba_folder, tmp_path, stage="adapt", et5_lora_rank=4)
    with pytest.raises(ValueError, match="resume with the stage, ranks"):
        load_trainable(other.model, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_trainable(other.model, tmp_path / "nowhere")
