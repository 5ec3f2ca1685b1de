# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
K-fold cross-validation of a whole run: train, calibrate and score K times, each time without another fold.

The rows are those that the run would train, distil and calibrate on; test splits are never touched. No group (a
concept of DentalQA, a PubMed id, else a question) is in two folds, nor in two roles within a fold. Each fold has a
folder of its own, output_dir/fold_1 and so on, and a finished one is taken up by a run with --resume true.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from .arguments import MambaFormerTrainingArguments
from .calibration import unroll_gold
from .cross_validation_report import summarise, to_markdown
from .data import Collator, numbered
from .distillation import add_utilities
from .folds import deal, without_sentences
from .pubmedqa import is_pubmedqa
from .run_arguments import RunArguments
from .run_data import load_texts
from .training_run import Loaded, load_model, score, sharded, tokenised, train

logger = logging.getLogger(__name__)
FOLD_FILE = "fold.json"
ROLES = ("train", "validation", "distil")
POLICIES = {"mambaformer": None, "emamba": "emamba", "et5": "et5"}
"""Who answers a fold's questions, and the `routing` that says so."""
NOT_SETTINGS = ("output_dir", "logging_dir", "run_name", "resume", "resume_from_checkpoint")


@dataclass
class Folds:
    """
    n rows in K folds.

    Attributes:
        rows: columns `question`, `context`, `answer`. groups: one a row. column: what the groups are, or `question`.
        parts: row numbers of each fold. sizes: relative size of each of the roles among a fold's other rows.
        seed: of all that is drawn. settings: hash of rows and arguments; folds of other settings are not taken up.
    """

    rows: Dataset
    groups: list[str]
    column: str
    parts: list[list[int]]
    sizes: dict[str, int]
    seed: int
    settings: str

    def roles(self, number: int) -> dict[str, list[int]]:
        """Row numbers under `test` (fold `number`, from 0) and the roles of the others; none is under two."""
        held_out = set(self.parts[number])
        rest = [row for row in range(len(self.groups)) if row not in held_out]
        dealt = deal([self.groups[row] for row in rest], list(self.sizes.values()), self.seed + number + 1)
        chosen = {role: [rest[i] for i in part] for role, part in zip(self.sizes, dealt, strict=True)}
        return {"test": self.parts[number], **chosen}


def load_folds(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments]) -> Folds:
    """
    Read the data and divide it.

    Raises:
        ValueError, OSError: as `load_texts`; `ValueError` for a missing group column, too few groups, or a folder with
            folds of other settings that is to be taken up.
    """
    if sharded():
        raise ValueError(f"cross_validate is {run.cross_validate}, and FSDP is on, which trains one stage only.")
    first = next(iter(stages.values()))
    column = group_column(run)
    texts = load_texts(run, first.seed, (column,) if column else ())
    own_distil = run.distil_split not in (None, run.train_split)
    roles = [role for role in ROLES if role != "distil" or own_distil]
    rows = numbered(concatenate_datasets([texts[role].remove_columns("row") for role in roles]))
    groups = [str(value) for value in rows[column]] if column else [text.casefold() for text in rows["question"]]
    folds = Folds(
        rows,
        groups,
        column or "question",
        deal(groups, [1] * run.cross_validate, first.seed),
        {role: len(texts[role]) for role in roles},
        first.seed,
        settings_hash(run, stages, rows),
    )
    for number in range(run.cross_validate):
        folds.roles(number)  # too few groups are told before training
        if run.resume:
            finished_fold(fold_folder(first, number), folds.settings)
    return folds


def group_column(run: RunArguments) -> str | None:
    """The column whose values stay together; `None` for the question itself."""
    if run.group_column is not None:
        return run.group_column
    if run.dataset == "dental_qa":
        return "concept"
    return "id" if is_pubmedqa(run.dataset, run.dataset_config) else None


