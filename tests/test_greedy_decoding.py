# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The short way of greedy decoding says, chooses and records what transformers' loop does, and steps aside for it."""

from __future__ import annotations

import copy

import pytest
import torch
from mixed_routing import mixed_model, random_targets
from tiny_experts import VOCAB, random_batch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mambaformer.modeling_mambaformer import generation_mambaformer, greedy_decoding
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY

FIELDS = ("expert", "margin", "gap", "log_p_emamba", "log_p_et5", "et5_passes", "et5_tokens", "encoder_calls")
LENGTHS = [9, 4, 12, 6, 7, 3]
compiled = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled library was not built here")


class Unchanged(LogitsProcessor):
    """Changes nothing; with it transformers' loop is run."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores


@pytest.fixture(scope="module")
def model(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder).eval()


@pytest.fixture
def loops(monkeypatch):
    """How often the short way was gone, and its compiled steps were bound."""
    counts = {"short": 0, "compiled": 0}
    decode, bind = greedy_decoding.decode_greedily, greedy_decoding.CompiledSteps.bind

    def counted(*args, **kwargs):
        counts["short"] += 1
        return decode(*args, **kwargs)

    def counted_bind(*args):
        steps = bind(*args)
        counts["compiled"] += steps is not None
        return steps

    monkeypatch.setattr(generation_mambaformer, "decode_greedily", counted)
    monkeypatch.setattr(greedy_decoding.CompiledSteps, "bind", counted_bind)
    return counts


def both_ways(model, loops, batch, **kwargs):
    """The same request by the short way and by transformers' loop."""
    kwargs = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    short = model.generate(**batch, **kwargs)
    assert loops["short"] == 1
    usual = model.generate(**batch, **kwargs, logits_processor=LogitsProcessorList([Unchanged()]))
    assert loops["short"] == 1
    return short, usual


