# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The router: its features, its past, causality, and the budget that holds whatever it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from mixed_routing import ENDED, ET5, mixed_model, random_targets
from tiny_experts import VOCAB, random_batch

from mambaformer.configuration.configuration_mambaformer import MambaFormerConfig
from mambaformer.modeling_mambaformer.cache_mambaformer import RoutingRequest
from mambaformer.modeling_mambaformer.router import RouterState, TokenRouter, past_of
from mambaformer.modeling_mambaformer.router_features import FEATURE_GROUPS

LENGTHS = [7, 3, 11, 5]
GROUPS = ("complexity", "length", "domain", "past")
SUBSETS = [[], *([name] for name in GROUPS), *itertools.combinations(GROUPS, 3), GROUPS]


@pytest.fixture(scope="module")
def mixed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return random_batch(LENGTHS, seed=1)


@torch.no_grad()
def margins(model, batch, ids, **options) -> torch.Tensor:
    return model(**batch, decoder_input_ids=ids, use_cache=False, routing="soft", **options).margin


@torch.no_grad()
def by_steps(model, batch, ids, chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins and choices of `ids` read in chunks onto a cache."""
    cache, outputs = None, []
    for part in ids.split(chunks, dim=1):
        given = batch if cache is None else {}
        outputs.append(model(**given, decoder_input_ids=part, past_key_values=cache, use_cache=True))
        cache = outputs[-1].past_key_values
    return tuple(torch.cat([output.route_trace[name] for output in outputs], 1) for name in ("margin", "expert"))


@pytest.mark.parametrize("groups", SUBSETS, ids=lambda groups: "+".join(groups) or "none")
def test_each_feature_group_can_be_switched_off(et5_folder, emamba_folder, batch, groups):
    """What a group is computed from moves the margins exactly where the group is on."""
    model = mixed_model(et5_folder, emamba_folder, router_features=list(groups))
    ids, past = random_targets(4, 6), torch.zeros(4, 6, dtype=torch.long)
    before = margins(model, batch, ids, route_teacher=past)
    assert before.shape == (4, 6) and before.isfinite().all()

    def changes() -> bool:
        return not torch.equal(margins(model, batch, ids, route_teacher=past), before)

    assert ("past" in groups) != torch.equal(margins(model, batch, ids, route_teacher=past + 1), before)
    model.config.max_source_length = 33
    assert changes() == ("length" in groups)
    model.config.max_source_length = 512
    assert not changes()
    keep = model.router.domain_weight.clone()
    model.router.domain_weight.add_(torch.randn(VOCAB))
    assert changes() == ("domain" in groups)
    model.router.domain_weight.copy_(keep)
    assert not changes()
    model.router.hidden_proj.weight.data.add_(1)
    assert changes() == ("complexity" in groups)


def test_every_group_is_offered():
    assert tuple(FEATURE_GROUPS) == GROUPS
    assert MambaFormerConfig().router_features == list(GROUPS)


@pytest.mark.parametrize("cap", [None, 3])
def test_past_of_equals_the_unrolled_choice(mixed, cap):
    """What `past_of` says at once is what `choose` saw step by step, from any state and with ended rows."""
    generator = torch.Generator().manual_seed(4)
    rows, length = 6, 20
    encoded = torch.randn(rows, length, mixed.config.router_hidden_size, generator=generator)
    state = RouterState(
        previous=torch.tensor([0.0, 1, 0, 0, 1, 0]),
        since=torch.tensor([0, 0, 3, 7, 0, 1]),
        spent=torch.zeros(rows, dtype=torch.long),
        domain_sum=torch.zeros(rows),
        embedding_sum=torch.zeros(rows, 4),
        seen=torch.ones(rows, dtype=torch.long),
    )
    threshold = float(mixed.router.margin(encoded, torch.zeros(rows, length), torch.ones(rows, length)).median())
    ended = torch.zeros(rows, length, dtype=torch.bool)
    ended[2, 12:] = True
    allowed = torch.tensor([True, True, True, True, False, True])
    expert, gap, _, after = mixed.router.choose(encoded, state, threshold, cap, allowed, ended)
    assert {0, 1} <= set(expert.flatten().tolist())
    assert torch.equal(expert == ENDED, ended)
    previous, gap_at_once = past_of(expert, state)
    assert torch.equal(gap_at_once, gap)
    assert torch.equal(previous[:, 1:].bool(), expert[:, :-1] == ET5)
    assert torch.equal(previous[:, 0], state.previous)
    seen = mixed.router.margin(encoded, previous, gap_at_once) > threshold
    free = allowed[:, None] & ~ended
    if cap is None:
        assert torch.equal((expert == ET5), seen & free)
    else:
        spent_before = (expert == ET5).cumsum(1) - (expert == ET5).long()
        assert torch.equal((expert == ET5), seen & free & (spent_before < cap))
        assert after.spent.max() == cap
    assert torch.equal(after.spent, (expert == ET5).sum(1))
    assert not expert[4].any()
    last = (expert == ET5).long().flip(1).argmax(1)  # positions since the last choice of ET5
    assert torch.equal(after.since[0], last[0]) and (after.previous == (expert[:, -1] == ET5)).all()
    # and in two parts
    first, first_gap, _, middle = mixed.router.choose(encoded[:, :7], state, threshold, cap, allowed, ended[:, :7])
    second, second_gap, _, _ = mixed.router.choose(encoded[:, 7:], middle, threshold, cap, allowed, ended[:, 7:])
    assert torch.equal(torch.cat([first, second], 1), expert)
    assert torch.equal(torch.cat([first_gap, second_gap], 1), gap)


@pytest.mark.parametrize("chunks", [1, 4, [1, 5, 2, 4]])
def test_steps_equal_the_whole_sequence(mixed, batch, chunks):
    ids = random_targets(4, 12)
    with torch.no_grad():
        whole = mixed(**batch, decoder_input_ids=ids, use_cache=False).route_trace
    margin, expert = by_steps(mixed, batch, ids, chunks)
    assert 0.2 < (whole.expert == ET5).float().mean() < 0.8
    torch.testing.assert_close(margin, whole.margin, atol=1e-5, rtol=1e-5)
    assert torch.equal(expert, whole.expert)


def test_causality(mixed, batch):
    """A future token changes no earlier margin; an earlier one changes the later."""
    ids = random_targets(4, 12)
    other = ids.clone()
    other[:, 7] = (ids[:, 7] + 11) % VOCAB
    before, after = margins(mixed, batch, ids), margins(mixed, batch, other)
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=0)
    assert ((after - before)[:, 7:].abs() > 1e-3).any(1).all()


@torch.no_grad()
def test_margins_differ_between_sources(mixed):
    """The source is seen: another question, the same answer so far, another margin."""
    ids = random_targets(1, 6).expand(4, -1)
    margin = margins(mixed, random_batch([6, 6, 6, 6], seed=2), ids)
    assert margin.std(0).min() > 1e-3


@torch.no_grad()
def test_reorder(mixed):
    """A reordered cache goes on as the reordered rows would."""
    batch = random_batch([6], seed=2)
    batch = {name: value.repeat(4, 1) for name, value in batch.items()}  # four beams of one question
    ids = random_targets(4, 10)
    order = torch.tensor([2, 0, 2, 1])
    cache = mixed(**batch, decoder_input_ids=ids[:, :6], use_cache=True).past_key_values
    cache.reorder_cache(order)
    output = mixed(decoder_input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
    mixture = torch.cat([ids[order, :6], ids[:, 6:]], dim=1)
    whole = mixed(**batch, decoder_input_ids=mixture, use_cache=False)
    torch.testing.assert_close(output.logits, whole.logits[:, 6:], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.margin, whole.margin[:, 6:], atol=1e-5, rtol=1e-5)
    assert torch.equal(output.route_trace.expert, whole.route_trace.expert[:, 6:])


@pytest.mark.parametrize("threshold", [float("-inf"), None], ids=["always-et5", "mixed"])
@pytest.mark.parametrize(("budget", "beams"), [(0.0, 1), (0.05, 1), (0.29, 1), (0.29, 2), (0.99, 1), (1.0, 2)])
def test_budget_caps_any_router(mixed, batch, budget, beams, threshold):
    """At most floor(budget x max_new_tokens) tokens a row, even of a router that always says ET5."""
    keep, new_tokens = mixed.config.router_threshold, 20
    mixed.config.router_threshold = keep if threshold is None else threshold
    try:
        trace = mixed.generate(
            **batch,
            max_new_tokens=new_tokens,
            num_beams=beams,
            expert_budget=budget,
            eos_token_id=None,
            return_dict_in_generate=True,
        ).route_trace
    finally:
        mixed.config.router_threshold = keep
    spoken = (trace.expert == ET5).sum(1)
    cap = {0.0: 0, 0.05: 1, 0.29: 5, 0.99: 19, 1.0: new_tokens}[budget]
    assert (spoken <= cap).all()
    if threshold is not None or budget == 1.0:
        assert (spoken == cap).all()
    if cap == 0:
        assert not trace.encoder_calls.any()


def test_prompt_does_not_spend_the_budget(mixed, batch):
    """Tokens that the caller wrote cost ET5's budget nothing."""
    keep, mixed.config.router_threshold = mixed.config.router_threshold, float("-inf")
    try:
        for use_cache in (True, False):
            trace = mixed.generate(
                **batch,
                decoder_input_ids=random_targets(4, 9),
                max_new_tokens=8,
                expert_budget=0.5,
                use_cache=use_cache,
                return_dict_in_generate=True,
            ).route_trace
            assert (trace.expert[:, :4] == ET5).all() and not (trace.expert[:, 4:] == ET5).any()
    finally:
        mixed.config.router_threshold = keep


def test_budget_is_per_call(mixed, batch):
    """A call's budget moves the threshold along the calibrated table; without one the calibrated threshold holds."""
    config = MambaFormerConfig(
        router_threshold=0.4, expert_budget=0.1, threshold_table=[[0.05, 2.0], [0.1, 0.4], [0.5, -1.0]]
    )
    expected = {0.0: 2.0, 0.05: 2.0, 0.075: 1.2, 0.1: 0.4, 0.3: -0.3, 0.5: -1.0, 0.9: -1.0, 1.0: float("-inf")}
    for budget, threshold in expected.items():
        assert config.threshold_for(budget) == pytest.approx(threshold)
        assert RoutingRequest.build(config, expert_budget=budget).threshold == pytest.approx(threshold)
    assert RoutingRequest.build(config).threshold == 0.4
    assert RoutingRequest.build(config, max_new_tokens=100).cap == 10
    assert RoutingRequest.build(config, expert_budget=0.29, max_new_tokens=100).cap == 29
    assert RoutingRequest.build(config, expert_budget=1.0, max_new_tokens=100).cap is None
    assert RoutingRequest.build(config, expert_budget=0.0).cap == 0
    assert MambaFormerConfig(router_threshold=0.7).threshold_for(0.3) == 0.7

    table = margins(mixed, batch, random_targets(4, 12)).flatten().sort().values
    mixed.config.threshold_table = [[0.1, float(table[-4])], [0.9, float(table[4])]]
    try:
        shares = []
        for budget in (0.1, 0.5, 0.9):
            output = mixed.generate(
                **batch, max_new_tokens=20, expert_budget=budget, eos_token_id=None, return_dict_in_generate=True
            )
            shares.append(output.route_trace.et5_share().mean())
    finally:
        mixed.config.threshold_table = None
    assert shares[0] < shares[1] < shares[2]


def test_unknown_feature_group():
    with pytest.raises(ValueError, match=r"\['telepathy'\] do not exist: choose from"):
        TokenRouter(MambaFormerConfig(router_features=["telepathy"]))