def cross_validate(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments], folds: Folds) -> dict:
    """
    Train and score every fold, then write `cross_validation.json` and `.md`.

    Returns:
        `folds` (each one's figures), and under `summary` by policy and metric `mean`, `deviation` (the sample standard
        deviation over folds) and `values`.

    Raises:
        NonFiniteLoss: as `train`; the folds that are done are kept.
    """
    first = next(iter(stages.values()))
    with first.main_process_first(local=False):
        if first.process_index == 0 and not run.resume:
            for number in range(len(folds.parts)):
                (fold_folder(first, number) / FOLD_FILE).unlink(missing_ok=True)  # of an earlier run
    results = []
    for number in range(len(folds.parts)):
        folder = fold_folder(first, number)
        result = finished_fold(folder, folds.settings) if run.resume else None
        if result is None:
            logger.info("fold %d of %d", number + 1, len(folds.parts))
            if first.process_index == 0:  # a stop within the fold leaves stages that belong to these settings
                write(folder / FOLD_FILE, json.dumps({"fold": number + 1, "settings": folds.settings}, indent=1))
            result = run_fold(run, stages, folds, number)
            if first.process_index == 0:
                write(folder / FOLD_FILE, json.dumps(result, indent=1, ensure_ascii=False))
        results.append(result)
    report = {
        "dataset": Path(run.dataset).name if Path(run.dataset).is_absolute() else run.dataset,
        "group_column": folds.column,
        "groups": len(set(folds.groups)),
        "rows": len(folds.groups),
        "seed": folds.seed,
        "summary": summarise([result["scores"] for result in results]),
        "folds": [{name: value for name, value in result.items() if name != "settings"} for result in results],
    }
    if first.process_index == 0:
        folder = Path(first.output_dir).parent
        write(folder / "cross_validation.json", json.dumps(report, indent=1, ensure_ascii=False))
        write(folder / "cross_validation.md", to_markdown(report))
    return report


def run_fold(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments], folds: Folds, number: int) -> dict:
    """Train without fold `number`, in its folder, and score on it."""
    roles = folds.roles(number)
    texts = {role: folds.rows.select(rows) for role, rows in roles.items()}
    held_out = texts.pop("test")
    texts = {role: without_sentences(part, held_out["answer"]) for role, part in texts.items()}
    if "distil" not in texts:
        texts["distil"] = texts["train"]
        if run.max_distil_samples is not None and run.max_distil_samples < len(texts["distil"]):
            texts["distil"] = texts["distil"].shuffle(seed=folds.seed).select(range(run.max_distil_samples))
    folder = fold_folder(next(iter(stages.values())), number)
    stages = {
        name: dataclasses.replace(args, output_dir=str(folder / Path(args.output_dir).name))  # type: ignore[call-arg]
        for name, args in stages.items()
    }
    first = next(iter(stages.values()))
    set_seed(first.seed)
    model, tokenizer = load_model(run)
    test = tokenised(run, tokenizer, {"test": held_out.shuffle(seed=folds.seed)})["test"]
    test = test.select(range(min(run.score_samples, len(test))))
    report = train(
        dataclasses.replace(run, cross_validate=None, score_samples=0),
        stages,
        Loaded(model, tokenizer, tokenised(run, tokenizer, texts)),
    )
    model.to(getattr(torch, run.dtype))  # rounded to save_dtype, but computed as in training
    return {
        "fold": number + 1,
        "settings": folds.settings,
        "rows": {**report["rows"], "test": len(held_out), "scored": len(test)},
        "groups": len({folds.groups[row] for row in roles["test"]}),
        "scores": score_fold(run, model, tokenizer, test, first.per_device_eval_batch_size),
        "seconds": report["seconds"],
    }


def score_fold(
    run: RunArguments, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> dict[str, dict[str, float | str]]:
    """
    By policy: the scores of its answers to `rows`, and `perplexity` of the gold answers.

    MambaFormer's perplexity is that of the expert chosen for each token.
    """
    scores = {
        name: score(run, model, tokenizer, rows, batch_size, routing)["scores"] for name, routing in POLICIES.items()
    }
    model.eval()
    collator = Collator(tokenizer)
    known = add_utilities(model, rows, collator, batch_size)
    gold, delta = unroll_gold(model, known, collator, batch_size)
    expert, _ = gold.choices(model, model.config.router_threshold, model.config.gate_threshold)
    nats = {
        name: -sum(map(sum, known[f"log_p_{name}"])) / gold.tokens  # a token
        for name in ("emamba", "et5")
    }
    nats["mambaformer"] = nats["emamba"] - float(delta[expert == 1].sum()) / gold.tokens
    for name, value in nats.items():
        scores[name]["perplexity"] = math.exp(min(value, 700.0))
    return scores


def fold_folder(first: MambaFormerTrainingArguments, number: int) -> Path:
    """Folder of fold `number`, counted from 0 here and from 1 in its name."""
    return Path(first.output_dir).parent / f"fold_{number + 1}"


def finished_fold(folder: Path, settings: str) -> dict | None:
    """
    The figures of a fold that is done, else `None`.

    Raises:
        ValueError: where it was made, or begun, with other settings or other data.
    """
    path = folder / FOLD_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        raise ValueError(
            f"{path} is of a run with other arguments or other data: give another output_dir, or leave out --resume."
        )
    return result if "scores" in result else None


def settings_hash(run: RunArguments, stages: dict[str, MambaFormerTrainingArguments], rows: Dataset) -> str:
    """Hash of everything that decides what a fold gives, but for the machine."""
    values = [dataclasses.asdict(run), *(args.to_dict() for args in stages.values())]
    plain = [{name: value for name, value in part.items() if name not in NOT_SETTINGS} for part in values]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
