# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The routers that an ablation compares: each loss term off in turn, each router feature group off in turn.

All start from fresh routers and gates of one seed and are distilled by the training command's own stage, on the same
utilities, in the same batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..modeling_mambaformer.router import SequenceGate
from ..modeling_mambaformer.router_features import FEATURE_GROUPS
from ..trainer.arguments import MambaFormerTrainingArguments
from ..trainer.kept_readings import KeptReadings
from ..trainer.stages import distil_inputs
from ..trainer.training_run import renew_router, train_stage

WHOLE = "whole"
"""Name of the variant that lacks nothing."""


@dataclass(frozen=True)
class Variant:
    """
    One router.

    Attributes:
        name, label: in files, and in tables. without: the router feature group that it does not see, or `None`.
        weights: loss weights that differ. seeds: added to the run's seed. gate: whether its sequence gate was trained.
    """

    name: str
    label: str
    without: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    seeds: int = 0
    gate: bool = True


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(WHOLE, "all terms, all features"),
        Variant("seed", "the same, another seed", seeds=1),
        Variant("no_use", "no utilisation term", weights={"w_use": 0.0}),
        Variant("no_burst", "no burst term", weights={"w_burst": 0.0}),
        Variant("no_z", "no z term", weights={"w_z": 0.0}),
        Variant("no_gate", "no gate term, gate open", weights={"w_gate": 0.0}, gate=False),
        Variant("regress", "regression in place of the utility term", weights={"w_util": 0.0, "w_regress": 1.0}),
        Variant("gain", "expected gain in place of the utility term", weights={"w_util": 0.0, "w_gain": 1.0}),
        *(Variant(f"no_{name}", f"no {name} features", without=name) for name in FEATURE_GROUPS),
    )
}


def train_variant(
    variant: Variant,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: MambaFormerTrainingArguments,
    readings: KeptReadings,
    resume: bool = False,
) -> dict[str, float]:
    """
    Put a fresh router and a fresh gate into `model`, and distil them as `variant` says.

    Args:
        rows: of `tokenize_qa`, with utilities. args: of the stage `distil`; the variant's folder is beside its own.
        resume: take up what was distilled before, where it is finished.

    Returns:
        the last figures that the stage logged.
    """
    folder = str(Path(args.output_dir).with_name(variant.name))
    changed: dict[str, Any] = {"output_dir": folder, "seed": args.seed + variant.seeds, **variant.weights}
    own = dataclasses.replace(args, **changed)
    set_seed(own.seed)
    model.gate = SequenceGate(model.config).apply(model._init_weights).to(model.router.score.weight)
    renew_router(model, [name for name in FEATURE_GROUPS if name != variant.without])
    inputs = partial(distil_inputs, route=readings.route)
    figures = train_stage("distil", own, model, tokenizer, {"distil": rows}, resume, inputs)
    model.eval()
    return figures
