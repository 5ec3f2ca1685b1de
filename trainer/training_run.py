# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A whole training run: load or compose, train the stages one after another, calibrate, score, save."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..dental_qa.lexicon import load_lexicon
from ..modeling_mambaformer.adapter_checkpoint import is_adapter_checkpoint
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from ..tokenizer.domain_lexicon import domain_weights
from ..tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from .adapter_folder import CollectedAdapters, collect_adapters, write_adapters
from .adapters import load_trainable, merge_adapters, prepare_stage, save_trainable
from .arguments import MambaFormerTrainingArguments
from .calibration import batches, calibrate
from .costs import measure_costs
from .data import Collator, is_one_split, load_qa, tokenize_qa
from .metrics import BertScore, score_answers
from .run_arguments import RunArguments
from .trainer import MambaFormerTrainer

logger = logging.getLogger(__name__)
FINISHED = "finished"
"""Folder of a stage's trained tensors once it is done."""


@dataclass
class Loaded:
    """Model, shared tokenizer, and tokenised rows under `train`, `distil` and `validation`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Dataset]


def load(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments]) -> Loaded:
    """
    Load or compose the model and read the data.

    Raises:
        ValueError, OSError: naming what is missing, unreadable or does not fit.
    """
    first = next(iter(stages.values()))
    set_seed(first.seed)
    model, tokenizer = load_model(run)
    if run.save_form != "merged" and first.process_index == 0:
        collect_adapters(model)  # a base that is missing or another is told before training, not after
    return Loaded(model, tokenizer, load_rows(run, tokenizer, first.seed))


def train(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments], loaded: Loaded) -> dict:
    """
    Run all stages and write `model/` or `adapters/`, as `save_form` says, and `training_report.json` beside them.

    Returns:
        the report: `cost_table` in milliseconds, each stage's last figures under `stages`, `calibration`, `scores`,
        `samples` and `seconds`.
    """
    start = time.perf_counter()
    first = next(iter(stages.values()))
    folder = Path(first.output_dir).parent
    model, tokenizer, rows = loaded.model, loaded.tokenizer, loaded.rows
    model.to(first.device)
    collator = Collator(tokenizer)
    report: dict = {"rows": {name: len(split) for name, split in rows.items()}, "stages": {}}
    if run.cost_table == "measure":
        model.config.cost_table = shared(measure_costs(model, *typical_lengths(rows["validation"])))
    report["cost_table"] = model.config.cost_table
    adapting = [name for name in stages if name != "distil"]
    collected: CollectedAdapters | None = None
    for at, (name, args) in enumerate(stages.items()):
        report["stages"][name] = train_stage(name, args, model, tokenizer, rows, run.resume)
        if run.save_form != "merged":
            if any(later in adapting for later in list(stages)[at + 1 :]):
                continue  # the next stage that adapts goes on with these adapters
            if collected is None and first.process_index == 0:
                collected = collect_adapters(model)
        merge_adapters(model)
    if run.save_dtype is not None:  # round before calibrating: thresholds belong to the weights that are saved
        model.to(getattr(torch, run.save_dtype)).to(getattr(torch, run.dtype))
    model.generation_config.max_new_tokens = run.max_target_length
    share = first.expert_budget or model.config.expert_budget
    batch_size = first.per_device_eval_batch_size
    if run.calibrate:
        report["calibration"] = calibrate(
            model,
            rows["validation"],
            collator,
            share,
            batch_size,
            run.calibration_rounds,
            run.calibrate_gate,
            run.max_target_length,
        )
    if run.score_samples:
        report.update(score(run, model, tokenizer, rows["validation"], batch_size))
    report["seconds"] = round(time.perf_counter() - start, 1)
    if first.process_index == 0:
        if run.save_dtype is not None:
            model.to(getattr(torch, run.save_dtype))
        if run.save_form != "adapters":
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        if collected is not None:
            write_adapters(model, collected, folder / "adapters", tokenizer)
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (folder / "training_report.json").write_text(text + "\n", encoding="utf-8")
    return report


def load_model(run: RunArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The composed model, and the shared tokenizer."""
    dtype = getattr(torch, run.dtype)
    tokenizer = MambaFormerTokenizer.from_pretrained(run.tokenizer or run.model_name_or_path or run.et5)
    if run.model_name_or_path is not None:
        kind = MambaFormerForConditionalGeneration
        if run.save_form != "merged" and is_adapter_checkpoint(run.model_name_or_path):
            model = kind.from_adapters_pretrained(run.model_name_or_path, merge=False, dtype=dtype)
        else:
            model = kind.from_pretrained(run.model_name_or_path, dtype=dtype)
    else:
        model = MambaFormerForConditionalGeneration.from_experts_pretrained(
            run.et5,
            run.emamba,
            tokenizer,
            dtype=dtype,
            max_source_length=run.max_source_length,
            max_target_length=run.max_target_length,
        )
    if run.lexicon is not None:
        words = load_lexicon() if run.lexicon == "dental_qa" else load_lexicon(Path(run.lexicon))
        model.router.domain_weight.copy_(domain_weights(tokenizer, words, model.config.vocab_size))
    return model, tokenizer


