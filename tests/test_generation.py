# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""transformers' `generate` on a model that routes: every mode, and a trace that says what really happened."""

from __future__ import annotations

import pytest
import torch
from mixed_routing import EMAMBA, ENDED, ET5, after_end, mixed_model, random_targets, row_alone
from tiny_experts import VOCAB, random_batch, tiny_et5
from transformers import GenerationConfig, MambaForCausalLM, StoppingCriteria, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

LENGTHS = [7, 3, 11, 5]
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def mixed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return random_batch(LENGTHS, seed=1)


@pytest.fixture(scope="module")
def ends(mixed) -> list[int]:
    """Two tokens at which answers end early, in some rows and not in others."""
    sequences = mixed.generate(**random_batch(LENGTHS, seed=1), max_new_tokens=NEW_TOKENS)
    return [int(sequences[0, 4]), int(sequences[2, 7])]


def answer(model, batch, **options):
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, **options})


def check_trace(output, ends: list[int] = (1,), prompt: int = 1) -> None:
    """Shapes and meaning of a trace against the tokens it belongs to."""
    trace, tokens = output.route_trace, output.sequences[:, prompt:]
    for name in ("expert", "margin", "gap", "log_p_emamba", "log_p_et5"):
        assert trace[name].shape == tokens.shape, name
    for name in ("et5_passes", "et5_tokens", "encoder_calls"):
        assert trace[name].shape == tokens.shape[:1], name
    assert trace.expert.unique().tolist() in ([-1, 0, 1], [0, 1], [-1, 1], [-1, 0], [0], [1])
    assert torch.equal(trace.expert == ENDED, after_end(tokens, list(ends)))
    assert torch.equal(trace.margin.isnan(), trace.expert == ENDED)
    assert torch.equal(trace.log_p_emamba.isnan(), trace.expert == ENDED)
    assert torch.equal(trace.log_p_et5.isnan(), trace.expert != ET5)


@torch.no_grad()
def recomputed(model, batch, output, prompt: int = 1):
    """One pass without a cache over each returned sequence; `MambaFormerOutput` of its new tokens."""
    times = len(output.sequences) // len(batch["input_ids"])
    repeated = {name: value.repeat_interleave(times, dim=0) for name, value in batch.items()}
    new = output.sequences.shape[1] - prompt
    return model(**repeated, decoder_input_ids=output.sequences[:, :-1], use_cache=False, logits_to_keep=new)


def check_against_one_pass(model, batch, output, prompt: int = 1) -> None:
    """The trace is that of the returned sequence: choosing again along it gives the same choices and margins."""
    trace = output.route_trace
    again = recomputed(model, batch, output, prompt).route_trace
    alive = trace.expert != ENDED
    assert {EMAMBA, ET5} <= set(trace.expert[alive].tolist())
    assert torch.equal(trace.expert[alive], again.expert[alive])
    assert torch.equal(trace.gap[alive], again.gap[alive])
    torch.testing.assert_close(trace.margin[alive], again.margin[alive], atol=1e-4, rtol=0)
    for name in ("log_p_emamba", "log_p_et5"):
        torch.testing.assert_close(trace[name][alive], again[name][alive], atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy(mixed, batch, ends, use_cache):
    output = answer(mixed, batch, eos_token_id=ends, use_cache=use_cache)
    check_trace(output, ends)
    check_against_one_pass(mixed, batch, output)
    assert (output.route_trace.expert == ENDED).any(1).tolist().count(True) in (1, 2, 3)


def test_long_answers(mixed, batch):
    """ET5's memory grows by copying: nothing of what it held may be lost on the way."""
    output = answer(mixed, batch, max_new_tokens=45, eos_token_id=None)
    check_against_one_pass(mixed, batch, output)
    assert output.route_trace.et5_tokens.max() > 36


@torch.no_grad()
def test_each_token_comes_from_its_expert(mixed, batch, et5_folder, emamba_folder):
    """With the `select` merger the logits of a token are those of the plain expert that the trace names."""
    output = answer(mixed, batch, output_logits=True)
    et5 = T5ForConditionalGeneration.from_pretrained(et5_folder)
    emamba = MambaForCausalLM.from_pretrained(emamba_folder)
    decoder_ids = output.sequences[:, :-1]
    said = {ET5: et5(**batch, decoder_input_ids=decoder_ids).logits, EMAMBA: []}
    for row in range(len(LENGTHS)):
        ids = torch.cat([row_alone(batch, row)["input_ids"], decoder_ids[row : row + 1]], dim=1)
        said[EMAMBA].append(emamba(ids).logits[0, -NEW_TOKENS:])
    said[EMAMBA] = torch.stack(said[EMAMBA])
    logits = torch.stack(output.logits, dim=1)  # (B, T, V)
    for expert in (EMAMBA, ET5):
        spoke = output.route_trace.expert == expert
        assert spoke.any()
        torch.testing.assert_close(logits[spoke], said[expert][spoke], atol=1e-4, rtol=0)
    for expert, name in ((EMAMBA, "log_p_emamba"), (ET5, "log_p_et5")):
        log_p = said[expert].log_softmax(-1).gather(-1, output.sequences[:, 1:, None]).squeeze(-1)
        known = ~output.route_trace[name].isnan()
        torch.testing.assert_close(output.route_trace[name][known], log_p[known], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_equals_the_question_alone(mixed, ends, side, beams):
    batch = random_batch(LENGTHS, seed=1, side=side)
    together = answer(mixed, batch, eos_token_id=ends, num_beams=beams)
    assert (together.route_trace.expert != together.route_trace.expert[0]).any()
    for row in range(len(LENGTHS)):
        alone = answer(mixed, row_alone(batch, row), eos_token_id=ends, num_beams=beams)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row, :length], alone.sequences[0])
        assert beams > 1 or not together.sequences[row, length:].any()  # beams fill with an end token
        one, many = alone.route_trace, together.route_trace
        assert torch.equal(many.expert[row, : length - 1], one.expert[0])
        assert (many.expert[row, length - 1 :] == ENDED).all()
        torch.testing.assert_close(many.margin[row, : length - 1], one.margin[0], atol=1e-4, rtol=0, equal_nan=True)
        assert many.encoder_calls[row] == one.encoder_calls[0]
        if beams == 1:
            assert many.et5_passes[row] == one.et5_passes[0]
            assert many.et5_tokens[row] >= one.et5_tokens[0]


