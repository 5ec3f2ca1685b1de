# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled pass of ET5's decoder says what transformers' modules say, and steps aside where it must."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixed_routing import mixed_model
from tiny_experts import VOCAB, random_batch, tiny_et5
from transformers import MT5Config, MT5ForConditionalGeneration

from mambaformer.configuration.configuration_mambaformer import MambaFormerConfig
from mambaformer.modeling_mambaformer import et5_pass, lazy_et5, packed_weights
from mambaformer.modeling_mambaformer.et5_pass import DECODE_LIBRARY, ET5_FORMATS, ET5Decoder, PackedET5
from mambaformer.modeling_mambaformer.lazy_et5 import LazyET5State
from mambaformer.modeling_mambaformer.sources import Sources
from mambaformer.modeling_mambaformer.weight_rounding import quantize_rows

pytestmark = pytest.mark.skipif(not hasattr(DECODE_LIBRARY, "mambaformer_et5_pass"), reason="the library is not built")
LENGTHS = [9, 4, 13, 6]


def tiny_mt5():
    torch.manual_seed(4)
    sizes = {"d_model": 40, "d_kv": 12, "d_ff": 72, "num_layers": 2, "num_heads": 3, "vocab_size": VOCAB}
    return MT5ForConditionalGeneration(MT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()


EXPERTS = {
    "v1.0": lambda: tiny_et5("v1.0"),
    "v1.1": lambda: tiny_et5("v1.1"),
    "untied": lambda: tiny_et5("untied"),
    "mt5": tiny_mt5,
}


def sources_of(batch: dict[str, torch.Tensor]) -> Sources:
    return Sources.build(batch["input_ids"], batch["attention_mask"], VOCAB)


@torch.no_grad()
def decoded(et5, decoder: ET5Decoder | None, calls, expand: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Logits of several calls `(rows, end, keep_from)` on one state."""
    sources = sources_of(random_batch(LENGTHS, seed=seed))
    rows = torch.arange(len(LENGTHS)).repeat_interleave(expand)
    ids = torch.randint(3, VOCAB, (len(rows), 40), generator=torch.Generator().manual_seed(seed))
    state, found = LazyET5State(sources, rows), []
    state.encode(et5, range(len(LENGTHS)))
    for wanted, end, keep_from in calls:
        found.append(state.decode(et5, ids, wanted, end, keep_from, decoder)[0])
    return found


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Rows and positions of every compiled pass."""
    seen, run = [], et5_pass.run_pass
    monkeypatch.setattr(
        lazy_et5,
        "run_pass",
        lambda memory, ids, rows, sources, start, end, kept: (
            seen.append((len(rows), end - start)) or run(memory, ids, rows, sources, start, end, kept)
        ),
    )
    return seen


CALLS = [([0, 2], 3, 2), ([1], 5, 1), ([0, 1, 2, 3], 6, 5), ([3, 0], 7, 6), ([2], 20, 17), ([0, 1, 2, 3], 22, 21)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", EXPERTS)
def test_logits_are_those_of_the_modules(kind, threads, passes, monkeypatch):
    """Some rows at a time, from wherever they stand, over padded sources and growing buffers."""
    monkeypatch.setattr(packed_weights, "PRODUCTS_A_THREAD", 1)
    et5, before = EXPERTS[kind](), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        here, there = decoded(et5, ET5Decoder(), CALLS), decoded(et5, None, CALLS)
    finally:
        torch.set_num_threads(before)
    assert len(passes) == len(CALLS)
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1], [2, 0]])
@torch.no_grad()
def test_keys_and_values_of_sources_are_kept_in_one_piece(order):
    """Those of the right source, whichever the encoder has read first, and nothing beside them."""
    et5 = tiny_et5("v1.1")
    count = len(LENGTHS)
    state = LazyET5State(sources_of(random_batch(LENGTHS, seed=1)), torch.arange(count))
    state.encode(et5, order)
    state.decode(et5, torch.zeros(count, 1, dtype=torch.long), order, 1, 0, ET5Decoder())
    (memory,) = {x.untyped_storage().data_ptr(): x.untyped_storage() for pair in state.cross for x in pair}.values()
    assert memory.nbytes() == sum(x.nbytes for pair in state.cross for x in pair)
    whole = LazyET5State(state.sources, torch.arange(count))
    whole.encode(et5, range(count))
    torch.testing.assert_close(state.encoder_states[order], whole.encoder_states[order], atol=1e-5, rtol=1e-5)
    tokens = state.sources.attention_mask.bool()[:, None, :, None]  # (B0, 1, S, 1)
    for (keys, values), block in zip(state.cross, et5.decoder.block, strict=True):
        attention = block.layer[1].EncDecAttention
        for kept, projection in ((keys, attention.k), (values, attention.v)):
            exact = projection(whole.encoder_states).unflatten(-1, (kept.shape[1], -1)).transpose(1, 2) * tokens
            torch.testing.assert_close(kept[order], exact[order])


