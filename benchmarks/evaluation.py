# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Evaluate the embedded default against every rule it must beat, and keep what README.md and model_card.md quote.

    python -m mambaformer.benchmarks.evaluation [--rows 150] [--plain runs/embedded_plain_t5_noise/et5]

Runs `mambaformer.trainer.evaluate` into `results/embedded/` and copies, into `benchmarks/results/`, one JSON file a
table that is quoted and the figures that are shown.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mambaformer import embedded_checkpoint

from ..trainer.evaluate import main as evaluate
from ..trainer.router_questions import write_router_questions
from .machine import RESULTS

SPLITS = ("test_phrasing", "test_concept", "test_long")
TABLES = ("quality", "differences", "captured", "plain")
FIGURES = (
    "pareto_bert_score.png",
    "captured.png",
    "reliability.png",
    "answers_test_phrasing.png",
    "training_traces.png",
)
RUN = Path("runs/dental_embedded")
"""Where the recipe trains the embedded default."""


def main() -> None:
    """Run, and keep tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=150, help="questions a split")
    parser.add_argument("--plain", metavar="PATH", help="a plain T5 to set beside it, of trainer.embedded --plain")
    parser.add_argument("--training-run", type=Path, default=RUN, help="its training's output_dir, drawn if it exists")
    parser.add_argument("--out", type=Path, default=Path("results/embedded"), help="folder of the whole evaluation")
    arguments = parser.parse_args()
    command = ["--model", str(embedded_checkpoint()), "--splits", *SPLITS, "--rows", str(arguments.rows)]
    asked = arguments.out / "router_questions"
    write_router_questions(asked)  # those that the recipe made: thresholds are set where the router's own were
    command += ["--calibration-data", str(asked / "validation.jsonl")]
    command += ["--plain", arguments.plain] if arguments.plain else []
    command += ["--training-run", str(arguments.training_run)] if arguments.training_run.is_dir() else []
    code = evaluate([*command, "--out", str(arguments.out)])
    if code:
        raise SystemExit(code)
    keep(arguments.out)


def keep(folder: Path) -> None:
    """Copy the quoted tables and figures of the evaluation in `folder` to `benchmarks/results/`."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for name, table in found["tables"].items():
        if name.split("_")[0] in TABLES:
            kept = {"machine": found["machine"], "command": found["command"], **table}
            path = RESULTS / f"evaluation_{name}.json"
            path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in FIGURES:
        if (folder / name).is_file():
            shutil.copy(folder / name, RESULTS / f"evaluation_{name}")


if __name__ == "__main__":
    main()