@pytest.mark.parametrize("beams", [1, 2])
def test_cached_equals_uncached(mixed, batch, ends, beams):
    for extra in ({}, {"decoder_input_ids": random_targets(4, 5)}):
        options = {"eos_token_id": ends, "num_beams": beams, **extra}
        cached = answer(mixed, batch, **options)
        uncached = answer(mixed, batch, **options, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        for name in ("expert", "gap", "et5_passes", "encoder_calls"):
            assert torch.equal(cached.route_trace[name], uncached.route_trace[name]), name
        assert (uncached.route_trace.et5_tokens >= cached.route_trace.et5_tokens).all()


def test_decoder_prompt(mixed, batch):
    """The trace covers the new tokens only; the prompt's tokens are kept, even one that would end an answer."""
    prompt = random_targets(4, 5)
    prompt[:, 2] = 1
    output = answer(mixed, batch, decoder_input_ids=prompt)
    assert torch.equal(output.sequences[:, :5], prompt)
    check_trace(output, prompt=5)
    check_against_one_pass(mixed, batch, output, prompt=5)


def test_chunked_prompt(mixed, batch):
    prompt = random_targets(4, 7)
    expected = answer(mixed, batch, decoder_input_ids=prompt)
    output = answer(mixed, batch, decoder_input_ids=prompt, prefill_chunk_size=3)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.route_trace.expert, expected.route_trace.expert)


def test_sampling_is_seeded(mixed, batch, ends):
    def sampled(seed):
        torch.manual_seed(seed)
        return answer(mixed, batch, do_sample=True, top_p=0.9, num_return_sequences=3, eos_token_id=ends)

    output = sampled(1)
    assert output.sequences.shape[0] == 12
    check_trace(output, ends)
    check_against_one_pass(mixed, batch, output)
    assert torch.equal(sampled(1).sequences, output.sequences)
    other = sampled(2).sequences
    assert other.shape != output.sequences.shape or not torch.equal(other, output.sequences)


@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_trace_the_returned_hypothesis(mixed, batch, ends, returned, do_sample):
    torch.manual_seed(0)
    output = answer(mixed, batch, num_beams=3, num_return_sequences=returned, eos_token_id=ends, do_sample=do_sample)
    assert output.sequences.shape[0] == 4 * returned
    check_trace(output, ends)
    check_against_one_pass(mixed, batch, output)


def test_scores_and_logits(mixed, batch):
    output = answer(mixed, batch, output_scores=True, output_logits=True, repetition_penalty=1.5)
    assert len(output.scores) == len(output.logits) == NEW_TOKENS
    assert all(scores.shape == (4, VOCAB) for scores in output.scores)
    assert torch.equal(torch.stack(output.scores, 1).argmax(-1), output.sequences[:, 1:])
    assert not torch.equal(torch.stack(output.logits, 1), torch.stack(output.scores, 1))
    beams = answer(mixed, batch, output_scores=True, num_beams=2)
    assert beams.sequences_scores.shape == (4,) and beams.sequences_scores.isfinite().all()


