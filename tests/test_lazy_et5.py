# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""ET5 runs only where it is asked: hooks on its encoder and decoder count what `route_trace` says."""

from __future__ import annotations

import pytest
import torch
from mixed_routing import ENDED, ET5, metered, mixed_model, random_targets, row_alone
from tiny_experts import random_batch

LENGTHS = [7, 3, 11, 5]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def mixed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder)


@pytest.fixture
def half_gated(mixed):
    """The same model with a gate that is closed for two of the four sources."""
    batch = random_batch(LENGTHS, seed=1)
    with torch.no_grad():
        gate = mixed(**batch, decoder_input_ids=random_targets(4, 1), use_cache=False).gate_logit
    mixed.config.gate_threshold = float(gate.sort().values[1:3].mean())
    yield mixed, gate > mixed.config.gate_threshold
    mixed.config.gate_threshold = None


def answer(model, batch, **options):
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_counts_of_a_batch_that_routes_differently(mixed, side, use_cache):
    batch = random_batch(LENGTHS, seed=1, side=side)
    eos = int(answer(mixed, batch).sequences[0, 5])
    with metered(mixed) as meter:
        output = answer(mixed, batch, eos_token_id=eos, use_cache=use_cache)
    trace = output.route_trace
    routed = trace.expert == ET5
    assert (routed != routed[0]).any() and (trace.expert == ENDED).any() and (trace.expert == 0).any()
    assert trace.encoder_calls.tolist() == routed.any(1).long().tolist()
    assert sum(meter.encoder_rows) == trace.encoder_calls.sum()
    assert trace.et5_passes.tolist() == routed.sum(1).tolist()
    assert meter.decoder_rows == [n for n in routed.sum(0).tolist() if n]
    assert sum(meter.decoder_tokens) == trace.et5_tokens.sum()


def test_one_row_decodes_each_position_once(mixed):
    """A call catches up exactly what was skipped: alone, a row's positions are those up to its last routed token."""
    batch = row_alone(random_batch(LENGTHS, seed=1), 2)
    trace = answer(mixed, batch).route_trace
    routed = (trace.expert[0] == ET5).nonzero().flatten()
    assert 0 < len(routed) < NEW_TOKENS
    assert trace.et5_tokens.tolist() == [int(routed[-1]) + 1]
    assert trace.gap[0][routed].sum() == routed[-1] + 1


def test_rows_that_share_a_source(mixed):
    """Three answers to a question read it once, whichever of them asks first."""
    batch = random_batch(LENGTHS, seed=1)
    torch.manual_seed(0)
    with metered(mixed) as meter:
        trace = answer(mixed, batch, do_sample=True, num_return_sequences=3).route_trace
    routed = trace.expert == ET5
    assert trace.expert.shape == (12, NEW_TOKENS)
    assert (routed[0:3] != routed[0]).any(), "the answers to one question route alike: nothing is tested"
    by_source = trace.encoder_calls.view(4, 3)
    assert by_source.sum(1).tolist() == routed.view(4, 3 * NEW_TOKENS).any(1).long().tolist()
    first = routed.long().argmax(1).masked_fill(~routed.any(1), NEW_TOKENS).view(4, 3)
    assert (first.gather(1, by_source.argmax(1, keepdim=True)) == first.min(1, keepdim=True).values).all()
    assert sum(meter.encoder_rows) == trace.encoder_calls.sum()
    assert sum(meter.decoder_rows) == trace.et5_passes.sum() == routed.sum()
    assert sum(meter.decoder_tokens) == trace.et5_tokens.sum()


