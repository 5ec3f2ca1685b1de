# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""EMamba's compiled decoding step: the same tokens as its modules, and its modules wherever it must not be used."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from mixed_routing import mixed_model
from step_sizes import step_sizes
from tiny_experts import VOCAB, random_batch, tiny_emamba
from torch import nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from mambaformer import MambaFormerConfig, MambaFormerForConditionalGeneration, embedded_checkpoint, format_source
from mambaformer.dental_qa import load_dental_qa
from mambaformer.modeling_mambaformer import emamba_decoder, module_snapshot, packed_weights
from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder
from mambaformer.modeling_mambaformer.emamba_stream import head_logits, read_on, read_source
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY, quantize_rows
from mambaformer.modeling_mambaformer.sources import Sources

pytestmark = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled decoding step is not built")
LENGTHS = [7, 3, 11, 5]
STEPS = 5
BOUNDS = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.08}
"""Largest deviation of a logit, relative to the largest logit, for weights that amplify errors."""


@pytest.fixture
def emamba() -> MambaForCausalLM:
    """A tiny Mamba whose state matters, on our scan."""
    model = tiny_emamba(layers=3)
    use_selective_scan(model)
    return model


@pytest.fixture(scope="module")
def composed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder).eval()


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The batch sizes of the compiled steps that were run."""
    return step_sizes(monkeypatch)


def odd_emamba(**options) -> MambaForCausalLM:
    """A Mamba of sizes that fill no vector, with everything optional that a Mamba may have."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 17, "intermediate_size": 35, "state_size": 5, "conv_kernel": 3, "time_step_rank": 3}
    config = MambaConfig(vocab_size=33, num_hidden_layers=2, **{**sizes, "use_bias": True, **options})
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 3)
        model.backbone.norm_f.weight.mul_(10)
    use_selective_scan(model)
    return model


def begin(model: MambaForCausalLM, rows: int, seed: int = 0) -> tuple[DynamicCache, torch.Tensor]:
    """The state after a random source of nine tokens, and tokens `(rows, STEPS)` to read on."""
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (rows, 9 + STEPS), generator=torch.Generator().manual_seed(seed))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], cache_params=cache, use_cache=True)
    return cache, ids[:, 9:]


