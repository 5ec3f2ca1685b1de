# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A whole training run: load or compose, train the stages one after another, calibrate, score, save."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..dental_qa.lexicon import load_lexicon
from ..modeling_mambaformer.adapter_checkpoint import is_adapter_checkpoint
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from ..modeling_mambaformer.router import TokenRouter
from ..tokenizer.domain_lexicon import domain_weights
from ..tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from .adapter_folder import CollectedAdapters, collect_adapters, write_adapters
from .adapters import load_trainable, merge_adapters, prepare_stage, save_trainable
from .arguments import MambaFormerTrainingArguments
from .bertscore import BertScore, named_scorer
from .calibration import batches, calibrate
from .checkpoints import last_whole_checkpoint, replaced, set_aside
from .costs import measure_costs
from .data import Collator, tokenize_qa
from .losses import LossInputs
from .metrics import score_answers
from .run_arguments import RunArguments
from .run_data import load_texts
from .trainer import MambaFormerTrainer

logger = logging.getLogger(__name__)
FINISHED = "finished"
"""Folder of a stage's trained tensors once it is done."""
LOG_FILE = "log_history.jsonl"
"""In that folder: every entry that the stage logged, one a line."""
COSTS_FILE = "cost_table.json"
"""What was measured before the first stage: a run that is taken up goes on with it."""


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
    if sharded() and list(stages) not in (["adapt"], ["joint"]):
        raise ValueError(
            f"stages are {list(stages)}, and FSDP is on, which shards one stage: run `--stages adapt` under FSDP, "
            "then all stages without it and with `--resume true`, which takes adapt up as it is."
        )
    set_seed(first.seed)
    model, tokenizer = load_model(run)
    if run.save_form != "merged" and first.process_index == 0:
        collect_adapters(model)  # a base that is missing or another is told before training, not after
    return Loaded(model, tokenizer, load_rows(run, tokenizer, first.seed))


def train(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments], loaded: Loaded) -> dict:
    """
    Run all stages and write `model/` or `adapters/`, as `save_form` says, and `training_report.json` beside them.

    Without `run.resume`, the folders of an earlier run's stages are set aside: no later resume may mix the two. Under
    FSDP the one stage is trained, its tensors are kept, and the rest is left to a run without FSDP.

    Returns:
        the report: `cost_table` in milliseconds, each stage's last figures under `stages`, `calibration`, `scores`,
        `samples` and `seconds`.

    Raises:
        NonFiniteLoss: naming step and rows, at a loss or gradient that is NaN or infinite.
    """
    start = time.perf_counter()
    first = next(iter(stages.values()))
    folder = Path(first.output_dir).parent
    model, tokenizer, rows = loaded.model, loaded.tokenizer, loaded.rows
    model.to(first.device)
    collator = Collator(tokenizer)
    report: dict = {"rows": {name: len(split) for name, split in rows.items()}, "stages": {}}
    with first.main_process_first(local=False):
        if first.process_index == 0 and not run.resume:
            for args in stages.values():
                set_aside(Path(args.output_dir))
    if run.cost_table == "measure":
        model.config.cost_table = costs_of_run(model, rows["validation"], folder / COSTS_FILE, run.resume)
    report["cost_table"] = model.config.cost_table
    adapting = [name for name in stages if name != "distil"]
    collected: CollectedAdapters | None = None
    for at, (name, args) in enumerate(stages.items()):
        report["stages"][name] = train_stage(name, args, model, tokenizer, rows, run.resume)
        if sharded():
            return report
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
            with replaced(folder / "model") as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                note_dtype(partial / "config.json", run.dtype)
        if collected is not None:
            with replaced(folder / "adapters") as partial:
                write_adapters(model, collected, partial, tokenizer)
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
        model.config.max_source_length, model.config.max_target_length = run.max_source_length, run.max_target_length
        if run.router_features not in (None, model.config.router_features):
            renew_router(model, run.router_features)
    else:
        model = MambaFormerForConditionalGeneration.from_experts_pretrained(
            run.et5,
            run.emamba,
            tokenizer,
            dtype=dtype,
            max_source_length=run.max_source_length,
            max_target_length=run.max_target_length,
            router_features=run.router_features,
        )
    if run.lexicon is not None:
        words = load_lexicon() if run.lexicon == "dental_qa" else load_lexicon(Path(run.lexicon))
        model.router.domain_weight.copy_(domain_weights(tokenizer, words, model.config.vocab_size))
    return model, tokenizer


def renew_router(model: PreTrainedModel, features: list[str]) -> None:
    """
    Give `model` an untrained router that looks at `features`, and forget what was calibrated for the old one; domain
    weights, which are not trained, stay.

    Raises:
        ValueError: for a feature group that does not exist.
    """
    old, config = model.router, copy.deepcopy(model.config)
    config.router_features = list(features)
    router = TokenRouter(config).apply(model._init_weights).to(old.score.weight)
    router.domain_weight.copy_(old.domain_weight)
    model.router, model.config.router_features = router, config.router_features
    model.config.router_threshold, model.config.threshold_table, model.config.gate_threshold = 0.0, None, None