@pytest.mark.parametrize("returned", [1, 3])
def test_beams(mixed, returned):
    """With beams the counts are of the question: calls with any of its beams, positions over all of them."""
    batch = random_batch(LENGTHS, seed=1)
    with metered(mixed) as meter:
        trace = answer(mixed, batch, num_beams=3, num_return_sequences=returned).route_trace
    counts = [trace.encoder_calls, trace.et5_passes, trace.et5_tokens]
    encodings, passes, tokens = (count.view(4, returned) for count in counts)
    for count in (encodings, passes, tokens):
        assert (count == count[:, :1]).all(), "all answers to a question carry its counts"
    assert sum(meter.encoder_rows) == encodings[:, 0].sum() == 4
    assert sum(meter.decoder_sources) == passes[:, 0].sum()
    assert sum(meter.decoder_tokens) == tokens[:, 0].sum()
    assert len(set(meter.decoder_rows)) > 1, "every call took all beams: nothing is tested"


@pytest.mark.parametrize(
    "options",
    [{"routing": "emamba"}, {"expert_budget": 0.0}, {"expert_budget": 0.9 / NEW_TOKENS}],
    ids=["emamba", "no-budget", "less-than-a-token"],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_never_asked(mixed, options, beams):
    batch = random_batch(LENGTHS, seed=1)
    with metered(mixed) as meter:
        trace = answer(mixed, batch, num_beams=beams, **options).route_trace
        if "less" not in str(options) and options.get("expert_budget", 0) == 0:
            mixed(**batch, decoder_input_ids=random_targets(4, 6), use_cache=False, **options)
            mixed(**batch, decoder_input_ids=random_targets(4, 6), use_cache=True, **options)
    assert meter.encoder_rows == meter.decoder_rows == []
    for count in (trace.encoder_calls, trace.et5_passes, trace.et5_tokens):
        assert not count.any()
    assert trace.log_p_et5.isnan().all()


def test_closed_gate(half_gated):
    model, opened = half_gated
    batch = random_batch(LENGTHS, seed=1)
    assert opened.sum() == 2
    with metered(model) as meter:
        trace = answer(model, batch).route_trace
    routed = (trace.expert == ET5).any(1)
    assert routed.tolist() == trace.encoder_calls.bool().tolist() == opened.tolist()
    assert sum(meter.encoder_rows) == 2 and max(meter.decoder_rows) <= 2


@torch.no_grad()
def test_whole_targets(half_gated):
    """Without a cache the rows that ask pay for the whole target, the others nothing."""
    model, opened = half_gated
    batch = random_batch(LENGTHS, seed=1)
    with metered(model) as meter:
        trace = model(**batch, decoder_input_ids=random_targets(4, 8), use_cache=False).route_trace
    assert trace.encoder_calls.tolist() == trace.et5_passes.tolist() == opened.long().tolist()
    assert trace.et5_tokens.tolist() == (8 * opened).tolist()
    assert meter.encoder_rows == meter.decoder_rows == [2] and meter.decoder_tokens == [16]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_encoder_states_of_the_caller(mixed, use_cache):
    """States that the caller has are used and not counted."""
    batch = random_batch(LENGTHS, seed=1)
    ids = random_targets(4, 8)
    states = mixed.et5.encoder(**batch)
    expected = mixed(**batch, decoder_input_ids=ids, routing="et5", use_cache=use_cache)
    with metered(mixed) as meter:
        output = mixed(**batch, decoder_input_ids=ids, routing="et5", use_cache=use_cache, encoder_outputs=states)
    assert meter.encoder_rows == [] and not output.route_trace.encoder_calls.any()
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)


def test_chunks_of_a_prompt(mixed):
    """A decoder prompt is caught up, not spoken: it costs positions and no passes of its own."""
    batch = random_batch(LENGTHS, seed=1)
    prompt = random_targets(4, 6)
    with metered(mixed) as meter:
        output = answer(mixed, batch, decoder_input_ids=prompt)
    trace = output.route_trace
    assert trace.expert.shape == (4, NEW_TOKENS)
    assert sum(meter.decoder_rows) == (trace.expert == ET5).sum() == trace.et5_passes.sum()
    assert sum(meter.decoder_tokens) == trace.et5_tokens.sum()
    assert sum(meter.encoder_rows) == trace.encoder_calls.sum()
