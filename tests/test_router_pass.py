# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The router's choices over whole answers at once are those that it makes one after another."""

from __future__ import annotations

import pytest
import torch

from mambaformer.trainer import router_pass
from mambaformer.trainer.router_pass import read_answers, unroll


@pytest.fixture
def judged(model):
    """A router whose past matters much, what it sees of 8 answers of 40 tokens, and their ends."""
    generator = torch.Generator().manual_seed(0)
    ids, answers = (torch.randint(3, 96, (8, size), generator=generator) for size in (9, 40))
    with torch.no_grad():
        model.router.past_proj.weight.mul_(6)
    reading = read_answers(model, ids, torch.ones_like(ids), answers)
    said = router_pass.judge(model, reading, answers, 0.0)
    ended = torch.arange(40) >= torch.tensor([40, 40, 1, 17, 0, 33, 40, 5])[:, None]
    return model, said.encoded.detach(), said.state, ended, said.margin.detach()


@pytest.mark.parametrize("rounds", [router_pass.ROUNDS, 2, 0])
def test_choices_at_once_are_those_one_after_another(judged, monkeypatch, rounds):
    monkeypatch.setattr(router_pass, "ROUNDS", rounds)
    model, encoded, state, ended, margin = judged
    allowed = torch.tensor([True, False, True, True, True, True, True, False])
    shares = []
    for threshold in torch.quantile(margin, torch.tensor([0.02, 0.2, 0.5, 0.7, 0.9, 0.98])).tolist():
        expert, gap = unroll(model, encoded, state, threshold, ended, allowed)
        wanted, gaps, _, _ = model.router.choose(encoded, state, threshold, None, allowed, ended)
        assert torch.equal(expert, wanted) and torch.equal(gap, gaps)
        shares.append(float((expert == 1).float().mean()))
    assert shares[0] > 0.3 > 0.1 > shares[-1]
