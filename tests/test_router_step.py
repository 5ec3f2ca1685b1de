# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled routing step says what PyTorch's operations say, and steps aside where it must."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from mixed_routing import ENDED, ET5, mixed_model, random_targets
from tiny_experts import VOCAB, random_batch

from mambaformer.modeling_mambaformer import routing_pass
from mambaformer.modeling_mambaformer.cache_mambaformer import RoutingRequest
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY
from mambaformer.modeling_mambaformer.router import RouterState
from mambaformer.modeling_mambaformer.router_features import FEATURE_GROUPS, FeatureGroup, complexity
from mambaformer.modeling_mambaformer.router_step import bind_router, likeliest
from mambaformer.modeling_mambaformer.routing_pass import choose, log_probability

pytestmark = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled library was not built here")
GROUPS = ("complexity", "length", "domain", "past")
ROWS = 5


def random_state(dim: int, seed: int = 0) -> RouterState:
    generator = torch.Generator().manual_seed(seed)
    return RouterState(
        previous=torch.tensor([0.0, 1, 0, 0, 1]),
        since=torch.tensor([2, 0, 3, 7, 0]),
        spent=torch.tensor([1, 2, 0, 0, 3]),
        domain_sum=torch.randn(ROWS, generator=generator),
        embedding_sum=torch.randn(ROWS, dim, generator=generator),
        seen=torch.tensor([9, 4, 6, 12, 5]),
        position=7,
    )


@torch.no_grad()
def decide(model, length: int, cap: int | None = None, first_new: int = 0, scale: float = 3.0, **gate):
    """Choices for random hidden states and logits; the same ones at each call."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, length, config.emamba.hidden_size, generator=generator)
    logits = scale * torch.randn(ROWS, length, VOCAB, generator=generator)
    ended = torch.zeros(ROWS, length, dtype=torch.bool)
    ended[2, length // 2 :] = True
    request = RoutingRequest("auto", config.router_threshold, gate.get("threshold"), cap, first_new)
    scalars = torch.rand(2, ROWS, generator=generator)
    state, gate_logit = random_state(config.emamba.hidden_size), torch.tensor([0.0, 1, 2, -1, 3])
    return choose(
        model, request, random_targets(ROWS, length), ended, hidden, state, tuple(scalars), gate_logit,
        emamba_logits=logits,
    )  # fmt: skip


@pytest.fixture
def by_pytorch(monkeypatch):
    """Switch the compiled step off, from the call on."""
    return lambda: monkeypatch.setattr(routing_pass, "bind_router", lambda *_: None)


def compared(here, there) -> None:
    assert here.log_top is not None and there.log_top is None  # each was made by its own code
    assert torch.equal(here.expert, there.expert) and torch.equal(here.asked, there.asked)
    known = here.expert != ENDED
    assert torch.equal(here.gap, there.gap)
    torch.testing.assert_close(here.margin, there.margin, atol=2e-6, rtol=2e-6, equal_nan=True)
    torch.testing.assert_close(here.log_top[known], there.emamba_logits.log_softmax(-1).amax(-1)[known])
    for field in fields(RouterState):
        torch.testing.assert_close(getattr(here.state, field.name), getattr(there.state, field.name))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("groups", [[], *itertools.combinations(GROUPS, 2), GROUPS, GROUPS[::-1]], ids="+".join)
def test_choices_margins_and_state_are_those_of_pytorch(et5_folder, emamba_folder, by_pytorch, groups, length):
    model = mixed_model(et5_folder, emamba_folder, router_features=list(groups))
    here = decide(model, length)
    by_pytorch()
    compared(here, decide(model, length))


@pytest.mark.parametrize("gate", [None, 0.5])
@pytest.mark.parametrize("first_new", [0, 9])
@pytest.mark.parametrize("cap", [None, 0, 3])
def test_cap_gate_and_prompt(et5_folder, emamba_folder, by_pytorch, cap, first_new, gate):
    model = mixed_model(et5_folder, emamba_folder)
    model.config.router_threshold = -0.5
    here = decide(model, 6, cap, first_new, threshold=gate)
    assert (here.expert == ET5).any() == (cap != 0)
    by_pytorch()
    compared(here, decide(model, 6, cap, first_new, threshold=gate))


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_flat_and_certain_distributions(et5_folder, emamba_folder, by_pytorch, scale):
    model = mixed_model(et5_folder, emamba_folder)
    here = decide(model, 4, scale=scale)
    by_pytorch()
    compared(here, decide(model, 4, scale=scale))


def test_states_given_stay_as_they_are(et5_folder, emamba_folder):
    """Look-ahead and beams go back to earlier states: a step makes new ones."""
    model = mixed_model(et5_folder, emamba_folder)
    state = random_state(model.config.emamba.hidden_size)
    with torch.no_grad():
        ids, rows = random_targets(ROWS, 2), torch.zeros(ROWS)
        hidden, logits = torch.randn(ROWS, 2, model.config.emamba.hidden_size), torch.randn(ROWS, 2, VOCAB)
        allowed, ended = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, 2, dtype=torch.bool)
        embeddings = model.emamba.get_input_embeddings()
        step = bind_router(
            model.router, embeddings, ids, hidden, logits, state, (rows, rows), allowed, ended, 0.0, None, 0
        )
        step.run()
    before = random_state(model.config.emamba.hidden_size)
    for field in fields(RouterState):
        kept, made = getattr(state, field.name), getattr(before, field.name)
        assert torch.equal(kept, made) if torch.is_tensor(kept) else kept == made
    assert step.state.position == state.position + 2 and torch.equal(step.state.seen, state.seen + 2)


def test_it_steps_aside(et5_folder, emamba_folder, monkeypatch):
    """Gradients, training, hooks, another precision, another feature and another module are PyTorch's work."""
    model = mixed_model(et5_folder, emamba_folder)
    assert decide(model, 2).log_top is not None
    hook = model.router.score.register_forward_hook(lambda *_: None)
    assert decide(model, 2).log_top is None
    hook.remove()
    assert decide(model.train(), 2).log_top is None
    model.eval()
    model.router.bfloat16()
    assert decide(model, 2).log_top is None
    model.router.float()
    assert decide(model, 2).log_top is not None
    twice = FeatureGroup(FEATURE_GROUPS["complexity"].width, lambda inputs: 2 * complexity(inputs))
    monkeypatch.setitem(FEATURE_GROUPS, "complexity", twice)
    assert decide(model, 2).log_top is None


