# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The trainer's stages on tiny experts: what moves, what stays, and that steps do not depend on how they are cut."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.distillation import UTILITY_COLUMNS, add_utilities
from mambaformer.trainer.trainer import MambaFormerTrainer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """32 tokenised rows of different lengths."""
    return tokenize_qa(Dataset.from_list(tiny_rows()), TOKENIZER, 48, 16)


@pytest.fixture
def model(model):
    """The shared tiny model, with an embedding for the end of a text too: the gate reads EMamba's state there."""
    with torch.no_grad():
        model.emamba.get_input_embeddings().weight[TOKENIZER.eos_token_id].normal_(std=0.2)
    return model


def arguments(folder, stage: str, **fields) -> MambaFormerTrainingArguments:
    """Short, on the CPU, each step logged."""
    fields = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "et5_lora_targets": ["q", "k", "v", "o", "wi", "wo"],
        **fields,
    }
    return MambaFormerTrainingArguments(
        output_dir=str(folder), stage=stage, use_cpu=True, disable_tqdm=True, report_to="none", **fields
    )


def trainer_of(model, folder, stage: str, rows: Dataset, **fields) -> MambaFormerTrainer:
    """A trainer of one stage."""
    return MambaFormerTrainer(
        model=model, args=arguments(folder, stage, **fields), train_dataset=rows, processing_class=TOKENIZER
    )


def copied(model) -> dict[str, torch.Tensor]:
    """All parameters by name, cloned."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are no longer what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def logged(trainer: MambaFormerTrainer, name: str) -> list[float]:
    """A figure's course."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_adapt_moves_every_adapter_and_nothing_else(model, rows, tmp_path):
    trainer = trainer_of(model, tmp_path, "adapt", rows)
    before = copied(model)
    trainer.train()
    changed = moved(model, before)
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 2 * (2 * 4 + 3 * 8 + 2 * 3 + 3 * 3 + 2 * 2)
    assert changed == adapters
    assert all(torch.isfinite(torch.tensor(logged(trainer, name))).all() for name in ("loss_expert", "nll_et5"))
    together = [a + b for a, b in zip(logged(trainer, "nll_et5"), logged(trainer, "nll_emamba"), strict=True)]
    assert logged(trainer, "loss_expert") == pytest.approx(together, rel=1e-5)


def test_joint_moves_adapters_router_and_gate(model, rows, tmp_path):
    trainer = trainer_of(model, tmp_path, "joint", rows, max_steps=3, w_cost=0.1, w_burst=0.1)
    before = copied(model)
    trainer.train()
    changed = moved(model, before)
    expected = {name for name in before if "lora_" in name or name.startswith(("router.", "gate."))}
    assert changed == expected
    last = trainer.state.log_history[-2]
    for name in ("task", "expert", "util", "use", "cost", "burst", "z", "gate"):
        assert f"loss_{name}" in last, name
    for name in ("lambda", "tau", "share", "soft_share", "passes", "caught_up_tokens", "encoder_calls", "oracle_gap"):
        assert name in last, name
    prices = logged(trainer, "lambda")
    assert prices[0] > 0 and len(set(prices)) == 3  # dual ascent is at work


def test_merged_model_equals_the_adapted_one(model, rows, tmp_path, batch):
    trainer = trainer_of(model, tmp_path, "adapt", rows, train_embeddings=["emamba"])
    trainer.train()
    model.eval()
    labels = torch.randint(3, 90, (4, 6))
    with torch.no_grad():
        adapted = model(**batch, labels=labels, routing="soft", output_experts=True, use_cache=False)
    trainer.save_model(str(tmp_path / "whole"))
    merged = type(model).from_pretrained(tmp_path / "whole").eval()
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    with torch.no_grad():
        plain = merged(**batch, labels=labels, routing="soft", output_experts=True, use_cache=False)
    for name in ("logits", "et5_logits", "emamba_logits", "margin"):
        torch.testing.assert_close(plain[name], adapted[name], rtol=1e-3, atol=1e-3)


def test_embeddings_train_in_full_when_named(model, rows, tmp_path):
    trainer = trainer_of(model, tmp_path, "adapt", rows, train_embeddings=["emamba"], max_steps=1)
    before = copied(model)
    trainer.train()
    assert "emamba.backbone.embeddings.weight" in moved(model, before)
    assert "et5.shared.weight" not in moved(model, before)