def compared(short, usual) -> None:
    assert torch.equal(short.sequences, usual.sequences)
    for name in FIELDS:
        here, there = short.route_trace[name], usual.route_trace[name]
        assert here.dtype == there.dtype and here.shape == there.shape, name
        torch.testing.assert_close(
            here, there, atol=2e-6, rtol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    here, there = short.past_key_values, usual.past_key_values
    assert torch.equal(here.decoder_ids, there.decoder_ids) and torch.equal(here.ends_at, there.ends_at)
    for name in ("conv_states", "recurrent_states"):
        for one, other in zip(here.emamba.layers, there.emamba.layers, strict=True):
            torch.testing.assert_close(getattr(one, name)[0], getattr(other, name)[0])
    if here.router is not None:
        assert here.router.position == there.router.position
        torch.testing.assert_close(here.router.embedding_sum, there.router.embedding_sum)
        assert torch.equal(here.router.spent, there.router.spent)


@compiled
@pytest.mark.parametrize("routing", ["auto", "emamba"])
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one row", "a batch"])
def test_tokens_choices_and_state_are_those_of_the_usual_loop(model, loops, routing, lengths):
    short, usual = both_ways(model, loops, random_batch(lengths), routing=routing)
    assert loops["compiled"] == 1
    assert routing == "emamba" or 0 < (short.route_trace.expert == 1).sum() < (short.route_trace.expert == 0).sum() * 5
    compared(short, usual)


@compiled
def test_rows_end_with_any_of_the_end_tokens(model, loops):
    batch = random_batch(LENGTHS)
    free = model.generate(**batch, max_new_tokens=16, eos_token_id=[])
    ends = sorted({int(free[0, 4]), int(free[1, 9]), int(free[2, 2])})  # tokens that these answers do reach
    loops["short"] = 0
    short, usual = both_ways(model, loops, batch, eos_token_id=ends, pad_token_id=0)
    assert (short.route_trace.expert == -1).any() and (short.route_trace.expert[:, -1] != -1).any()
    compared(short, usual)


LIMITS = [{"max_new_tokens": 1}, {"max_length": 9}, {"max_new_tokens": 200}]
LIMITS += [{"max_new_tokens": 90, "routing": "emamba"}]


@compiled
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_answers_are_as_long_as_allowed(model, loops, limit):
    short, usual = both_ways(model, loops, random_batch(LENGTHS[:2]), **{"max_new_tokens": None, **limit})
    compared(short, usual)


@compiled
def test_a_beginning_and_a_cap_are_kept(model, loops):
    beginning = random_targets(2, 4)
    more = {"decoder_input_ids": beginning, "expert_budget": 0.2}
    short, usual = both_ways(model, loops, random_batch(LENGTHS[:2]), **more)
    assert torch.equal(short.sequences[:, :4], beginning)
    assert int((short.route_trace.expert == 1).sum(1).max()) <= 3
    compared(short, usual)


@compiled
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_packed_weights_are_read_alike(et5_folder, emamba_folder, loops, weights):
    model = mixed_model(et5_folder, emamba_folder).eval().pack_emamba(weights)
    compared(*both_ways(model, loops, random_batch(LENGTHS)))


@compiled
@pytest.mark.parametrize("routing", ["auto", "emamba"])
def test_a_model_in_bfloat16_is_read_alike(et5_folder, emamba_folder, loops, routing):
    """Also its router's decisions, by hidden states that are rounded, be they rounded in compiled code."""
    model = mixed_model(et5_folder, emamba_folder).eval().to(torch.bfloat16)
    model.router.float()
    compared(*both_ways(model, loops, random_batch(LENGTHS), routing=routing))
    assert loops["compiled"] == 1


def test_without_compiled_steps_the_model_itself_is_called(et5_folder, emamba_folder, loops):
    model = mixed_model(et5_folder, emamba_folder).eval().pack_emamba("off")
    compared(*both_ways(model, loops, random_batch(LENGTHS)))
    assert loops["compiled"] == 0


def test_other_routings_are_as_ever(model, loops):
    for routing in ("et5", "soft"):
        loops["short"] = 0
        short, usual = both_ways(model, loops, random_batch(LENGTHS), routing=routing)
        assert torch.equal(short.sequences, usual.sequences)


def test_a_stream_gets_every_token_as_it_comes(model, loops):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    heard = Heard()
    answer = model.generate(**random_batch(LENGTHS[:1]), max_new_tokens=12, do_sample=False, streamer=heard)
    assert loops["short"] == 1 and heard.ended and heard.tokens == answer[0].tolist()


class Never(StoppingCriteria):
    """Lets every row go on."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


ASKS_MORE = {
    "sampling": {"do_sample": True},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "penalty": {"repetition_penalty": 1.5},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([Never()])},
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("more", ASKS_MORE.values(), ids=ASKS_MORE)
def test_who_asks_for_more_gets_the_usual_loop(model, loops, more):
    answer = model.generate(**random_batch(LENGTHS[:1]), **{"max_new_tokens": 6, "do_sample": False, **more})
    assert loops["short"] == 0
    assert len(answer["sequences"] if isinstance(answer, dict) else answer) == 1


def test_who_listens_to_the_model_hears_every_call(model, loops):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        model.generate(**random_batch(LENGTHS[:1]), max_new_tokens=6, min_new_tokens=None, do_sample=False)
    finally:
        handle.remove()
    assert loops["short"] == 0 and calls


def test_a_subclass_is_asked_for_every_token(model, loops):
    class Own(type(model)):
        def _incremental(self, *args):
            positions.append(args[1].shape[1])
            return super()._incremental(*args)

    positions, own = [], copy.copy(model)
    own.__class__ = Own
    answer = own.generate(**random_batch(LENGTHS[:1]), max_new_tokens=6, do_sample=False)
    assert loops["short"] == 0 and len(positions) == answer.shape[1] - 1
    assert torch.equal(answer, model.generate(**random_batch(LENGTHS[:1]), max_new_tokens=6, do_sample=False))


def test_weights_changed_between_answers_are_read(et5_folder, emamba_folder, loops):
    model = mixed_model(et5_folder, emamba_folder).eval()
    batch = random_batch(LENGTHS[:2])
    before = model.generate(**batch, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        model.emamba.get_output_embeddings().weight.neg_()
    loops["short"] = 0
    short, usual = both_ways(model, loops, batch, max_new_tokens=8)
    compared(short, usual)
    assert not torch.equal(short.sequences, before)
    assert int(short.sequences.max()) < VOCAB
