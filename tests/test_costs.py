# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Costs are milliseconds that were measured; training uses their proportions, the same on every machine."""

from __future__ import annotations

import time

import pytest
import torch

from mambaformer.trainer.costs import measure_costs
from mambaformer.trainer.utility import CallCosts, gaps_of, utility_target

TABLE = {"pass": 3.0, "token": 0.2, "encoder": 10.0, "emamba": 1.0}


def test_a_slower_part_costs_the_milliseconds_it_is_slower_by(model):
    plain = measure_costs(model, source_length=12, target_length=6, repeats=5)

    def slow_decoder(module, inputs, output):
        time.sleep(0.010 + 0.002 * output.last_hidden_state.shape[1])

    model.et5.encoder.register_forward_hook(lambda *_: time.sleep(0.020))
    model.et5.decoder.register_forward_hook(slow_decoder)
    model.emamba.backbone.register_forward_hook(lambda *_: time.sleep(0.015))
    slowed = measure_costs(model, source_length=12, target_length=6, repeats=5)
    more = {name: slowed[name] - plain[name] for name in plain}
    assert more["encoder"] == pytest.approx(20, rel=0.5)
    assert more["pass"] == pytest.approx(10, rel=0.6)
    assert more["token"] == pytest.approx(2, rel=0.5)
    assert more["emamba"] == pytest.approx(15, rel=0.5)


def test_a_machine_three_times_as_slow_gives_the_same_targets():
    fast, slow = (
        CallCosts.from_table({name: factor * ms for name, ms in TABLE.items()}, 0.04, 100) for factor in (1, 3)
    )
    assert slow.unit_ms == pytest.approx(3 * fast.unit_ms)
    assert (slow.once, slow.token, slow.encoder) == pytest.approx((fast.once, fast.token, fast.encoder))
    delta, gap = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.full((4, 9), 7.0)
    targets = [utility_target(delta, costs.of_call(gap), 0.7, 0.5) for costs in (fast, slow)]
    torch.testing.assert_close(*targets)


def test_a_call_in_milliseconds():
    costs = CallCosts.from_table(TABLE, 0.04, 100)  # 4 calls a sequence, 25 positions each
    assert costs.unit_ms == pytest.approx(3.0 + 25 * 0.2 + 10.0 / 4)
    assert float(costs.of_call(torch.tensor(5.0))) * costs.unit_ms == pytest.approx(3.0 + 5 * 0.2 + 10.0 / 4)
    choice = torch.tensor([[0, 0, 1, 1]])
    assert float(costs.of_sequence(choice, gaps_of(choice))) * costs.unit_ms == pytest.approx(2 * 3 + 4 * 0.2 + 10)


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