def test_rows_of_one_source_and_far_distances(passes):
    """Two rows each share a source, and answers grow beyond the exact buckets of distance."""
    et5 = tiny_et5()
    calls = [([0, 1, 5], 4, 3), *(([1, 5, 6], end, end - 1) for end in range(5, 40, 5))]
    pairs = zip(decoded(et5, ET5Decoder(), calls, expand=2), decoded(et5, None, calls, expand=2), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert len(passes) == len(calls)


def test_modules_and_compiled_passes_take_turns(monkeypatch):
    """What either leaves behind, the other goes on with."""
    et5, compiled = tiny_et5(), ET5Decoder()
    plain = decoded(et5, None, CALLS)
    packed = compiled.packed
    for start in (0, 1):
        turn = iter(range(start, 100))
        monkeypatch.setattr(compiled, "packed", lambda *a, t=turn, **k: packed(*a, **k) if next(t) % 2 else None)
        for mine, theirs in zip(decoded(et5, compiled, CALLS), plain, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight_format", ET5_FORMATS)
def test_a_row_depends_neither_on_its_neighbours_nor_on_the_threads(weight_format, passes, monkeypatch):
    """To the bit, what PyTorch made of the source being the same; int8 takes all rows' positions in another way."""
    monkeypatch.setattr(packed_weights, "PRODUCTS_A_THREAD", 1)
    et5, packed = tiny_et5(), PackedET5(tiny_et5(), weight_format)
    sources, ids = sources_of(random_batch(LENGTHS)), torch.randint(3, VOCAB, (4, 11))

    def logits(rows: list[int], threads: int) -> torch.Tensor:
        state, before = LazyET5State(sources, torch.arange(4)), torch.get_num_threads()
        state.encode(et5, range(4))
        state._decode_compiled(packed, ids, list(range(4)), 0, 3, 2)
        try:
            torch.set_num_threads(threads)
            return state._decode_compiled(packed, ids, rows, 3, 11, 8)
        finally:
            torch.set_num_threads(before)

    with torch.no_grad():
        together = logits([0, 1, 2, 3], 1)
        assert torch.equal(logits([0, 1, 2, 3], 2), together)
        for row in range(4):
            assert torch.equal(logits([row], 1)[0], together[row])


@pytest.mark.parametrize("weight_format", ET5_FORMATS)
@torch.no_grad()
def test_positions_at_once_say_what_they_say_one_by_one(weight_format):
    """To the bit, though they take the keys of long sources in other pieces; ids lie in memory as they may."""
    et5, packed = tiny_et5(), PackedET5(tiny_et5(), weight_format)
    sources, ids = sources_of(random_batch([150, 70])), torch.randint(3, VOCAB, (2, 90)).t().contiguous().t()

    def logits(step: int) -> torch.Tensor:
        state = LazyET5State(sources, torch.arange(2))
        state.encode(et5, range(2))
        state._decode_compiled(packed, ids, [0, 1], 0, 75, 75)
        parts = [state._decode_compiled(packed, ids, [0, 1], at, at + step, at) for at in range(75, 89, step)]
        return torch.cat(parts, dim=1)

    together = logits(14)
    assert together.shape == (2, 14, VOCAB) and together.isfinite().all()
    for step in (1, 2, 7):
        assert torch.equal(logits(step), together)


def test_int8_is_what_rounded_weights_give():
    """Against the modules with the same rounded decoder matrices; the inputs' rounding is what remains."""
    et5 = tiny_et5("untied")
    rounded = copy.deepcopy(et5)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            cross = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))  # once a source, by PyTorch
            if isinstance(module, torch.nn.Linear) and not name.startswith("encoder") and not cross:
                whole, scale = quantize_rows(module.weight)
                module.weight.copy_(whole * scale[:, None])
    exact, near = decoded(et5, None, CALLS), decoded(rounded, None, CALLS)
    for mine, other, full in zip(decoded(et5, ET5Decoder("int8"), CALLS), near, exact, strict=True):
        assert (mine - other).norm() < 0.1 * other.norm()
        assert (mine - full).norm() < 0.12 * full.norm()
        assert not torch.equal(mine, full)


