# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""EMamba's compiled reading of sources: its modules' states, and its modules wherever it must not be used."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from mixed_routing import mixed_model
from test_emamba_decoder import (
    BOUNDS,
    LENGTHS,
    adapt,
    by_modules,
    by_steps,
    deviation,
    hook,
    odd_emamba,
    replace_forward,
    states_of,
)
from tiny_experts import VOCAB, random_batch, tiny_emamba
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from mambaformer.modeling_mambaformer import emamba_prefill, module_snapshot
from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder, cached_states
from mambaformer.modeling_mambaformer.emamba_prefill import can_read, fresh_cache, prefill, read_sources, run_prefill
from mambaformer.modeling_mambaformer.emamba_stream import read_source
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.quantized_modules import round_emamba
from mambaformer.modeling_mambaformer.sources import Sources

pytestmark = pytest.mark.skipif(not can_read(), reason="the compiled prefill is not built")
FORMATS = (*BOUNDS, "held int8", "held int4")


@pytest.fixture
def emamba() -> MambaForCausalLM:
    """A tiny Mamba whose state matters, on our scan."""
    model = tiny_emamba(layers=3)
    use_selective_scan(model)
    return model


@pytest.fixture(scope="module")
def composed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder).eval()


def in_format(model: MambaForCausalLM, weight_format: str) -> tuple[MambaForCausalLM, EMambaDecoder]:
    """The model and a decoder that reads it in this format: rounded beside the model, or held so by itself."""
    if not weight_format.startswith("held "):
        return model, EMambaDecoder(weight_format)
    model = copy.deepcopy(model)
    round_emamba(model, weight_format.removeprefix("held "))
    return model, EMambaDecoder()


def sources_of(lengths: list[int], vocab: int = VOCAB, seed: int = 0) -> Sources:
    """Random sources of these lengths, right-padded; what stands in the padding is random too."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(0, vocab, (len(lengths), width), generator=generator)
    return Sources.build(ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long(), vocab)


def read(decoder: EMambaDecoder, model: MambaForCausalLM, sources: Sources, **options):
    """Hidden states and all states of the compiled call, which must apply; `options` go to `run_prefill`."""
    with torch.no_grad():
        if not options:
            cache, hidden = prefill(decoder, model, sources)
            return [hidden, *states_of(cache)]
        packed = decoder.prepare(model)
        cache = fresh_cache(model, packed, len(sources.left_ids))
        states = cached_states(cache, packed, len(sources.left_ids))
        return [run_prefill(packed, sources.left_ids, sources.lengths, *states, **options), *states_of(cache)]


def read_by_modules(model: MambaForCausalLM, sources: Sources) -> list[torch.Tensor]:
    with torch.no_grad():
        cache, hidden = read_source(model, sources)
    return [hidden, *states_of(cache)]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(deviation(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("lengths", [[1], [2], [3], [63], [64], [65], [1000], [300, 1, 3, 64, 31], [2, 2]])
def test_it_leaves_what_the_modules_leave(emamba, lengths, instructions):
    sources = sources_of(lengths)
    found, expected = read(EMambaDecoder(), emamba, sources), read_by_modules(emamba, sources)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_conv_bias": False, "tie_word_embeddings": False}])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_odd_sizes(weight_format, options, instructions):
    model, decoder = in_format(odd_emamba(use_bias=False, **options), weight_format)
    sources = sources_of([37, 2, 5], vocab=33)
    bound = {"float32": 1e-5, "bfloat16": 0.02}.get(weight_format, 0.08)
    assert worst(read(decoder, model, sources), read_by_modules(model, sources)) < bound


def test_one_layer(instructions):
    model = tiny_emamba(layers=1)
    use_selective_scan(model)
    sources = sources_of([9, 4])
    assert worst(read(EMambaDecoder(), model, sources), read_by_modules(model, sources)) < 1e-5


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_source_depends_neither_on_its_neighbours_nor_on_threads_nor_on_blocks(weight_format, instructions):
    model, decoder = in_format(odd_emamba(hidden_size=48, intermediate_size=100), weight_format)
    lengths, before = [37, 1, 3, 64, 70], torch.get_num_threads()
    sources = sources_of(lengths, vocab=33)
    try:
        torch.set_num_threads(1)
        together = read(decoder, model, sources)
        for threads, block in ((2, 0), (3, 0), (1, 1), (2, 5), (1, 64), (3, 100), (1, 10**6)):
            torch.set_num_threads(threads)
            again = read(decoder, model, sources, block=block)
            assert all(torch.equal(x, y) for x, y in zip(again, together, strict=True)), (threads, block)
    finally:
        torch.set_num_threads(before)
    for row, length in enumerate(lengths):
        alone = Sources.build(sources.input_ids[row : row + 1, :length], None, 33)
        for mine, all_rows in zip(read(decoder, model, alone), together, strict=True):
            assert torch.equal(mine[0], all_rows[row])


def test_weights_stored_in_bfloat16_are_float32_weights_of_these_values(emamba):
    stored = copy.deepcopy(emamba).to(torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(emamba.parameters(), stored.parameters(), strict=True):
            mine.copy_(theirs)
    sources = sources_of(LENGTHS)
    with torch.no_grad():
        cache, hidden = prefill(EMambaDecoder(), stored, sources)
    expected = read(EMambaDecoder(), emamba, sources)
    assert hidden.dtype == cache.layers[0].conv_states[0].dtype == torch.bfloat16
    for mine, theirs in zip([hidden.float(), *states_of(cache)], expected, strict=True):
        bound = 1e-6 if mine.shape == cache.layers[0].recurrent_states[0].shape else 2**-8
        assert deviation(mine, theirs) < bound


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows in float64 as the compiled code rounds them: to int8 with one scale each."""
    single = x.float()
    bound = single.abs().amax(-1, keepdim=True)
    return (single * (127 / bound)).round().double() * (bound.double() / 127)


