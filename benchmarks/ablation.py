# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
r"""
What each loss term and each router feature is worth: distil the embedded default's router again without it.

    python -m mambaformer.benchmarks.ablation [--rows 150] [--run runs/ablation]

The experts stay as they are, and both are asked once: every variant (`ablation_variants.py`) learns from the same
utilities, with the settings of trainer/configs/dental_embedded.yaml but in fewer steps; any of its fields may be given
anew, as `--distil.learning_rate 1e-3`. Then each routes held-out questions at the model's budget: its share of the
oracle's gain on the gold answers, switches and cost, as the evaluation measures them, and the scores of the answers
that it writes.
Writes `benchmarks/results/ablation.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from mambaformer import embedded_checkpoint

from ..trainer.arguments import MambaFormerTrainingArguments
from ..trainer.bertscore import named_scorer
from ..trainer.costs import measure_costs
from ..trainer.data import Collator
from ..trainer.distillation import add_utilities
from ..trainer.evaluate import without_folders
from ..trainer.evaluation_data import load_questions
from ..trainer.evaluation_files import finite
from ..trainer.evaluation_models import checkpoint_name, weights_digest
from ..trainer.kept_readings import KeptReadings
from ..trainer.router_questions import write_router_questions
from ..trainer.run_arguments import RunArguments
from ..trainer.run_data import load_texts
from ..trainer.run_parsing import parse, read_config
from ..trainer.training_run import load_model, tokenised
from .ablation_report import table_of
from .ablation_scores import Comparison
from .ablation_variants import VARIANTS, WHOLE, train_variant
from .machine import write_result

CONFIG = Path(__file__).resolve().parents[1] / "trainer" / "configs" / "dental_embedded.yaml"
QUESTIONS = {"distil_dataset": "distil.jsonl", "validation_dataset": "validation.jsonl"}
"""Fields that name the router's questions, and the files that `router_questions` writes."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, apart from the fields of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m mambaformer.benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="whose experts (default: the embedded checkpoint)")
    add("--run", type=Path, default=Path("runs/ablation"), metavar="FOLDER", help="for utilities and routers")
    add("--resume", action="store_true", help="take up routers of these settings that are finished")
    add("--config", default=str(CONFIG), metavar="YAML", help="of a training run with a stage distil")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    add("--steps", type=int, default=400, metavar="N", help="of each router (default: %(default)s)")
    add("--distil-rows", type=int, default=4000, metavar="N", help="questions to learn from (default: %(default)s)")
    add("--data", default="dental_qa", metavar="DATA", help="of the held-out questions (default: %(default)s)")
    add("--splits", nargs="+", default=["test_phrasing", "test_concept", "test_long"], metavar="SPLIT")
    add("--rows", type=int, default=150, metavar="N", help="questions a split (default: %(default)s)")
    add("--answers", type=int, default=100, metavar="N", help="of the first split, to be written and scored; 0: none")
    add("--calibration-rows", type=int, default=96, metavar="N", help="validation questions (default: %(default)s)")
    add("--bert-score", default="minilm", metavar="ENCODER", help="minilm (offline), a folder, a Hub id, or none")
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of torch (default: its own)")
    add("--name", default="ablation", help="name of the result file")
    return parser


def settings_of(
    arguments: argparse.Namespace, overrides: list[str]
) -> tuple[RunArguments, MambaFormerTrainingArguments]:
    """
    The run's arguments and those of its stage distil: the file's, but on the model's own experts; kept in --run as
    the file `run.yaml`. Where the router's questions are missing, they are made there. Routers go into a folder named
    by all that they depend on, so that none of other settings is taken up.

    Raises:
        ValueError: as `run_parsing.parse`, which reads `overrides`.
    """
    folder = arguments.run
    folder.mkdir(parents=True, exist_ok=True)
    values = read_config(arguments.config)
    for name in ("et5", "emamba", "tokenizer"):
        values.pop(name, None)
    values |= {"model_name_or_path": arguments.model or str(embedded_checkpoint()), "stages": ["distil"]}
    values |= {"output_dir": str(folder), "cost_table": "keep", "save_strategy": "no", "report_to": "none"}
    values["max_distil_samples"] = arguments.distil_rows
    own = {"max_steps": arguments.steps, "utility_cache": str(folder / "utilities")}
    values["distil"] = {**(values.get("distil") or {}), **own}
    given = {word.removeprefix("--") for word in overrides}
    named = {name: values.get(name) for name in QUESTIONS if name not in given}
    if any(path is not None and not Path(path).is_file() for path in named.values()):
        if not all((folder / file).is_file() for file in QUESTIONS.values()):
            write_router_questions(folder, distil=arguments.distil_rows, validation=600)
        values |= {name: str(folder / QUESTIONS[name]) for name in named}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    run, training = parse([str(file), *overrides], HfArgumentParser([RunArguments, MambaFormerTrainingArguments]))
    if list(training) != ["distil"]:
        raise ValueError(f"stages is {run.stages}: an ablation distils routers, and nothing else.")
    files = [path for path in (run.dataset, run.distil_dataset) if path and Path(path).is_file()]
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files]
    depends = json.dumps([values, overrides, digests, weights_digest(run.model_name_or_path)])
    routers = folder / f"routers-{hashlib.sha256(depends.encode()).hexdigest()[:12]}"
    return run, dataclasses.replace(training["distil"], output_dir=str(routers / "distil"))


