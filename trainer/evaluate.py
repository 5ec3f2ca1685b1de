# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
r"""
Score a MambaFormer and every rule it must beat, in one run.

    python -m mambaformer.trainer.evaluate --model mambaformer/embedded --data dental_qa --splits test_phrasing \
        test_concept test_long --rows 150 --baselines all --out results/embedded

Into --out go evaluation.json, evaluation.md, the figures as PNG, per_question.npz (each score of each question) and
answers.jsonl. Thresholds come from validation questions; the test splits are only read. With --plain a T5 of the same
vocabulary (`python -m mambaformer.trainer.embedded --plain` makes one) answers, is scored and is timed beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from pathlib import Path

BASELINES = ("budgets", "confidence", "random", "sequence", "soft")
BUDGETS = (0.01, 0.02, 0.038, 0.08, 0.15, 0.3)
"""Shares of tokens at which policies are compared; the model's own is added."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mambaformer.trainer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="folder or Hub id of a trained MambaFormer")
    add("--plain", metavar="PATH_OR_ID", help="a plain T5 of the same vocabulary, to score and time beside it")
    add("--data", default="dental_qa", metavar="DATA", help="dental_qa, a file, PubMedQA's, a Hub id")
    add("--splits", nargs="+", default=["test_phrasing", "test_concept", "test_long"], metavar="SPLIT")
    add("--validation", default="validation", metavar="SPLIT", help="to calibrate on (default: %(default)s)")
    add("--calibration-data", metavar="DATA", help="where it is another data set (default: --data)")
    add("--rows", type=positive, default=150, metavar="N", help="questions a split (default: %(default)s)")
    add("--calibration-rows", type=positive, default=96, metavar="N", help="default: %(default)s")
    add("--calibration-seed", type=int, default=0, help="the training run's seed, whose held-out rows are taken again")
    add("--latency-rows", type=count, default=12, metavar="N", help="to time one by one (default: %(default)s)")
    add("--baselines", nargs="+", default=["all"], choices=("all", "none", *BASELINES), help="besides both experts")
    add("--budgets", nargs="+", type=share, default=list(BUDGETS), metavar="SHARE", help="of tokens, between 0 and 1")
    add("--bert-score", default="minilm", metavar="ENCODER", help="minilm (offline), roberta-large, a folder, or none")
    add("--bert-layers", type=positive, metavar="N", help="layer of an encoder that bert-score does not know")
    add("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")
    add("--resamples", type=positive, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of samples of questions, of random choices and of the bootstrap")
    add("--threads", type=positive, metavar="N", help="of torch (default: its own)")
    add("--training-run", type=Path, metavar="DIR", help="output_dir of run.py, whose loss and price curves are drawn")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    return parser


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def count(text: str) -> int:
    """A whole number of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def share(text: str) -> float:
    """A number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1; 3.8 % is 0.038")
    return value


def need_packages() -> None:
    """Raise `ImportError` for what is imported late, before any work is done."""
    for name in ("matplotlib", "rouge_score"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{name} is not installed: run `pip install "mambaformer[evaluate]"`.')


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0, or 2 after an error that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        import datasets
        import torch
        from transformers.utils import logging

        from .bertscore import named_scorer
        from .evaluation_data import calibration_questions, load_questions
        from .evaluation_models import checkpoint_name, load_model, load_plain, weights_digest

        need_packages()
        traces = None
        if arguments.training_run is not None:
            from .training_plots import read_traces

            traces = read_traces(arguments.training_run)
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        arguments.out.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(arguments.model)
        plain = load_plain(arguments.plain, tokenizer) if arguments.plain else None
        lengths = model.config.max_source_length, model.config.max_target_length
        calibrating = arguments.calibration_data or arguments.data
        held_out = arguments.calibration_rows, arguments.calibration_seed
        validation = calibration_questions(calibrating, arguments.validation, tokenizer, *held_out, lengths)
        splits = [
            load_questions(arguments.data, name, tokenizer, arguments.rows, arguments.seed, lengths)
            for name in dict.fromkeys(arguments.splits)
        ]
        scorer = None
        if arguments.bert_score != "none":
            scorer = named_scorer(arguments.bert_score, arguments.bert_layers)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MAMBAFORMER_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        return 2

    from .evaluation_files import write_files
    from .evaluation_run import evaluate

    wanted = set(BASELINES) if "all" in arguments.baselines else set(arguments.baselines)
    found = evaluate(
        model,
        tokenizer,
        validation,
        splits,
        scorer,
        budgets=arguments.budgets,
        wanted=wanted,
        batch_size=arguments.batch_size,
        latency_rows=arguments.latency_rows,
        resamples=arguments.resamples,
        seed=arguments.seed,
        say=say,
        plain=plain,
    )
    found.result = {
        "command": "python -m mambaformer.trainer.evaluate " + shlex.join(without_folders(argv)),
        "model": checkpoint_name(arguments.model),
        "weights_sha256": weights_digest(arguments.model),
        "plain_sha256": weights_digest(arguments.plain) if arguments.plain else None,
        "data": Path(arguments.data).name if Path(arguments.data).is_file() else arguments.data,
        "threads": torch.get_num_threads(),
        "resamples": arguments.resamples,
        "latency_rows": arguments.latency_rows,
        **found.result,
        "seconds": round(time.perf_counter() - began),
    }
    write_files(arguments.out, found, traces)
    say(f"written: {arguments.out / 'evaluation.md'}")
    return 0


def without_folders(argv: list[str]) -> list[str]:
    """The command line with absolute paths cut to their last part: results name no folders of a machine."""
    words = []
    for word in argv:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return words


if __name__ == "__main__":
    sys.exit(main())