def reference(model: MambaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """Last hidden state `(D)`, and each layer's window and state, of one source in float64, products of int8."""
    matrix = lambda linear: linear.dequantize().double()  # noqa: E731
    norm = lambda x, module: (  # noqa: E731
        x * torch.rsqrt((x**2).mean(-1, keepdim=True) + model.config.layer_norm_epsilon) * module.weight.double()
    )
    x, states = model.backbone.embeddings(ids).double(), []  # (S, D)
    for block in model.backbone.layers:
        mixer = block.mixer
        u, z = (rounded(norm(x, block.norm)) @ matrix(mixer.in_proj).T).chunk(2, -1)  # (S, E) each
        weight, bias = mixer.conv1d.weight.double()[:, 0], mixer.conv1d.bias.double()  # (E, K), (E)
        inputs = torch.cat([u.new_zeros(weight.shape[1], u.shape[1]), u])  # (K + S, E)
        states.append(inputs[-weight.shape[1] :].T)
        u = torch.nn.functional.silu(inputs[1:].unfold(0, weight.shape[1], 1).mul(weight).sum(-1) + bias)
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        step, B, C = (rounded(u) @ matrix(mixer.x_proj).T).split(sizes, -1)
        delta = torch.nn.functional.softplus(step @ mixer.dt_proj.weight.double().T + mixer.dt_proj.bias.double())
        h, A, y = u.new_zeros(u.shape[1], sizes[1]), -mixer.A_log.double().exp(), []
        for t in range(len(ids)):
            h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
            y.append(h @ C[t] + mixer.D.double() * u[t])
        states.append(h)
        x = x + rounded(torch.stack(y) * torch.nn.functional.silu(z)) @ matrix(mixer.out_proj).T
    return [norm(x, model.backbone.norm_f)[-1], *states]


@torch.no_grad()
def test_int8_does_what_the_same_rounding_does_in_float64(emamba, instructions):
    emamba, decoder = in_format(emamba, "held int8")
    sources = sources_of([11])
    found = [x[0] for x in read(decoder, emamba, sources)]
    assert worst(found, reference(emamba, sources.input_ids[0])) < 1e-4


@pytest.mark.parametrize("weight_format", FORMATS)
def test_reading_a_source_is_decoding_its_tokens(emamba, weight_format, instructions):
    emamba, decoder = in_format(emamba, weight_format)
    sources = sources_of([12, 12])
    first = Sources.build(sources.input_ids[:, :1], None, VOCAB)
    with torch.no_grad():
        cache, _ = prefill(decoder, emamba, first)
        for token in sources.input_ids[:, 1:].split(1, 1):
            hidden, _ = decoder.step(emamba, cache, token)
    bound = 1e-5 if weight_format in ("float32", "bfloat16") else 0.02  # a value may round to the other side
    assert worst([hidden[:, 0], *states_of(cache)], read(decoder, emamba, sources)) < bound


def test_steps_and_modules_read_on_from_it(emamba):
    sources, ids = sources_of(LENGTHS), torch.randint(3, VOCAB, (len(LENGTHS), 3))
    with torch.no_grad():
        cache, _ = prefill(EMambaDecoder(), emamba, sources)
        expected, _ = read_source(emamba, sources)
    assert cache.has_previous_state()
    wanted = by_modules(emamba, expected, ids)
    assert deviation(by_modules(emamba, copy.deepcopy(cache), ids), wanted) < 1e-5
    assert deviation(by_steps(EMambaDecoder(), emamba, copy.deepcopy(cache), ids), wanted) < 1e-5


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The batch sizes of the compiled calls that were made."""
    sizes, run = [], emamba_prefill.run_prefill
    monkeypatch.setattr(
        emamba_prefill, "run_prefill", lambda packed, ids, *rest: sizes.append(len(ids)) or run(packed, ids, *rest)
    )
    return sizes


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"routing": "emamba"}])
def test_generate_says_the_same_with_and_without(composed, side, options, calls, monkeypatch):
    asked = {**random_batch(LENGTHS, seed=2, side=side), "max_new_tokens": 10, **options}
    output = composed.generate(**asked, return_dict_in_generate=True)
    assert calls == [len(LENGTHS)]
    monkeypatch.setattr(emamba_prefill, "can_read", lambda: False)
    expected = composed.generate(**asked, return_dict_in_generate=True)
    assert len(calls) == 1
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.allclose(output.route_trace.margin, expected.route_trace.margin, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("disturb, said", [(hook, "hooks"), (adapt, "adapters"), (replace_forward, "hooks")])
def test_off_for_an_unusual_model(emamba, disturb, said, caplog, monkeypatch, calls):
    module_snapshot.report.cache_clear()
    monkeypatch.setattr(module_snapshot.logger, "propagate", True)
    module_snapshot.logger.setLevel("INFO")
    disturb(emamba)
    with torch.no_grad():
        for _ in range(2):
            read_sources(EMambaDecoder(), emamba, sources_of([4]))
    lines = [record for record in caplog.records if "modules are run instead" in record.getMessage()]
    assert calls == [] and len(lines) == 1 and said in lines[0].getMessage()


def test_off_where_gradients_training_or_casting_need_the_modules(emamba, monkeypatch):
    sources, decoder = sources_of([4, 2]), EMambaDecoder()
    assert prefill(decoder, emamba, sources) is None  # gradients
    with torch.no_grad():
        assert prefill(decoder, emamba.train(), sources) is None
        emamba.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert prefill(decoder, emamba, sources) is None
        assert prefill(EMambaDecoder("off"), emamba, sources) is None
        monkeypatch.setattr(emamba_prefill, "DECODE_LIBRARY", object())  # one that was built without it
        assert prefill(decoder, emamba, sources) is None
        cache, hidden = read_sources(decoder, emamba, sources)
        assert hidden.shape == (2, 24) and cache.has_previous_state()
        monkeypatch.undo()
        assert prefill(decoder, emamba, sources) is not None


def test_off_for_other_families():
    config = FalconMambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with torch.no_grad():
        assert prefill(EMambaDecoder(), FalconMambaForCausalLM(config).eval(), sources_of([4])) is None


def test_ids_and_lengths_are_checked(emamba):
    packed = EMambaDecoder().prepare(emamba)
    states = cached_states(fresh_cache(emamba, packed, 2), packed, 2)
    ids = torch.full((2, 4), 5)
    for bad in (-1, VOCAB):
        ids[1, 1] = bad
        with pytest.raises(IndexError, match=str(bad)):
            run_prefill(packed, ids, torch.tensor([4, 3]), *states)
        run_prefill(packed, ids, torch.tensor([4, 2]), *states)  # what stands before a source is not read
    for lengths in ([4, 0], [5, 1], [-1, 1]):
        with pytest.raises(ValueError, match="lengths"):
            run_prefill(packed, torch.full((2, 4), 5), torch.tensor(lengths), *states)
    with pytest.raises(ValueError, match="each of the 2 rows"):
        run_prefill(packed, ids, torch.tensor([4]), *states)


def test_a_batch_of_nothing(emamba):
    packed = EMambaDecoder().prepare(emamba)
    cache = fresh_cache(emamba, packed, 0)
    nothing = torch.empty(0, 5, dtype=torch.long)
    hidden = run_prefill(packed, nothing, torch.empty(0, dtype=torch.long), *cached_states(cache, packed, 0))
    assert hidden.shape == (0, 24)


@pytest.mark.parametrize("weight_format", ["float32", "held int8", "held int4"])
def test_what_is_not_finite_shows(emamba, weight_format, instructions):
    with torch.no_grad():
        emamba.backbone.layers[1].mixer.dt_proj.bias[3] = float("nan")
    emamba, decoder = in_format(emamba, weight_format)
    assert read(decoder, emamba, sources_of([6, 3]))[0].isnan().all()


def test_the_time_of_products_is_part_of_the_whole():
    config = MambaConfig(vocab_size=50, hidden_size=128, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    model = MambaForCausalLM(config).eval()
    use_selective_scan(model)
    seconds = ctypes.c_double(-1.0)
    read(EMambaDecoder(), model, sources_of([80], vocab=50), seconds=seconds)
    assert 0 < seconds.value < 10
