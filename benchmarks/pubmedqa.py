# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Evaluate a model that `trainer/configs/pubmedqa_embedded.yaml` trained on PubMedQA's official test questions.

    python -m mambaformer.benchmarks.pubmedqa --data ori_pqal.json [--model runs/pubmedqa_embedded/model] [--rows 500]

Runs `mambaformer.trainer.evaluate` into `results/pubmedqa/` and copies the tables of its answers, with yes, no and
maybe beside the answer that is right most often, into `benchmarks/results/pubmedqa_<table>.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..trainer.evaluate import main as evaluate
from .machine import RESULTS

TABLES = ("decisions_test", "quality_test", "captured_test")


def main() -> int:
    """Run, and keep the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/pubmedqa_embedded/model"), help="folder of the model")
    parser.add_argument("--data", default="qiaojin/PubMedQA", help="PubMedQA's own file, or its id on the Hub")
    parser.add_argument("--rows", type=int, default=500, help="test questions")
    parser.add_argument("--baselines", nargs="+", default=["all"], help="as of the evaluation")
    parser.add_argument("--out", type=Path, default=Path("results/pubmedqa"), help="folder of the whole evaluation")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"{arguments.model} is not there: train it with trainer/configs/pubmedqa_embedded.yaml", file=sys.stderr)
        return 0  # nothing to measure is no failure of `make bench`
    command = ["--model", str(arguments.model), "--data", arguments.data, "--splits", "test"]
    command += ["--rows", str(arguments.rows), "--calibration-rows", "50", "--budgets", "0.038", "0.15"]
    command += ["--baselines", *arguments.baselines]
    code = evaluate([*command, "--out", str(arguments.out)])
    if code:
        return code
    found = json.loads((arguments.out / "evaluation.json").read_text(encoding="utf-8"))
    shown = found["command"].replace(arguments.data, Path(arguments.data).name)
    for name in TABLES:
        kept = {"machine": found["machine"], "command": shown, **found["tables"][name]}
        path = RESULTS / f"pubmedqa_{name}.json"
        path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