def test_plain_tensor_without_return_dict(mixed, batch):
    assert isinstance(mixed.generate(**batch, max_new_tokens=3), torch.Tensor)


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer(mixed, batch):
    streamer = Collected()
    output = answer(mixed, row_alone(batch, 0), streamer=streamer)
    assert streamer.ended and streamer.tokens == output.sequences[0].tolist()


class EndsAt(StoppingCriteria):
    """Ends a row at a token; unlike the end token, nothing else in `generate` knows it."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_rows(mixed, batch):
    """A row that a criterion of the caller ended is over: ET5 is not asked for what follows."""
    token = int(mixed.generate(**batch, max_new_tokens=NEW_TOKENS)[0, 4])
    options = {"stopping_criteria": [EndsAt(token)], "eos_token_id": 1}
    output = answer(mixed, batch, **options)
    check_trace(output, [token, 1])
    assert (output.route_trace.expert == ENDED).any() and (output.route_trace.expert[:, -1] != ENDED).any()
    for row in range(4):
        alone = answer(mixed, row_alone(batch, row), **options).route_trace
        assert output.route_trace.et5_passes[row] == alone.et5_passes[0]


def test_no_end_at_all(mixed, batch):
    mixed.generation_config.eos_token_id, before = None, mixed.generation_config.eos_token_id
    try:
        output = answer(mixed, batch)
    finally:
        mixed.generation_config.eos_token_id = before
    assert (output.route_trace.expert != ENDED).all()


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 2.0},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "suppress": {"suppress_tokens": list(range(40, VOCAB))},
    "min_new_tokens": {"min_new_tokens": 8},
    "forced_bos": {"forced_bos_token_id": 17},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 9 + row, 1]},
}


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
@pytest.mark.parametrize("beams", [1, 2])
def test_logits_processors(mixed, batch, ends, options, beams):
    output = answer(mixed, batch, eos_token_id=ends, num_beams=beams, **options)
    new = output.sequences[:, 1:]
    alive = ~after_end(new, ends)
    check_trace(output, ends)
    if "no_repeat_ngram_size" in options:
        for row, length in zip(new.tolist(), alive.sum(1).tolist(), strict=True):
            pairs = list(zip(row[:length], row[1:length], strict=False))
            assert len(pairs) == len(set(pairs))
    if "suppress_tokens" in options:
        assert new.max() < 40
    if "min_new_tokens" in options:
        assert alive.sum(1).min() >= 8
    if "forced_bos_token_id" in options:
        assert (new[:, 0] == 17).all()
    if "prefix_allowed_tokens_fn" in options:
        for row in range(4):
            assert set(new[row][alive[row]].tolist()) <= {5 + row, 9 + row, 1, *ends}
    if "repetition_penalty" in options:
        assert not torch.equal(new, mixed.generate(**batch, max_new_tokens=NEW_TOKENS, num_beams=beams)[:, 1:])


def test_lengths(mixed, batch):
    """The caller's limit holds, whichever of transformers' two ways it is given in."""
    assert mixed.generate(**batch, max_new_tokens=4).shape == (4, 5)
    assert mixed.generate(**batch, max_length=6).shape == (4, 6)
    assert mixed.generate(**batch, generation_config=GenerationConfig(max_length=6)).shape == (4, 6)
    assert mixed.generate(**batch, generation_config=GenerationConfig(max_new_tokens=3)).shape == (4, 4)
    assert mixed.generate(**batch, decoder_input_ids=random_targets(4, 3), max_length=7).shape == (4, 7)
    assert mixed.generate(**row_alone(batch, 0)).shape[1] <= 1 + mixed.config.max_target_length


OTHER_MODES = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "assisted": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("options", OTHER_MODES.values(), ids=OTHER_MODES.keys())
def test_other_modes(mixed, batch, options):
    """Modes that transformers keeps elsewhere, or refuses for models with a state, end in a clear error."""
    alone = row_alone(batch, 0)
    try:
        tiny_et5(decoder_layers=2).generate(**alone, max_new_tokens=3, **options)
    except (ValueError, OSError, ImportError) as error:
        pytest.skip(f"transformers cannot do this offline: {type(error).__name__}")
    with pytest.raises(ValueError, match="stateful|not supported"):
        answer(mixed, alone, **options)


def test_soft_and_per_call_routing(mixed, batch):
    """`routing` is settled per call and leaves nothing behind."""
    first = answer(mixed, batch)
    soft = answer(mixed, batch, routing="soft")
    assert (soft.route_trace.et5_passes == NEW_TOKENS).all()
    assert not soft.route_trace.log_p_et5.isnan().any()
    again = answer(mixed, batch)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(first.route_trace.expert, again.route_trace.expert)