def test_distil_leaves_et5_alone_and_learns(model, rows, tmp_path):
    rows = add_utilities(model, rows, Collator(TOKENIZER), 8)
    trainer = trainer_of(model, tmp_path, "distil", rows, max_steps=30, per_device_train_batch_size=16, tau_final=0.5)
    calls = []
    handles = [
        part.register_forward_hook(lambda *_: calls.append(1)) for part in (model.et5.encoder, model.et5.decoder)
    ]
    before = copied(model)
    trainer.train()
    for handle in handles:
        handle.remove()
    assert not calls
    assert moved(model, before) == {name for name in before if name.startswith(("router.", "gate."))}
    util = logged(trainer, "loss_util")
    assert sum(util[-5:]) < 0.7 * sum(util[:5])


def test_utilities_are_the_experts_own_log_probabilities(model, rows, tmp_path):
    trainer = trainer_of(model, tmp_path, "distil", rows.select(range(6)))
    scored = trainer.train_dataset
    assert set(UTILITY_COLUMNS) <= set(scored.column_names)
    row = scored[4]
    source = torch.tensor([row["input_ids"]])
    for routing in ("et5", "emamba"):
        with torch.no_grad():
            logits = model(
                input_ids=source, labels=torch.tensor([row["labels"]]), routing=routing, use_cache=False
            ).logits
        log_p = logits.log_softmax(-1)[0].gather(-1, torch.tensor(row["labels"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row[f"log_p_{routing}"]), log_p, rtol=1e-4, atol=1e-4)
        assert row[f"top_{routing}"] == logits.argmax(-1)[0].tolist()


@pytest.mark.parametrize("stage", ["adapt", "distil"])
def test_accumulation_equals_one_large_batch(et5_folder, emamba_folder, rows, tmp_path, stage):
    from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    results = []
    for size, micro_batches in ((8, 1), (2, 4)):
        torch.manual_seed(3)
        model = MambaFormerForConditionalGeneration.from_experts_pretrained(str(et5_folder), str(emamba_folder))
        trainer = trainer_of(
            model,
            tmp_path / f"{stage}{size}",
            stage,
            rows,
            max_steps=2,
            learning_rate=1e-3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=micro_batches,
            train_sampling_strategy="sequential",
            w_use=0.0,  # a product of two means over the batch
            w_gate=0.0,  # a mean over sequences, not tokens
            max_grad_norm=1e9,
        )
        trainer.routing.threshold = 1e9  # own choices of the first step, the same however it is cut
        trainer.adapt_routing = lambda: None
        trainer.train()
        results.append((logged(trainer, "loss"), logged(trainer, "grad_norm")))
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), rtol=2e-4, atol=1e-5)


def test_evaluation_logs_terms_and_generates(model, rows, tmp_path):
    trainer = MambaFormerTrainer(
        model=model,
        args=arguments(tmp_path, "distil", predict_with_generate=True, generation_max_length=6),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=TOKENIZER,
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 4
    assert {"eval_loss", "eval_loss_util"} <= set(trainer.state.log_history[-1]) | set(metrics)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"emamba_lora_targets": ["in_proj", "dt_proj"]}, "dt_proj"),
        ({"emamba_lora_targets": ["conv1d"]}, "conv1d"),
        ({"emamba_lora_targets": ["out_proj"]}, "out_proj"),
        ({"et5_lora_targets": ["query"]}, "query"),
        ({"et5_lora_targets": ["wi_7"]}, "wi_7"),
        ({"et5_lora_rank": 0, "emamba_lora_rank": 0}, "nothing to train"),
    ],
)
def test_useless_adapters_are_refused_by_name(model, rows, tmp_path, fields, named):
    with pytest.raises(ValueError, match=named):
        trainer_of(model, tmp_path, "adapt", rows, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"stage": "adopt"}, {"tau": 0.0}, {"expert_budget": 1.5}, {"price": "high"}, {"train_embeddings": ["t5"]}],
)
def test_impossible_arguments_name_their_value(tmp_path, fields):
    (value,) = fields.values()
    shown = value[0] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=str(shown)):
        arguments(tmp_path, **{"stage": "adapt", **fields})
