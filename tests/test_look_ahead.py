# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Look-ahead decoding: tokens and choices of plain decoding, whatever is proposed, and fewer passes for them."""

from __future__ import annotations

import copy
import random
from array import array

import pytest
import torch
from mixed_routing import ET5, mixed_model, random_targets, row_alone
from taught_heads import teach_answers
from tiny_experts import VOCAB, random_batch, tiny_emamba
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mambaformer.modeling_mambaformer import draft_weights, greedy_decoding, look_ahead, state_log
from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder
from mambaformer.modeling_mambaformer.greedy_run import GreedyRun
from mambaformer.modeling_mambaformer.look_ahead import LookAheadCounts, LookupRules, continuation
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.state_log import StateLog

pytestmark = pytest.mark.skipif(not state_log.can_log(), reason="the compiled decoding step is not built")
FEW = [1, 5, 6, 7, 8, 9]  # with so few tokens to choose from, texts repeat themselves
FORMATS = ("float32", "bfloat16", "int8")
SEEDS = range(6)


@pytest.fixture(scope="module")
def models(et5_folder, emamba_folder):
    """Models that differ in their routers, the tokens left to each being those of `FEW`."""
    return [mixed_model(et5_folder, emamba_folder, seed=seed) for seed in (3, 4, 5)]


def question(seed: int, length: int = 24) -> dict[str, torch.Tensor]:
    """One source of a few different tokens, so that much of it was said before."""
    ids = torch.randint(5, 10, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, -1] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer(model, source, width: int, **options):
    asked = {"max_new_tokens": 24, "suppress_tokens": [x for x in range(VOCAB) if x not in FEW], "output_logits": True}
    torch.manual_seed(0)
    return model.generate(**source, **asked | options, look_ahead=width, return_dict_in_generate=True)


def states(output) -> list[torch.Tensor]:
    """All that EMamba and the router know at the end."""
    cache = output.past_key_values
    kept = [x for layer in cache.emamba.layers for x in (layer.conv_states[0], layer.recurrent_states[0])]
    router = cache.router
    return [*kept, router.previous, router.since, router.spent, router.domain_sum, router.embedding_sum, router.seen]


def check_same(found, plain) -> LookAheadCounts:
    """To the bit: tokens, logits, choices, margins, costs and states."""
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(x, y) for x, y in zip(found.logits or (), plain.logits or (), strict=True))
    mine, theirs = found.route_trace, plain.route_trace
    for name in ("expert", "gap", "et5_passes", "et5_tokens", "encoder_calls"):
        assert torch.equal(mine[name], theirs[name]), name
    for name in ("margin", "log_p_emamba", "log_p_et5"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(x, y) for x, y in zip(states(found), states(plain), strict=True))
    assert found.past_key_values.router.position == plain.past_key_values.router.position
    assert "look_ahead" not in plain
    return found.look_ahead


ROUTES = {
    "router": {},
    "capped": {"expert_budget": 0.15},
    "emamba": {"routing": "emamba"},
    "no_end": {"eos_token_id": None},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "penalised": {"repetition_penalty": 1.2},
}


@pytest.mark.parametrize("route", ROUTES)
def test_as_plain_decoding(models, route, monkeypatch):
    monkeypatch.setattr(look_ahead, "COPIED", look_ahead.SHORTEST)  # also much that is wrong is proposed
    total, chosen, ended = LookAheadCounts(), 0, 0
    for seed in SEEDS:
        model, source = models[seed % len(models)], question(seed)
        plain = answer(model, source, 0, **ROUTES[route])
        counts = check_same(answer(model, source, 1 + 3 * seed, **ROUTES[route]), plain)
        assert counts.off is None and counts.accepted <= counts.proposed
        total.passes += counts.passes
        total.proposed += counts.proposed
        total.accepted += counts.accepted
        chosen += int((plain.route_trace.expert == ET5).sum())
        ended += plain.sequences.shape[1] < 25
    assert total.proposed > total.accepted > 10 and total.passes < total.proposed
    assert (chosen > 0) == (route != "emamba") and (ended > 0) == (route != "no_end")


PLAIN_GREEDY = {
    "router": {},
    "capped": {"expert_budget": 0.15},
    "emamba": {"routing": "emamba"},
    "ends": {"eos_token_id": [1, *range(20, 50)]},
    "one token": {"max_new_tokens": 1},
    "prompt": {"decoder_input_ids": torch.tensor([[0, 6, 7, 6]])},
}