def ablate(
    run: RunArguments,
    args: MambaFormerTrainingArguments,
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> dict:
    """Train and measure every variant; returns the result, ready for JSON."""
    names = list(dict.fromkeys([WHOLE, *arguments.variants]))
    model, tokenizer = load_model(run)
    model.eval()
    texts = load_texts(run, args.seed)
    rows = tokenised(run, tokenizer, {name: texts[name] for name in ("distil", "validation")})
    lengths = run.max_source_length, run.max_target_length
    splits = [
        load_questions(arguments.data, split, tokenizer, arguments.rows, args.seed, lengths)
        for split in dict.fromkeys(arguments.splits)
    ]
    scorer = None
    if arguments.answers and arguments.bert_score != "none":
        scorer = named_scorer(arguments.bert_score)
    collator, size = Collator(tokenizer), args.per_device_eval_batch_size
    model.config.cost_table = model.config.cost_table or measure_costs(model)
    model.config.expert_budget = args.expert_budget or model.config.expert_budget

    say(f"{len(rows['distil'])} questions to distil on: both experts on the gold answers")
    utilities = add_utilities(model, rows["distil"], collator, size, args.utility_folder)
    validation = rows["validation"].select(range(min(arguments.calibration_rows, len(rows["validation"]))))
    say("held-out questions: both experts on the gold answers")
    readings = KeptReadings()
    comparison = Comparison(model, tokenizer, validation, splits, readings, size, arguments.resamples, args.seed)
    variants = {}
    for name in names:
        variant = VARIANTS[name]
        say(f"{name}: distilling")
        figures = train_variant(variant, model, tokenizer, utilities, args, readings, arguments.resume)
        say(f"{name}: on the gold answers")
        logged = {key: value for key, value in figures.items() if key.startswith("loss")}
        variants[name] = {
            "label": variant.label,
            "without": variant.without,
            "weights": variant.weights,
            "steps": figures.get("step"),
            "seed": args.seed + variant.seeds,
            "losses": logged,
            "splits": comparison.measure(variant),
        }
        if arguments.answers:
            say(f"{name}: writing answers")
            comparison.write(variant, arguments.answers)
    say("scoring")
    for name, scores in comparison.scores(scorer).items():
        variants[name]["answers"] = scores
    return {
        "model": checkpoint_name(run.model_name_or_path),
        "weights_sha256": weights_digest(run.model_name_or_path),
        "data": Path(arguments.data).name if Path(arguments.data).is_file() else arguments.data,
        "questions": {questions.split: len(questions) for questions in splits},
        "answers": min(arguments.answers, len(splits[0])),
        "distil_rows": len(utilities),
        "calibration_rows": len(validation),
        "budget": comparison.budget,
        "cost_table": model.config.cost_table,
        "bert_score_model": scorer.name if scorer else None,
        "resamples": arguments.resamples,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "variants": variants,
        "rules": comparison.rules,
    }


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0, or 2 after an error that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, overrides = build_parser().parse_known_args(argv)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        run, args = settings_of(arguments, overrides)
        result = ablate(run, args, arguments, say)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "mambaformer.benchmarks.ablation", *without_folders(argv)])
    seconds = round(time.perf_counter() - began)
    result = finite({"command": command, **table_of(result), **result, "seconds": seconds})
    path = write_result(arguments.name, result)
    print(json.dumps(result["rows"], indent=1, ensure_ascii=False))
    say(f"written: benchmarks/results/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