def load_rows(run: RunArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Dataset]:
    """Tokenised rows of `load_texts`."""
    return tokenised(run, tokenizer, load_texts(run, seed))


def tokenised(run: RunArguments, tokenizer: PreTrainedTokenizerBase, texts: dict[str, Dataset]) -> dict[str, Dataset]:
    """Token ids of each of `texts`, cut to the run's lengths."""
    lengths = (run.max_source_length, run.max_target_length)
    return {name: tokenize_qa(text, tokenizer, *lengths) for name, text in texts.items()}


def costs_of_run(model: PreTrainedModel, rows: Dataset, file: Path, resume: bool) -> dict[str, float]:
    """The experts' costs in milliseconds: those that the stopped run measured, or measured now and kept in `file`."""
    kept = resume and file.is_file()
    costs = json.loads(file.read_text(encoding="utf-8")) if kept else measure_costs(model, *typical_lengths(rows))
    costs = shared(costs)
    if not kept and PartialState().is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(costs, indent=1), encoding="utf-8")
        partial.replace(file)
    return costs


def sharded() -> bool:
    """Whether `accelerate launch` was told to shard the model by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def note_dtype(config: Path, dtype: str) -> None:
    """Have a saved model loaded in `dtype`, in which its thresholds were set, whatever its weights are stored in."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = dtype
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    stage_inputs: Callable[..., LossInputs] | None = None,
) -> dict:
    """
    Train one stage, or take up its finished tensors, or its last whole checkpoint; its adapters stay in place.

    Args:
        stage_inputs: in place of the stage's own function of `STAGE_INPUTS`.

    Returns:
        its last figures.
    """
    finished = Path(args.output_dir) / FINISHED
    set_seed(args.seed)  # fresh adapters are the same, whether the stage before was trained just now or taken up
    if resume and finished.is_dir():
        prepare_stage(model, args)
        load_trainable(model, finished)
        earlier = json.loads((finished / "figures.json").read_text(encoding="utf-8"))
        model.config.router_threshold = earlier.get("router_threshold", model.config.router_threshold)
        return earlier
    trainer = MambaFormerTrainer(
        model=model,
        args=args,
        train_dataset=rows["distil" if name == "distil" else "train"],
        eval_dataset=rows["validation"] if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )
    trainer.stage_inputs = stage_inputs or trainer.stage_inputs
    last = None
    with args.main_process_first(local=False):
        if resume:
            last = last_whole_checkpoint(args.output_dir, resuming=not args.save_only_model)
    ended = last is not None and trainer.take_up_ended(last)
    if not ended:
        trainer.train(resume_from_checkpoint=last)
    figures: dict = {}
    for entry in trainer.state.log_history:
        figures.update(entry)
    figures["router_threshold"] = model.config.router_threshold  # calibration begins there
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled and not ended else None
    if args.should_save:
        with replaced(finished) as partial:
            save_trainable(model, partial, state)
            (partial / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
            lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
            (partial / LOG_FILE).write_text("".join(lines), encoding="utf-8")
    return figures


def score(
    run: RunArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int,
    routing: str | None = None,
) -> dict:
    """Answer the first `score_samples` questions as a user's call would, or by `routing`, and score the answers."""
    rows = rows.select(range(min(run.score_samples, len(rows))))
    model.eval()
    texts: dict[str, list[str]] = {"question": [], "answer": [], "reference": []}
    routed = tokens = 0
    for batch in batches(rows, Collator(tokenizer), batch_size, next(model.parameters()).device):
        result = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            return_dict_in_generate=True,
            **({} if routing is None else {"routing": routing}),
        )
        routed += int((result.route_trace.expert == 1).sum())
        tokens += int((result.route_trace.expert >= 0).sum())
        labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
        for name, ids in (("question", batch["input_ids"]), ("answer", result.sequences), ("reference", labels)):
            texts[name] += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    bert = bert_scorer(run.bert_score_model, run.bert_score_layers) if run.bert_score_model else None
    scores = score_answers(texts["answer"], texts["reference"], bert)
    samples = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
    return {
        "scores": {**scores, "et5_share": routed / max(1, tokens), "questions": len(rows)},
        "samples": samples[:30],
    }


@lru_cache(maxsize=1)
def bert_scorer(name: str, num_layers: int | None) -> BertScore:
    """The scorer `name`, loaded once."""
    return named_scorer(name, num_layers)


def shared(value: dict[str, float]) -> dict[str, float]:
    """What the first process measured, on all processes."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
