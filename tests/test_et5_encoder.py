# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled encoder says what transformers' modules say, and steps aside where it must."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mixed_routing import mixed_model
from test_et5_pass import EXPERTS, LENGTHS, sources_of
from tiny_experts import VOCAB, random_batch, tiny_et5

from mambaformer.modeling_mambaformer import et5_encoder, packed_weights
from mambaformer.modeling_mambaformer.et5_encoder import ET5Encoder, compiled_parts, is_whole
from mambaformer.modeling_mambaformer.et5_pass import DECODE_LIBRARY
from mambaformer.modeling_mambaformer.lazy_et5 import LazyET5State
from mambaformer.modeling_mambaformer.quantized_et5 import round_et5

LONG = [300, 97, 1, 260]  # beyond a block of queries, of keys and of tokens

pytestmark = pytest.mark.skipif(not hasattr(DECODE_LIBRARY, "mambaformer_et5_pass"), reason="the library is not built")


@pytest.fixture
def runs(monkeypatch) -> list[tuple[int, int]]:
    """Sources and positions of every compiled run."""
    seen, run = [], et5_encoder.run_encoder
    monkeypatch.setattr(
        et5_encoder, "run_encoder", lambda p, ids, mask: seen.append(tuple(ids.shape)) or run(p, ids, mask)
    )
    return seen


@torch.no_grad()
def encoded(et5, encoder: ET5Encoder | None, lengths=LENGTHS, calls=((0, 2), (0, 1, 3)), seed: int = 0):
    """States of all sources, read in several calls, zero on padding."""
    state = LazyET5State(sources_of(random_batch(lengths, seed=seed)), torch.arange(len(lengths)))
    for wanted in calls:
        state.encode(et5, wanted, encoder)
    return state.encoder_states * state.sources.attention_mask[..., None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", EXPERTS)
def test_states_are_those_of_the_modules(kind, threads, runs, monkeypatch):
    """Padded sources, some at a time; beyond the exact buckets of distance, and beyond what is taken at a time."""
    monkeypatch.setattr(packed_weights, "PRODUCTS_A_THREAD", 1)
    et5, before = EXPERTS[kind](), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for lengths, calls in ((LENGTHS, ((0, 2), (0, 1, 3))), (LONG, ((1,), (0, 1, 2, 3))), ([1], ((0,),))):
            runs.clear()
            here, there = (encoded(et5, encoder, lengths, calls) for encoder in (ET5Encoder(), None))
            assert len(runs) == len(calls)
            torch.testing.assert_close(here, there, atol=2e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [1, 7, 12, 64, 300])
def test_heads_of_any_width(width, runs):
    et5 = tiny_et5(width=width)
    here, there = encoded(et5, ET5Encoder(), LONG), encoded(et5, None, LONG)
    assert (here - there).norm() < 1e-5 * there.norm()  # wide heads make steep scores: single values differ more
    assert runs


def test_rounded_weights_are_read_as_they_are(instructions, runs):
    et5 = tiny_et5()
    round_et5(et5, "int8")
    here, there = encoded(et5, ET5Encoder()), encoded(et5, None)
    assert runs
    assert (here - there).norm() < 1e-4 * there.norm()


@pytest.mark.parametrize("lengths", [LENGTHS, LONG])
def test_a_source_depends_neither_on_its_neighbours_nor_on_the_threads(lengths, monkeypatch):
    """To the bit."""
    monkeypatch.setattr(packed_weights, "PRODUCTS_A_THREAD", 1)
    et5, encoder, batch = tiny_et5(), ET5Encoder(), random_batch(lengths)
    with torch.no_grad():
        together = encoder.encode(et5, batch["input_ids"], batch["attention_mask"])
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = encoder.encode(et5, batch["input_ids"][row][mask][None], torch.ones(1, int(mask.sum())))
            assert torch.equal(alone[0], together[row][mask])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(encoder.encode(et5, batch["input_ids"], batch["attention_mask"]), together)
        finally:
            torch.set_num_threads(before)


def test_padding_between_tokens_goes_to_the_modules():
    assert is_whole(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]))
    assert not is_whole(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]))
    mask = torch.ones(1, 8)
    with torch.no_grad():
        assert ET5Encoder().encode(tiny_et5(), torch.ones(1, 8).long(), mask) is not None
        mask[0, 3] = 0
        assert ET5Encoder().encode(tiny_et5(), torch.ones(1, 8).long(), mask) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_on_padding_are_zero(side):
    batch = random_batch([5, 9])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        states = ET5Encoder().encode(tiny_et5(), ids, mask)
    assert not states[mask == 0].any() and states[mask == 1].any(1).all()