def load_rows(run: RunArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Dataset]:
    """
    Tokenised rows under `train`, `distil` and `validation`.

    Of a file that holds a single split, a tenth is held out for validation, `max_validation_samples` at most.
    """
    columns = (run.question_column, run.context_column, run.answer_column, run.dataset_config)
    lengths = (run.max_source_length, run.max_target_length)
    if run.validation_dataset is None and is_one_split(run.dataset):
        every = load_qa(run.dataset, run.train_split, *columns, None, seed).shuffle(seed=seed)
        cut = max(1, min(len(every) // 10, run.max_validation_samples or len(every)))
        held_out, train_text = every.select(range(cut)), every.select(range(cut, len(every)))
    else:
        train_text = load_qa(run.dataset, run.train_split, *columns, None, seed)
        held_out = load_qa(run.validation_dataset or run.dataset, run.validation_split, *columns, None, seed)
        held_out = held_out.shuffle(seed=seed)
    if run.max_train_samples is not None and run.max_train_samples < len(train_text):
        train_text = train_text.shuffle(seed=seed).select(range(run.max_train_samples))
    count = min(len(held_out), run.max_validation_samples or len(held_out))
    texts = {"train": train_text, "validation": held_out.select(range(count)), "distil": train_text}
    if run.distil_split == run.validation_split:
        texts["distil"] = held_out.select(range(count, len(held_out)))
    elif run.distil_split is not None:
        texts["distil"] = load_qa(run.dataset, run.distil_split, *columns, None, seed)
    if len(texts["distil"]) == 0:
        raise ValueError(
            f"max_validation_samples is {run.max_validation_samples}, which leaves none of the {count} rows of "
            f"{run.validation_split!r} to distil on: lower it, or give another distil_split."
        )
    if run.max_distil_samples is not None and run.max_distil_samples < len(texts["distil"]):
        texts["distil"] = texts["distil"].shuffle(seed=seed).select(range(run.max_distil_samples))
    return {name: tokenize_qa(text, tokenizer, *lengths) for name, text in texts.items()}


def typical_lengths(rows: Dataset) -> tuple[int, int]:
    """Mean tokens of a source and of half an answer."""
    count = len(rows)
    sources, answers = sum(map(len, rows["input_ids"])), sum(map(len, rows["labels"]))
    return max(1, round(sources / count)), max(1, round(answers / count / 2))


def train_stage(
    name: str,
    args: MambaFormerTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, Dataset],
    resume: bool,
) -> dict:
    """Train one stage, or take up its finished tensors; its adapters stay in place. Returns its last figures."""
    finished = Path(args.output_dir) / FINISHED
    if resume and finished.is_dir():
        prepare_stage(model, args)
        load_trainable(model, finished)
        return json.loads((finished / "figures.json").read_text(encoding="utf-8"))
    trainer = MambaFormerTrainer(
        model=model,
        args=args,
        train_dataset=rows["distil" if name == "distil" else "train"],
        eval_dataset=rows["validation"] if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )
    last = get_last_checkpoint(args.output_dir) if resume and Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    figures: dict = {}
    for entry in trainer.state.log_history:
        figures.update(entry)
    if args.should_save:
        save_trainable(model, finished)
        (finished / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def score(
    run: RunArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> dict:
    """Answer the first `score_samples` validation questions as a user's call would, and score the answers."""
    rows = rows.select(range(min(run.score_samples, len(rows))))
    model.eval()
    texts: dict[str, list[str]] = {"question": [], "answer": [], "reference": []}
    routed = tokens = 0
    for batch in batches(rows, Collator(tokenizer), batch_size, next(model.parameters()).device):
        result = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict_in_generate=True
        )
        routed += int((result.route_trace.expert == 1).sum())
        tokens += int((result.route_trace.expert >= 0).sum())
        labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
        for name, ids in (("question", batch["input_ids"]), ("answer", result.sequences), ("reference", labels)):
            texts[name] += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    bert = BertScore(run.bert_score_model, run.bert_score_layers) if run.bert_score_model else None
    scores = score_answers(texts["answer"], texts["reference"], bert)
    samples = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
    return {
        "scores": {**scores, "et5_share": routed / max(1, tokens), "questions": len(rows)},
        "samples": samples[:30],
    }


def shared(value: dict[str, float]) -> dict[str, float]:
    """What the first process measured, on all processes."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