def by_modules(model: MambaForCausalLM, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        columns = [model(column, cache_params=cache, use_cache=True).logits.float() for column in ids.split(1, 1)]
    return torch.cat(columns, 1)


def by_steps(decoder: EMambaDecoder, model: nn.Module, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the compiled step, which must apply; its hidden states must be those that the logits belong to."""
    logits = []
    with torch.no_grad():
        for column in ids.split(1, 1):
            hidden, said = decoder.step(model, cache, column)
            logits.append(said)
            scale = said.abs().max()
            assert (model.lm_head(hidden).float() - said).abs().max() <= BOUNDS[decoder.weight_format] * scale
    return torch.cat(logits, 1)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def states_of(cache: DynamicCache) -> list[torch.Tensor]:
    return [x.float() for layer in cache.layers for x in (layer.conv_states[0], layer.recurrent_states[0])]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("weight_format", BOUNDS)
def test_the_step_says_what_the_modules_say(emamba, weight_format, rows, instructions):
    cache, ids = begin(emamba, rows)
    own = copy.deepcopy(cache)
    found = by_steps(EMambaDecoder(weight_format), emamba, own, ids)
    expected = by_modules(emamba, cache, ids)
    assert deviation(found, expected) < BOUNDS[weight_format]
    if weight_format == "float32":
        assert (found - expected).abs().max() < 1e-4
    for mine, theirs in zip(states_of(own), states_of(cache), strict=True):
        assert deviation(mine, theirs) < BOUNDS[weight_format]


@pytest.mark.parametrize("options", [{}, {"use_conv_bias": False, "use_bias": False, "tie_word_embeddings": False}])
@pytest.mark.parametrize("weight_format", BOUNDS)
def test_odd_sizes(weight_format, options, instructions):
    model = odd_emamba(**options)
    cache, ids = begin(model, 4)
    found = by_steps(EMambaDecoder(weight_format), model, copy.deepcopy(cache), ids)
    assert deviation(found, by_modules(model, cache, ids)) < BOUNDS[weight_format]


@pytest.mark.parametrize("rows", [5, 17])  # the latter more than int8 takes one by one
@pytest.mark.parametrize("weight_format", BOUNDS)
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(weight_format, rows, instructions, monkeypatch):
    monkeypatch.setattr(packed_weights, "PRODUCTS_A_THREAD", 1)
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=128, num_hidden_layers=2, state_size=16)
    model = MambaForCausalLM(config).eval()
    use_selective_scan(model)
    cache, ids = begin(model, rows)
    decoder, before = EMambaDecoder(weight_format), torch.get_num_threads()
    together = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together.append(by_steps(decoder, model, copy.deepcopy(cache), ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], together[2])
    for row in range(rows):
        alone = copy.deepcopy(cache)
        alone.reorder_cache(torch.tensor([row]))
        assert torch.equal(by_steps(decoder, model, alone, ids[row : row + 1]), together[0][row : row + 1])


def test_modules_and_steps_take_turns(emamba):
    cache, ids = begin(emamba, 2)
    own, decoder = copy.deepcopy(cache), EMambaDecoder()
    parts = [
        by_steps(decoder, emamba, own, ids[:, :1]),
        by_modules(emamba, own, ids[:, 1:2]),
        by_steps(decoder, emamba, own, ids[:, 2:4]),
        emamba(ids[:, 4:], cache_params=own, use_cache=True).logits.detach(),
    ]
    assert deviation(torch.cat(parts, 1), by_modules(emamba, cache, ids)) < 1e-5


def test_bfloat16_weights_are_float32_weights_of_these_values(emamba):
    """Rounding happens once, in packing: the step on rounded copies is the step on a rounded model."""
    cache, ids = begin(emamba, 2)
    rounded = copy.deepcopy(emamba)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight")):
                parameter.copy_(parameter.bfloat16())
        rounded.lm_head.weight = nn.Parameter(emamba.lm_head.weight.detach().bfloat16().float())
    expected = by_steps(EMambaDecoder(), rounded, copy.deepcopy(cache), ids)
    assert deviation(by_steps(EMambaDecoder("bfloat16"), emamba, cache, ids), expected) < 1e-6


def test_int8_rows_have_one_scale_each():
    weight = torch.randn(5, 40) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-30])[:, None]
    whole, scale = quantize_rows(weight)
    assert whole.dtype == torch.int8 and int(whole.abs().max()) == 127 and not whole[3].any()
    assert ((whole * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()


def test_a_model_in_bfloat16_steps_in_float32(emamba):
    exact = copy.deepcopy(emamba)
    emamba.to(torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), emamba.parameters(), strict=True):
            mine.copy_(theirs)
    cache, ids = begin(emamba, 3)
    own = DynamicCache(config=exact.config)
    with torch.no_grad():
        exact(torch.zeros(3, 9, dtype=torch.long), cache_params=own, use_cache=True)
    for mine, theirs in zip(own.layers, cache.layers, strict=True):
        assert theirs.conv_states[0].dtype == torch.bfloat16
        mine.conv_states[0].copy_(theirs.conv_states[0])
        mine.recurrent_states[0].copy_(theirs.recurrent_states[0])
    expected = by_steps(EMambaDecoder(), exact, own, ids[:, :1])
    decoder = EMambaDecoder()
    with torch.no_grad():
        hidden, logits = decoder.step(emamba, cache, ids[:, :1])
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert deviation(logits, expected) < 0.01  # the window is rounded to bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"routing": "emamba"}, {"num_beams": 2, "routing": "emamba"}]
)
def test_generate_says_the_same_with_and_without(composed, side, options, steps):
    batch = random_batch(LENGTHS, seed=2, side=side)
    asked = {**batch, "max_new_tokens": 10, "return_dict_in_generate": True, **options}
    output = composed.pack_emamba("float32").generate(**asked)
    assert steps == [len(LENGTHS) * options.get("num_beams", 1)] * len(steps) and len(steps) >= 9
    expected = composed.pack_emamba("off").generate(**asked)
    assert len(steps) <= 10
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.route_trace.expert, expected.route_trace.expert)
    assert torch.allclose(output.route_trace.margin, expected.route_trace.margin, atol=1e-4, equal_nan=True)


def test_a_prompt_of_several_tokens_is_read_by_the_modules(composed, steps):
    batch, prompt = random_batch(LENGTHS, seed=3), torch.randint(3, VOCAB, (4, 3))
    prompt[:, 0] = 0
    asked = {**batch, "decoder_input_ids": prompt, "max_new_tokens": 6}
    found = composed.pack_emamba("float32").generate(**asked)
    assert len(steps) == 5
    assert torch.equal(found, composed.pack_emamba("off").generate(**asked))


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8"])
def test_generate_with_rounded_weights(composed, weight_format, steps):
    batch = random_batch(LENGTHS, seed=4)
    output = composed.pack_emamba(weight_format).generate(**batch, max_new_tokens=6, routing="emamba")
    assert output.shape == (4, 7) and len(steps) == 6
    composed.pack_emamba("float32")


def hook(model):
    model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)


def adapt(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["in_proj"], r=2), model)
    model.eval()


def replace_forward(model):
    mixer = model.backbone.layers[0].mixer
    mixer.forward = mixer.forward


@pytest.mark.parametrize(
    "disturb, said",
    [
        (hook, "hooks"),
        (adapt, "adapters"),
        (replace_forward, "hooks"),
        (lambda model: model.double(), "float64"),
        (lambda model: model.to("meta"), "meta"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "gelu"),
    ],
)
def test_off_for_an_unusual_model_before_and_during_a_sequence(emamba, disturb, said, caplog, monkeypatch):
    module_snapshot.report.cache_clear()
    monkeypatch.setattr(module_snapshot.logger, "propagate", True)
    module_snapshot.logger.setLevel("INFO")
    cache, ids = begin(emamba, 1)
    decoder = EMambaDecoder()
    by_steps(decoder, emamba, cache, ids[:, :1])
    disturb(emamba)
    fresh = EMambaDecoder()
    with torch.no_grad():
        assert fresh.prepare(emamba) is None and fresh.step(emamba, cache, ids[:, 1:2]) is None
        if said != "gelu":  # a configuration changed under a running sequence is not looked at
            assert decoder.step(emamba, cache, ids[:, 1:2]) is None
    lines = [record for record in caplog.records if "decoding step" in record.getMessage()]
    assert len(lines) == 1 and said in lines[0].getMessage()


def test_off_where_gradients_training_casting_or_several_tokens_need_the_modules(emamba, monkeypatch):
    cache, ids = begin(emamba, 1)
    decoder = EMambaDecoder()
    assert decoder.step(emamba, cache, ids[:, :1]) is None  # gradients
    with torch.no_grad():
        assert decoder.step(emamba, cache, ids[:, :2]) is None
        assert decoder.step(emamba.train(), cache, ids[:, :1]) is None
        emamba.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert decoder.step(emamba, cache, ids[:, :1]) is None
        assert decoder.step(emamba, DynamicCache(config=emamba.config), ids[:, :1]) is None  # nothing read before
        assert decoder.step(emamba, cache, torch.cat([ids, ids])[:, :1]) is None  # rows that the cache does not have
        assert EMambaDecoder("off").step(emamba, cache, ids[:, :1]) is None
        monkeypatch.setenv("MAMBAFORMER_SCAN", "torch")
        assert EMambaDecoder().step(emamba, cache, ids[:, :1]) is None
        monkeypatch.delenv("MAMBAFORMER_SCAN")
        monkeypatch.setattr(emamba_decoder, "DECODE_LIBRARY", None)
        assert EMambaDecoder().step(emamba, cache, ids[:, :1]) is None
        monkeypatch.undo()
        assert decoder.step(emamba, cache, ids[:, :1]) is not None


def test_off_for_other_families():
    config = FalconMambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = FalconMambaForCausalLM(config).eval()
    assert EMambaDecoder().prepare(model) is None


def in_place(model):
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)


def through_data(model):
    model.backbone.layers[0].mixer.A_log.data.add_(0.5)
    model.backbone.layers[1].mixer.out_proj.weight.data.mul_(-1)


def other_parameter(model):
    model.backbone.layers[1].mixer.out_proj.weight = nn.Parameter(torch.randn(24, 48))


def other_module(model):
    model.backbone.layers[2].mixer.x_proj = nn.Linear(48, 18, bias=False)


def other_memory(model):
    model.backbone.layers[0].norm.weight.data = torch.rand(24)


@pytest.mark.parametrize("change", [in_place, through_data, other_parameter, other_module, other_memory])
@pytest.mark.parametrize("weight_format", BOUNDS)
def test_changed_weights_are_never_stale(emamba, weight_format, change):
    cache, ids = begin(emamba, 1)
    decoder = EMambaDecoder(weight_format)
    before = by_steps(decoder, emamba, copy.deepcopy(cache), ids)
    change(emamba)
    if change is through_data:  # which PyTorch does not count: seen when the next source is read
        decoder.prepare(emamba)
    found = by_steps(decoder, emamba, copy.deepcopy(cache), ids)
    assert deviation(before, found) > 1e-3
    assert torch.equal(found, by_steps(EMambaDecoder(weight_format), emamba, cache, ids))


def test_nothing_is_packed_twice(emamba):
    cache, ids = begin(emamba, 1)
    decoder = EMambaDecoder("int8")
    packed = decoder.prepare(emamba)
    by_steps(decoder, emamba, cache, ids)
    assert decoder.prepare(emamba) is packed


def test_float32_copies_no_matrix(emamba):
    packed = EMambaDecoder().prepare(emamba)
    assert packed.copied_bytes == sum(block.mixer.A_log.nbytes for block in emamba.backbone.layers)
    matrices = EMambaDecoder("int8").prepare(emamba)
    assert matrices.step_bytes < packed.step_bytes / 2


def test_a_bad_id_changes_nothing(emamba):
    cache, ids = begin(emamba, 2)
    before = [x.clone() for x in states_of(cache)]
    for bad in (-1, VOCAB):
        with torch.no_grad(), pytest.raises(IndexError, match=str(bad)):
            EMambaDecoder().step(emamba, cache, torch.tensor([[5], [bad]]))
    assert all(torch.equal(x, y) for x, y in zip(before, states_of(cache), strict=True))


@pytest.mark.parametrize("weight_format", BOUNDS)
def test_what_is_not_finite_shows(emamba, weight_format, instructions):
    cache, ids = begin(emamba, 2)
    cache.layers[1].recurrent_states[0][0, 3, 2] = float("nan")
    with torch.no_grad():
        logits = EMambaDecoder(weight_format).step(emamba, cache, ids[:, :1])[1]
    assert logits[0].isnan().all() and logits[1].isfinite().all()


def test_the_choice_is_saved_and_copied(composed, tmp_path):
    batch = random_batch(LENGTHS, seed=5)
    expected = composed.pack_emamba("int8").generate(**batch, max_new_tokens=4, routing="emamba")
    composed.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    for model in (loaded, copy.deepcopy(composed)):
        assert model.emamba_decoder.weight_format == model.config.emamba_decode == "int8"
        assert torch.equal(model.generate(**batch, max_new_tokens=4, routing="emamba"), expected)
    assert pickle.loads(pickle.dumps(composed.emamba_decoder))._ready is None
    composed.pack_emamba("float32")


def test_unknown_formats_are_refused(composed):
    with pytest.raises(ValueError, match="int3"):
        composed.pack_emamba("int3")
    with pytest.raises(ValueError, match="int3"):
        MambaFormerConfig(emamba_decode="int3")
    assert composed.config.emamba_decode == "float32"


def test_int8_agrees_with_float32_on_dental_answers():
    """Greedy tokens of the embedded EMamba, teacher-forced on held-out answers."""
    folder = embedded_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MambaFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows = random.Random(0).sample(list(load_dental_qa("test_phrasing")), 40)
    same, total = dict.fromkeys(BOUNDS, 0), 0
    decoders = {weight_format: EMambaDecoder(weight_format) for weight_format in BOUNDS}
    with torch.no_grad():
        for row in rows:
            source = tokenizer(format_source(row["question"], row["context"] or None), return_tensors="pt")
            answer = tokenizer(row["answer"], return_tensors="pt").input_ids[:, :48]
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            ids = torch.cat([start, answer[:, :-1]], 1)
            sources = Sources.build(source.input_ids, source.attention_mask, model.config.vocab_size)
            cache, _ = read_source(model.emamba, sources)
            caches = {weight_format: copy.deepcopy(cache) for weight_format in BOUNDS}
            wanted = head_logits(model.emamba, read_on(model.emamba, cache, ids)).argmax(-1)  # (1, T)
            total += wanted.numel()
            for weight_format, decoder in decoders.items():
                said = [decoder.step(model.emamba, caches[weight_format], x)[1] for x in ids.split(1, 1)]
                same[weight_format] += int((torch.cat(said, 1).argmax(-1) == wanted).sum())
    assert total > 500
    assert same["float32"] == total and same["bfloat16"] >= 0.98 * total and same["int8"] >= 0.95 * total, same