@pytest.mark.parametrize("route", PLAIN_GREEDY)
@pytest.mark.parametrize("kind", ["float32", "int8", "EMamba in bfloat16"])
def test_plain_greedy_answers_take_the_short_loop(models, route, kind, monkeypatch):
    """Which neither asks for logits nor suppresses tokens. The text proposes what is wrong, heads what is right."""
    monkeypatch.setattr(draft_weights, "LIKELY", 0.1)
    monkeypatch.setattr(draft_weights, "last_cache", lambda: 0)
    calls, run = [], GreedyRun.run
    monkeypatch.setattr(GreedyRun, "run", lambda self, *given: calls.append(1) or run(self, *given))
    asked = {"max_new_tokens": 40, "eos_token_id": None, "return_dict_in_generate": True} | PLAIN_GREEDY[route]
    total, asked_et5 = LookAheadCounts(), 0
    for seed, given in enumerate(models):
        model = copy.deepcopy(given)
        if kind in FORMATS:
            model.pack_emamba(kind)
        else:
            model.emamba.to(torch.bfloat16)
        plain = model.generate(**question(seed), **asked)
        if plain.sequences.shape[1] > 2:
            teach_answers(model, [(question(seed)["input_ids"], plain.sequences)])
        for width in (1, 5):
            counts = check_same(model.generate(**question(seed), **asked, look_ahead=width), plain)
            for name in ("passes", "proposed", "accepted"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
        asked_et5 += int((plain.route_trace.expert == ET5).sum())
    assert bool(calls) is (route != "one token")
    assert total.proposed > total.accepted > 10 or route in ("one token", "ends")
    assert asked_et5 or route in ("emamba", "one token")


@pytest.mark.parametrize("routing", ["auto", "emamba"])
def test_no_place_to_propose_is_passed_over(models, routing, monkeypatch):
    """Where several tokens are read in a call, it ends at each place at which single ones would have proposed."""
    monkeypatch.setattr(draft_weights, "last_cache", lambda: 0)
    asked = {"max_new_tokens": 60, "eos_token_id": None, "return_dict_in_generate": True, "routing": routing}
    calls, run = [], GreedyRun.run
    monkeypatch.setattr(GreedyRun, "run", lambda self, *given: calls.append(1) or run(self, *given))
    counts: dict[int, list[dict]] = {}
    for at_once in (32, 1):
        for name in ("FIRST", "MOST"):
            monkeypatch.setattr(greedy_decoding, name, at_once)
        found = [model.generate(**question(seed), **asked, look_ahead=3) for seed, model in enumerate(models)]
        counts[at_once] = [{"calls": len(calls)}, *(vars(output.look_ahead) for output in found)]
        calls.clear()
    assert counts[1][1:] == counts[32][1:] and counts[32][0]["calls"] < counts[1][0]["calls"]
    assert sum(count["proposed"] for count in counts[1][1:]) > 4


@pytest.mark.parametrize("cache", [0, 2**40])
def test_only_copies_are_proposed_where_the_cache_holds_the_weights(models, cache, monkeypatch):
    monkeypatch.setattr(draft_weights, "last_cache", lambda: cache)
    monkeypatch.setattr(look_ahead, "COPIED", 100)  # no passage is as long
    asked = {"max_new_tokens": 40, "eos_token_id": None, "return_dict_in_generate": True, "look_ahead": 3}
    found = [model.generate(**question(seed), **asked).look_ahead for seed, model in enumerate(models)]
    assert bool(sum(counts.proposed for counts in found)) == (cache == 0)


@pytest.mark.parametrize("opens", [True, False])
def test_gate(models, opens):
    """An open gate is no gate; behind a closed one, nothing is ever in doubt."""
    model = models[0]
    model.config.gate_threshold = -1e9 if opens else 1e9
    try:
        plain = answer(model, question(1), 0)
        counts = check_same(answer(model, question(1), 5), plain)
    finally:
        model.config.gate_threshold = None
    assert counts.accepted and bool((plain.route_trace.expert == ET5).any()) == opens


@pytest.mark.parametrize("merger", ["mix", "complement"])
def test_mergers(models, merger):
    model = models[1]
    model.config.merger, before = merger, model.config.merger
    try:
        check_same(answer(model, question(2), 4), answer(model, question(2), 0))
    finally:
        model.config.merger = before


def test_a_margin_at_the_threshold(models):
    """A threshold at an answer's largest margin asks ET5 nowhere, one just below it there; decoded either way."""
    model = models[0]
    before = model.config.router_threshold
    try:
        for seed in range(4):
            source, chosen = question(seed), []
            model.config.router_threshold = 1e9
            largest = answer(model, source, 0).route_trace.margin.max()
            for threshold in (largest, largest.nextafter(torch.tensor(-1e9))):
                model.config.router_threshold = float(threshold)
                plain = answer(model, source, 0)
                check_same(answer(model, source, 6), plain)
                chosen.append(int((plain.route_trace.expert == ET5).sum()))
            assert chosen[0] == 0 < chosen[1]
    finally:
        model.config.router_threshold = before


def test_every_length(models):
    """The longest answer may end anywhere within what is proposed, and nothing is proposed beyond it."""
    for length in range(1, 11):
        plain = answer(models[0], question(5), 0, max_new_tokens=length, eos_token_id=None)
        counts = check_same(answer(models[0], question(5), 8, max_new_tokens=length, eos_token_id=None), plain)
        assert counts.proposed == 0 if length < 3 else counts.proposed < 8 * length


class EndsAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == 7


def test_ends_within_a_proposal(models):
    """An end that only a criterion of the caller knows, and so is proposed, and read beyond."""
    ended = 0
    for seed in SEEDS:
        options = {"stopping_criteria": [EndsAt()], "eos_token_id": None}
        plain = answer(models[seed % 3], question(seed), 0, **options)
        check_same(answer(models[seed % 3], question(seed), 6, **options), plain)
        ended += 5 < plain.sequences.shape[1] < 25
    assert ended


def test_prompts_and_streams(models):
    class Collected(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append(-1)

    prompt = question(7, 6)["input_ids"]
    prompt[0, 0] = 0
    for options in ({"decoder_input_ids": prompt}, {"decoder_input_ids": prompt, "prefill_chunk_size": 1}):
        streams = Collected(), Collected()
        plain = answer(models[2], question(6), 0, streamer=streams[0], **options)
        check_same(answer(models[2], question(6), 3, streamer=streams[1], **options), plain)
        assert streams[0].tokens == streams[1].tokens


@pytest.mark.parametrize("weight_format", FORMATS)
def test_formats(models, weight_format):
    model = copy.deepcopy(models[0]).pack_emamba(weight_format)
    assert check_same(answer(model, question(8), 4), answer(model, question(8), 0)).accepted


def test_a_model_in_bfloat16(models):
    """Its router is asked one position at a time, by PyTorch."""
    model = copy.deepcopy(models[0]).to(torch.bfloat16)
    check_same(answer(model, question(9), 4), answer(model, question(9), 0))


OFF = {
    "batch": ({}, "one row"),
    "beams": ({"num_beams": 2}, "one row"),
    "returned": ({"num_return_sequences": 2, "do_sample": True}, "one row"),
    "et5": ({"routing": "et5"}, "'et5'"),
    "soft": ({"routing": "soft"}, "'soft'"),
    "uncached": ({"use_cache": False}, "use_cache"),
}


@pytest.mark.parametrize("case", OFF)
def test_where_it_is_off(models, case):
    options, reason = OFF[case]
    batch = random_batch([7, 3, 11], seed=1)
    batch = batch if case == "batch" else row_alone(batch, 2)
    plain, found = (answer(models[0], batch, width, max_new_tokens=12, **options) for width in (0, 4))
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.route_trace.expert, plain.route_trace.expert)
    assert found.look_ahead.passes == 0 and reason in found.look_ahead.off


def test_off_without_the_compiled_step(models, monkeypatch):
    model = copy.deepcopy(models[0]).pack_emamba("off")
    found, plain = answer(model, question(1), 4), answer(model, question(1), 0)
    assert "does not apply" in check_same(found, plain).off and found.look_ahead.passes == 0
    monkeypatch.setattr(look_ahead, "can_log", lambda: False)
    assert "install" in check_same(answer(models[0], question(1), 4), answer(models[0], question(1), 0)).off


@pytest.mark.parametrize("value", [-1, 1.5, True, "4"])
def test_bad_values(models, value):
    with pytest.raises(ValueError, match="look_ahead is"):
        models[0].generate(**question(0), look_ahead=value)
    with pytest.raises(ValueError, match="look_forward"):
        models[0].generate(**question(0), look_forward=2)


def test_nothing_is_asked_by_default(models):
    assert answer(models[0], question(0), None).past_key_values.look_ahead is None


def proposed(text: str, width: int) -> str:
    """What a text of characters may go on with, by the rules of decoding."""
    rules = LookupRules(look_ahead.SHORTEST, look_ahead.LONGEST, look_ahead.COPIED)
    return "".join(map(chr, continuation(array("q", map(ord, text)), width, rules)))


def test_what_is_proposed():
    assert proposed("the cats sat. the cats", 4) == " sat"
    assert proposed("xab1 yab2 xab", 2) == "1"  # the longest ending decides, then the latest place
    assert proposed("xab1 xab2 xab", 2) == "2"
    assert proposed("abcde123 abcde", 8) == "1"  # one where few agree
    assert proposed("abcdefghijklmn abcdef", 8) == "ghijklmn"
    assert proposed("abababab", 8) == "ab"  # no further than the text goes
    assert proposed("abcdea", 4) == ""  # one token in common is too little
    assert proposed("abab", 0) == proposed("abab", -3) == proposed("", 4) == proposed("a", 4) == ""


def test_it_is_the_latest_of_the_longest_places():
    """As one would search with a string's own methods."""
    rules = look_ahead.SHORTEST, look_ahead.LONGEST, look_ahead.COPIED
    draw, found = random.Random(0), 0
    for _ in range(2000):
        text = "".join(draw.choice("ab c") for _ in range(draw.randrange(40)))
        after, agreed = len(text), 0
        for length in range(rules[0], rules[1] + 1):
            at = text.rfind(text[-length:], 0, len(text) - 1) if len(text) > length else -1
            if at < 0:
                break
            after, agreed = at + length, length
        assert proposed(text, 6) == text[after:][: 6 if agreed >= rules[2] else 1], text
        found += after < len(text)
    assert found > 1000


def test_fewer_passes_than_tokens(models):
    """A source that says the answer: all of it is read in a few passes."""
    plain = answer(models[0], question(4), 0, routing="emamba", max_new_tokens=40, eos_token_id=None)
    said = plain.sequences[0, 1:]
    asked = {"routing": "emamba", "prefix_allowed_tokens_fn": lambda row, ids: said[len(ids) - 1 :][:1].tolist()}
    source = question(4)
    source["input_ids"] = torch.cat([said[None], source["input_ids"]], dim=1)
    source["attention_mask"] = torch.ones_like(source["input_ids"])
    found = answer(models[0], source, 7, max_new_tokens=40, eos_token_id=None, **asked)
    assert torch.equal(found.sequences[0, 1:], said)
    assert found.look_ahead.accepted >= 25 and found.look_ahead.passes <= 12


def odd_mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 37, "intermediate_size": 45, "state_size": 5, "conv_kernel": 3, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(vocab_size=61, num_hidden_layers=2, expand=1, **sizes)).eval()
    use_selective_scan(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("make", [odd_mamba, lambda: tiny_emamba(layers=3)])
def test_a_run_is_its_steps_to_the_bit(make, weight_format, dtype):
    model = make().to(dtype)
    use_selective_scan(model)
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    decoder = EMambaDecoder(weight_format)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long), cache_params=cache, use_cache=True)
        (log,) = StateLog.for_tokens(cache, 9, logs=1)
        begun = copy.deepcopy(cache)
        try:
            torch.set_num_threads(2)
            hidden, logits = decoder.step(model, cache, ids, log)
        finally:
            torch.set_num_threads(threads)
        for mine, theirs in zip(cache.layers, begun.layers, strict=True):  # what it began with is left alone
            assert torch.equal(mine.recurrent_states[0], theirs.recurrent_states[0])
            assert torch.equal(mine.conv_states[0], theirs.conv_states[0])
        for token in range(7):
            one = decoder.step(model, begun, ids[:, token : token + 1])
            assert all(torch.equal(x[:, token : token + 1], y) for x, y in zip((hidden, logits), one, strict=True))
            log.restore(cache, token)
            for mine, theirs in zip(cache.layers, begun.layers, strict=True):
                assert torch.equal(mine.recurrent_states[0], theirs.recurrent_states[0])
                assert torch.equal(mine.conv_states[0], theirs.conv_states[0])
        (again,) = StateLog.for_tokens(cache, 2, logs=1)
        with pytest.raises(ValueError, match="log of 2"):
            decoder.step(model, cache, ids, again)
        with pytest.raises(IndexError):
            decoder.step(model, cache, torch.full((1, 2), 10**6), again)


def test_what_follows_a_generation(models):
    """A forward call on the cache of a finished generation goes on from there, as it would after plain decoding."""
    outputs = [answer(models[0], question(2), width, eos_token_id=None) for width in (0, 5)]
    with torch.no_grad():
        for ids in (outputs[0].sequences[:, -1:], random_targets(1, 3), random_targets(1, 1)):
            said = [models[0](decoder_input_ids=ids, past_key_values=x.past_key_values).logits for x in outputs]
            assert torch.equal(*said)
