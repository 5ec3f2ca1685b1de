# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Train a MambaFormer from two experts to a complete folder: adapt, distil, calibrate, score, save.

    accelerate launch trainer/run.py trainer/configs/dental_embedded.yaml
    accelerate launch trainer/run.py trainer/configs/flan_t5_base_mamba_130m.yaml --adapt.max_steps 500
    python -m mambaformer.trainer.run trainer/configs/smoke.yaml --et5 my-t5 --emamba my-mamba

The YAML file gives any field of RunArguments and MambaFormerTrainingArguments, for all stages, or for one under the
stage's name; the command line overrides it. The result, output_dir/model, is one plain model with its tokenizer (and
with --save_form adapters, output_dir/adapters holds only what was trained, on named bases), and
output_dir/training_report.json says what was measured. With --resume true a stopped run goes on.
With --cross_validate 5 all this is done five times, each time without another fifth of the rows, and
output_dir/cross_validation.md says how well that fifth was answered: mean and spread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the files beside this one must not pass for top-level modules
    sys.path.pop(0)

from mambaformer.trainer.run_parsing import parse, print_help  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0, 2 after an error in the arguments, or 3 where a loss was not finite."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"--help", "-h"} & set(argv):
        print_help(__doc__)
        return 0
    from transformers import HfArgumentParser

    from mambaformer.trainer.arguments import MambaFormerTrainingArguments
    from mambaformer.trainer.cross_validation import cross_validate, load_folds
    from mambaformer.trainer.finite import EXIT_CODE, NonFiniteLoss
    from mambaformer.trainer.run_arguments import RunArguments
    from mambaformer.trainer.training_run import load, sharded, train

    parser = HfArgumentParser([RunArguments, MambaFormerTrainingArguments])
    if "--help_all" in argv:
        parser.print_help()
        return 0
    try:
        run, training = parse(argv, parser)
        work: Callable[[], dict]
        if run.cross_validate:
            work = partial(cross_validate, run, training, load_folds(run, training))
        else:
            work = partial(train, run, training, load(run, training))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report = work()
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    first = next(iter(training.values()))
    if first.process_index == 0 and run.cross_validate:
        folder = Path(first.output_dir).parent
        print(json.dumps(report["summary"]["mambaformer"], indent=1))
        print("saved:", folder / "cross_validation.json", folder / "cross_validation.md")
    elif first.process_index == 0:
        folder = Path(first.output_dir).parent
        print(
            json.dumps(
                {name: report[name] for name in ("calibration", "scores", "seconds") if name in report}, indent=1
            )
        )
        if sharded():
            print(f"saved: {first.output_dir}; go on without FSDP: all stages, with --resume true")
            return 0
        saved = {"merged": ["model"], "adapters": ["adapters"], "both": ["model", "adapters"]}[run.save_form]
        print("saved:", *(folder / name for name in saved))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