PEAK = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not PEAK.exists(), reason="this system does not tell a process's peak memory")
def test_memory_grows_with_the_length_not_with_its_square():
    """All pairs of positions alone would take 1 GiB."""
    length, et5 = 8192, tiny_et5(encoder_layers=1)
    ids, mask = torch.ones(1, length).long(), torch.ones(1, length)

    def peak_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    with torch.no_grad():
        ET5Encoder().encode(et5, ids[:, :256], mask[:, :256])
        PEAK.write_text("5")  # from here on
        before = peak_kib()
        ET5Encoder().encode(et5, ids, mask)
    assert peak_kib() - before < 64 * 1024


def test_it_steps_aside(runs):
    """Hooks, another precision, training, gradients, `off`: the modules are run, right as ever."""
    et5 = tiny_et5()
    plain = encoded(et5, None)

    def by_modules(model=et5, encoder: ET5Encoder | None = None) -> bool:
        runs.clear()
        found = encoded(model, encoder or ET5Encoder())
        assert (found.float() - plain).norm() < 0.1 * plain.norm()
        return not runs

    assert not by_modules()
    hook = et5.encoder.block[1].layer[0].register_forward_hook(lambda *_: None)
    assert by_modules()
    hook.remove()
    assert by_modules(encoder=ET5Encoder("off"))
    assert by_modules(model=copy.deepcopy(et5).to(torch.bfloat16))
    et5.train()
    assert by_modules()
    et5.eval()
    assert not by_modules()
    batch = random_batch(LENGTHS)
    assert ET5Encoder().encode(et5, batch["input_ids"], batch["attention_mask"]) is None  # with gradients


def test_changed_weights_are_noticed():
    et5, encoder = tiny_et5(), ET5Encoder()
    before = encoded(et5, encoder)
    for change in (lambda w: w.mul_(1.5), lambda w: w.data.mul_(1.5)):  # PyTorch does not count the second
        with torch.no_grad():
            change(et5.encoder.block[0].layer[1].DenseReluDense.wo.weight)
        after = encoded(et5, encoder)
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(after, encoded(et5, None), atol=1e-5, rtol=1e-4)
        before = after


def test_bad_ids_are_named():
    with torch.no_grad(), pytest.raises(IndexError, match=str(VOCAB + 5)):
        ET5Encoder().encode(tiny_et5(), torch.full((1, 2), VOCAB + 5), torch.ones(1, 2))


def test_answers_are_the_same(et5_folder, emamba_folder, runs):
    model, batch = mixed_model(et5_folder, emamba_folder).eval(), random_batch(LENGTHS)
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    here = model.generate(**batch, **options)
    count = len(runs)
    there = model.pack_et5("off").generate(**batch, **options)
    assert count and len(runs) == count
    assert torch.equal(here.sequences, there.sequences)
    torch.testing.assert_close(
        here.route_trace.log_p_et5, there.route_trace.log_p_et5, atol=1e-4, rtol=1e-4, equal_nan=True
    )
    assert pickle.loads(pickle.dumps(model.et5_encoder))._ready is None


def test_the_decoder_alone_is_rounded_beside_the_model():
    assert [part.weight_format for part in compiled_parts("int8")] == ["float32", "int8"]
    assert [part.weight_format for part in compiled_parts("off")] == ["off", "off"]
    with pytest.raises(ValueError, match="int3"):
        compiled_parts("int3")