def test_gradients_reach_the_router(et5_folder, emamba_folder):
    model = mixed_model(et5_folder, emamba_folder)
    output = model(**random_batch([5, 3]), decoder_input_ids=random_targets(2, 4), routing="auto", use_cache=False)
    assert output.margin.requires_grad


def test_generation_is_the_same_without_it(et5_folder, emamba_folder, by_pytorch):
    model, batch = mixed_model(et5_folder, emamba_folder), random_batch([9, 4, 12])
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    here = model.generate(**batch, **options)
    by_pytorch()
    there = model.generate(**batch, **options)
    assert torch.equal(here.sequences, there.sequences)
    assert {0, 1} <= set(here.route_trace.expert.flatten().tolist())
    for name, value in here.route_trace.items():
        torch.testing.assert_close(value, there.route_trace[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_an_id_outside_the_vocabulary_is_named(et5_folder, emamba_folder):
    model = mixed_model(et5_folder, emamba_folder)
    model.emamba.resize_token_embeddings(VOCAB + 8)  # the router still knows VOCAB tokens
    state = random_state(model.config.emamba.hidden_size)
    ids = torch.full((ROWS, 1), VOCAB + 2)
    hidden, rows = torch.randn(ROWS, 1, model.config.emamba.hidden_size), torch.zeros(ROWS)
    ended = torch.zeros(ROWS, 1, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(IndexError, match=str(VOCAB + 2)):
        bind_router(
            model.router, model.emamba.get_input_embeddings(), ids, hidden, torch.randn(ROWS, 1, VOCAB), state,
            (rows, rows), ended[:, 0], ended, 0.0, None, 0,
        ).run()  # fmt: skip


@pytest.mark.parametrize("seen", ["whole", "strided", "double"])
@torch.no_grad()
def test_log_probabilities_are_those_of_pytorch(seen):
    """Of any ids, in compiled code or where it does not serve; NaN where a logit is, or nobody was asked."""
    logits = 4 * torch.randn(3, 2, 8003, generator=torch.Generator().manual_seed(0))
    logits[1, 1, 5] = float("nan")
    logits = {"whole": logits, "strided": logits.repeat(1, 1, 2)[..., :8003], "double": logits.double()}[seen]
    ids = torch.cat([logits.argmax(-1, keepdim=True)[:, :1], torch.full((3, 1, 1), 17)], dim=1)  # (3, 2, 1)
    known = torch.ones(3, 2, dtype=torch.bool)
    known[2] = False
    exact = logits.double().log_softmax(-1).gather(-1, ids).squeeze(-1).masked_fill(~known, float("nan"))
    assert (likeliest(logits) is None) == (seen != "whole")
    found = log_probability(logits, ids, known)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5, equal_nan=True)