def test_large_passes_go_to_the_modules(passes):
    et5 = tiny_et5()
    decoded(et5, ET5Decoder(), [([0, 1, 2, 3], et5_pass.MOST_TOKENS // 4 + 1, 0)])
    assert not passes
    decoded(et5, ET5Decoder(), [([0, 1, 2, 3], et5_pass.MOST_TOKENS // 4, 0)])
    assert passes == [(4, et5_pass.MOST_TOKENS // 4)]


def test_it_steps_aside(passes):
    """Gradients, training, hooks, another precision, an adapter inside, `off`: the modules are run, right as ever."""
    et5, calls = tiny_et5(), CALLS[:2]
    plain = decoded(et5, None, calls)

    def by_modules(model=et5, decoder: ET5Decoder | None = None) -> bool:
        passes.clear()
        found = decoded(model, decoder or ET5Decoder(), calls)
        assert all((x.float() - y).norm() < 0.1 * y.norm() for x, y in zip(found, plain, strict=True))
        return not passes

    assert not by_modules()
    hook = et5.decoder.block[1].layer[0].register_forward_hook(lambda *_: None)
    assert by_modules()
    hook.remove()
    assert by_modules(decoder=ET5Decoder("off"))
    assert by_modules(model=copy.deepcopy(et5).to(torch.bfloat16))

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x):
            return self.inner(x)

    adapted = copy.deepcopy(et5)
    adapted.decoder.block[0].layer[0].SelfAttention.q = Wrapped(adapted.decoder.block[0].layer[0].SelfAttention.q)
    assert by_modules(model=adapted)
    et5.train()
    assert by_modules()
    et5.eval()
    assert not by_modules()


def test_changed_weights_are_noticed():
    et5, compiled = tiny_et5(), ET5Decoder("int8")
    before = decoded(et5, compiled, CALLS[:1])[0]
    for change in (lambda w: w.mul_(1.5), lambda w: w.data.mul_(1.5)):  # PyTorch does not count the second
        with torch.no_grad():
            change(et5.decoder.block[0].layer[2].DenseReluDense.wo.weight)
        after = decoded(et5, compiled, CALLS[:1])[0]
        assert not torch.allclose(before, after, atol=1e-3)
        before = after


def test_bad_ids_are_named():
    et5 = tiny_et5()
    packed = PackedET5(et5, "float32")
    state = LazyET5State(sources_of(random_batch(LENGTHS)), torch.arange(4))
    with torch.no_grad(), pytest.raises(IndexError, match="outside"):
        state.encode(et5, range(4))
        state._decode_compiled(packed, torch.full((1, 1), VOCAB + 5), [0], 0, 1, 0)
    with torch.no_grad(), pytest.raises(IndexError, match="position 2 .* shape"):
        state._decode_compiled(packed, torch.full((1, 1), 5), [0], 0, 2, 0)


@pytest.mark.parametrize("weight_format", ["float32", "int8"])
def test_generation(et5_folder, emamba_folder, passes, weight_format):
    """Routed answers, at once and alone; the format is kept by the configuration, the packed weights are not."""
    model, batch = mixed_model(et5_folder, emamba_folder).pack_et5(weight_format), random_batch(LENGTHS)
    options = {"max_new_tokens": 14, "return_dict_in_generate": True, "output_logits": True}
    here = model.generate(**batch, **options)
    assert passes and model.config.et5_decode == weight_format
    there = model.pack_et5("off").generate(**batch, **options)
    if weight_format == "float32":
        assert torch.equal(here.sequences, there.sequences)
        torch.testing.assert_close(torch.stack(here.logits), torch.stack(there.logits), atol=1e-4, rtol=1e-4)
    assert pickle.loads(pickle.dumps(model.et5_decoder))._ready is None


def test_unknown_formats_are_refused():
    for make in (ET5Decoder, lambda name: MambaFormerConfig(et5_decode=name)):
        with pytest.raises(ValueError, match="int3"):
            make("int3")
