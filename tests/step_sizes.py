# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What tests want to know of the compiled decoding steps that a generation ran."""

from __future__ import annotations

import pytest

from mambaformer.modeling_mambaformer.emamba_decoder import BoundStep
from mambaformer.modeling_mambaformer.greedy_run import GreedyRun


def step_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every step from now on, whether it is run alone or with others in one call."""
    sizes: list[int] = []
    run, run_on = BoundStep.run, GreedyRun.run

    def counted(step, *given):
        sizes.append(len(step.ids))
        return run(step, *given)

    def counted_on(steps, *given):
        read, asked = run_on(steps, *given)
        sizes.extend([len(steps.step.ids)] * read)
        return read, asked

    monkeypatch.setattr(BoundStep, "run", counted)
    monkeypatch.setattr(GreedyRun, "run", counted_on)
    return sizes
