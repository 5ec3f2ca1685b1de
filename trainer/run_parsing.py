# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""From a YAML file and the command line to arguments: the command line wins, then a stage's own value."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from mambaformer.trainer.run_arguments import RunArguments

STAGE_NAMES = ("adapt", "distil", "joint")


def print_help(documentation: str) -> None:
    """The usage and the run's own fields, without importing torch."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage="run.py config.yaml [--field value …] [--stage.field value …]",
    )
    for field in dataclasses.fields(RunArguments):
        parser.add_argument(f"--{field.name}", metavar="VALUE", help=field.metadata["help"].replace("%", "%%"))
    parser.print_help()
    print("\nAll fields of MambaFormerTrainingArguments are accepted too; --help_all lists them.")


def read_config(path: str) -> dict[str, Any]:
    """
    A YAML mapping.

    Raises:
        ValueError: for a file that is missing, or no mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file: give a YAML file, such as one of trainer/configs/.")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: give `field: value` lines.")
    return values


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate `--stage.field value …` from the rest; the former without their stage, by stage."""
    common: list[str] = []
    by_stage: dict[str, list[str]] = {name: [] for name in STAGE_NAMES}
    into = common
    for word in argv:
        if word.startswith("--"):
            stage, dot, field = word[2:].partition(".")
            into = by_stage[stage] if dot and stage in by_stage else common
            word = f"--{field}" if into is not common else word
        into.append(word)
    return common, by_stage


def parse(argv: list[str], parser) -> tuple[RunArguments, dict[str, Any]]:
    """
    The run's arguments and each stage's training arguments, in the order of `stages`.

    Args:
        argv: `[config.yaml] [--field value …]`.
        parser: an `HfArgumentParser` of `RunArguments` and `MambaFormerTrainingArguments`.

    Raises:
        ValueError: for an unknown field, naming the closest one, or an impossible value.
    """
    config = read_config(argv[0]) if argv and not argv[0].startswith("--") else {}
    common, by_stage = split_overrides(argv[1:] if config or (argv and not argv[0].startswith("--")) else argv)
    own = {name: config.pop(name) or {} for name in STAGE_NAMES if name in config}
    known = [field.name for kind in parser.dataclass_types for field in dataclasses.fields(kind) if field.init]
    for values in (config, *own.values()):
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"{name!r} is no field" + (f"; did you mean {close[0]!r}?" if close else "."))
    run = build(parser, config, common)[0]
    training = {}
    for stage in run.stages:
        if stage not in STAGE_NAMES:
            raise ValueError(f"stages names {stage!r}: choose from {list(STAGE_NAMES)}.")
        args = build(parser, {**config, **own.get(stage, {}), "stage": stage}, common + by_stage[stage])[1]
        training[stage] = dataclasses.replace(args, stage=stage, output_dir=str(Path(args.output_dir) / stage))
    return run, training


def build(parser, defaults: dict[str, Any], argv: list[str]) -> tuple:
    """Arguments from `defaults`, overridden by `argv`."""
    parser = type(parser)(parser.dataclass_types)  # defaults would stay with the parser, from one stage to the next
    parser.set_defaults(**defaults)
    for action in parser._actions:  # what the file gives is no longer required of the command line
        if action.dest in defaults:
            action.required = False
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
