# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Costs are milliseconds that were measured; training uses their proportions, the same on every machine."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mambaformer.modeling_mambaformer import emamba_decoder, lazy_et5
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY
from mambaformer.trainer import costs
from mambaformer.trainer.utility import CallCosts, gaps_of, utility_target

TABLE = {"pass": 3.0, "token": 0.2, "encoder": 10.0, "emamba": 1.0}


def test_costs_are_the_milliseconds_that_each_part_takes(model, monkeypatch):
    """On a clock that only the experts move, since a real one shows other programs too."""
    seconds = [0.0]
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def takes(part, milliseconds) -> None:
        def work(module, inputs, output):
            seconds[0] += milliseconds(output.last_hidden_state.shape[1]) / 1000

        part.register_forward_hook(work)

    takes(model.et5.encoder, lambda positions: 20.0)
    takes(model.et5.decoder, lambda positions: 10.0 + 2.0 * positions)
    takes(model.emamba.backbone, lambda positions: 15.0 * positions)
    table = costs.measure_costs(model, source_length=12, target_length=6, repeats=2)
    assert table == pytest.approx({"pass": 10.0, "token": 2.0, "encoder": 20.0, "emamba": 15.0})


@pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled code is not built")
def test_costs_are_those_of_the_code_that_answers(model, monkeypatch):
    """Compiled passes and steps where they apply, as in generation."""
    ran = Counter()
    for module, name in ((lazy_et5, "run_pass"), (emamba_decoder, "run_step")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, r=run, **k: ran.update([n]) or r(*a, **k))
    costs.measure_costs(model, source_length=12, target_length=6, repeats=2)
    assert ran == {"run_pass": 1 + 2 * 4, "run_step": 4}


def test_a_machine_three_times_as_slow_gives_the_same_targets():
    fast, slow = (
        CallCosts.from_table({name: factor * ms for name, ms in TABLE.items()}, 0.04, 100) for factor in (1, 3)
    )
    assert slow.unit_ms == pytest.approx(3 * fast.unit_ms)
    assert (slow.once, slow.token, slow.encoder) == pytest.approx((fast.once, fast.token, fast.encoder))
    delta, gap = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.full((4, 9), 7.0)
    targets = [utility_target(delta, machine.of_call(gap), 0.7, 0.5) for machine in (fast, slow)]
    torch.testing.assert_close(*targets)


def test_a_call_in_milliseconds():
    call = CallCosts.from_table(TABLE, 0.04, 100)  # 4 calls a sequence, 25 positions each
    assert call.unit_ms == pytest.approx(3.0 + 25 * 0.2 + 10.0 / 4)
    assert float(call.of_call(torch.tensor(5.0))) * call.unit_ms == pytest.approx(3.0 + 5 * 0.2 + 10.0 / 4)
    choice = torch.tensor([[0, 0, 1, 1]])
    assert float(call.of_sequence(choice, gaps_of(choice))) * call.unit_ms == pytest.approx(2 * 3 + 4 * 0.2 + 10)


def test_tables_with_gaps():
    assert CallCosts.from_table({"pass": 2.0}, 0.04, 100) == CallCosts(1.0, 0.0, 0.0, 4.0, 2.0)
    for table in (None, {}, {"emamba": 1.0}, dict.fromkeys(TABLE, 0.0)):
        assert CallCosts.from_table(table, 0.04, 100) == CallCosts()


@pytest.mark.parametrize(("length", "encoders", "decoded"), [(50, 0.87, 0.58), (128, 0.995, 0.81)])
def test_share_is_not_cost(length, encoders, decoded):
    """At an independent 4 % a token most sequences pay the encoder, and ET5 decodes most positions."""
    choice = (torch.rand(20000, length, generator=torch.Generator().manual_seed(1)) < 0.04).long()
    gap = gaps_of(choice)
    assert float(CallCosts(0, 0, 1).of_sequence(choice, gap).mean()) == pytest.approx(encoders, abs=0.01)
    assert float(CallCosts(0, 1, 0).of_sequence(choice, gap).mean()) / length == pytest.approx(decoded, abs=0.01)
    assert float(CallCosts(1, 0, 0).of_sequence(choice, gap).mean()) / length == pytest.approx(0.04, abs=0.001)
