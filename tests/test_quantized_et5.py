# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""ET5's rounded weights: near the float ones, saved and loaded to the bit, read by encoder and compiled pass."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from mixed_routing import mixed_model
from test_et5_pass import CALLS, EXPERTS, LENGTHS, decoded, passes
from tiny_experts import VOCAB, random_batch, tiny_et5
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from mambaformer import MambaFormerForConditionalGeneration, MambaFormerQuantizationConfig
from mambaformer.cli import ROUNDED_ET5, main
from mambaformer.modeling_mambaformer import native_linear
from mambaformer.modeling_mambaformer.et5_pass import ET5Decoder, PackedET5
from mambaformer.modeling_mambaformer.quantized_et5 import ET5_ROUNDED, restore_et5, round_et5
from mambaformer.modeling_mambaformer.quantized_modules import RoundedWeight, is_rounded

__all__ = ["passes"]  # a fixture
compiled = pytest.mark.skipif(not native_linear.AVAILABLE, reason="the compiled product is not built")
NEAR, LOGITS_NEAR = 0.08, 0.3
"""Relative deviations of encoder states and logits from float ones, of tiny random experts with amplified weights."""
FORCED = {"max_new_tokens": 6, "routing": "et5", "return_dict_in_generate": True, "output_logits": True}


def tiny_umt5() -> UMT5ForConditionalGeneration:
    torch.manual_seed(4)
    sizes = {"d_model": 40, "d_kv": 12, "d_ff": 72, "num_layers": 2, "num_heads": 3, "vocab_size": VOCAB}
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()


KINDS = {**EXPERTS, "umt5": tiny_umt5}


@pytest.fixture(params=KINDS)
def et5(request) -> nn.Module:
    """A tiny float expert of each kind."""
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def folders(emamba_folder, tmp_path_factory) -> dict[str, Path]:
    """A composed float32 model of each kind, with its tokenizer."""
    made = {}
    for kind, make in KINDS.items():
        expert, made[kind] = tmp_path_factory.mktemp("expert"), tmp_path_factory.mktemp("whole")
        make().save_pretrained(expert)
        mixed_model(expert, emamba_folder).save_pretrained(made[kind])
        tiny_tokenizer().save_pretrained(made[kind])
    return made


def load(folder: Path, **options) -> MambaFormerForConditionalGeneration:
    return MambaFormerForConditionalGeneration.from_pretrained(folder, **options)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def encoded(et5: nn.Module, exact: bool = False) -> torch.Tensor:
    """States of the encoder; `exact` records gradients, which keeps inputs of rounded layers as they are."""
    with torch.set_grad_enabled(exact):
        return et5.encoder(**random_batch(LENGTHS))[0].detach()


def answers(model: nn.Module, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of answers, by default all from ET5."""
    found = model.generate(**random_batch(LENGTHS), **{**FORCED, **options})
    return found.sequences, torch.stack(found.logits)


# ---- ET5 by itself


def test_what_is_rounded_and_what_is_not(et5):
    tied = et5.lm_head.weight is et5.shared.weight
    round_et5(et5, "int8")
    kinds = {name: p.dtype for name, p in et5.named_parameters()}
    assert not any(isinstance(module, nn.Linear) for module in et5.modules())
    assert et5.shared is et5.encoder.embed_tokens is et5.decoder.embed_tokens
    assert (et5.lm_head.qweight is et5.shared.qweight) == tied == ("lm_head.qweight" not in kinds)
    for name, dtype in kinds.items():
        assert dtype == (torch.int8 if name.endswith("qweight") else torch.float32), name
        assert name.endswith((".qweight", ".scales", "layer_norm.weight", "relative_attention_bias.weight"))
    assert all(module.scales.shape == (module.rows,) for module in et5.modules() if isinstance(module, RoundedWeight))


def test_states_and_logits_are_near(et5):
    exact = encoded(et5), decoded(et5, None, CALLS)
    round_et5(et5, "int8")
    assert 0 < apart(encoded(et5), exact[0]) < NEAR
    for mine, theirs in zip(decoded(et5, None, CALLS), exact[1], strict=True):
        assert 0 < apart(mine, theirs) < LOGITS_NEAR


def test_restored_weights_are_the_rounded_values(et5):
    tied = et5.lm_head.weight is et5.shared.weight
    round_et5(et5, "int8")
    expected = encoded(et5, exact=True)
    et5.tie_weights()
    assert (et5.lm_head.qweight is et5.shared.qweight) == tied
    restore_et5(et5, torch.float32)
    assert not is_rounded(et5) and (et5.lm_head.weight is et5.shared.weight) == tied
    assert et5.encoder.embed_tokens.weight is et5.decoder.embed_tokens.weight is et5.shared.weight
    assert ("lm_head.weight" in et5.all_tied_weights_keys) == tied
    torch.testing.assert_close(encoded(et5), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in et5.parameters())


@compiled
@pytest.mark.parametrize("kind", EXPERTS)
def test_the_compiled_pass_says_what_the_modules_say(kind, instructions, passes):
    """Both multiply the same whole numbers; odd sizes, whose rows are filled up, and scaled embeddings."""
    et5 = EXPERTS[kind]()
    round_et5(et5, "int8")
    for choice in ("float32", "int8"):
        passes.clear()
        here, there = decoded(et5, ET5Decoder(choice), CALLS), decoded(et5, None, CALLS)
        assert len(passes) == len(CALLS)
        for mine, theirs in zip(here, there, strict=True):
            assert apart(mine, theirs) < 1e-4


@compiled
def test_the_pass_reads_the_tensors_themselves():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
    et5 = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    float_bytes = PackedET5(et5, "float32").pass_bytes
    round_et5(et5, "int8")
    packed = PackedET5(et5, "float32")
    block = et5.decoder.block[0].layer
    assert packed.layers[0].q.data == block[0].SelfAttention.q.qweight.data_ptr()
    assert packed.model.embedding == packed.head.data == et5.shared.qweight.data_ptr()
    assert packed.copied_bytes == 4 * (8 * 64 + 2 * 128 + 64 + VOCAB)  # the sums of rows
    assert packed.pass_bytes == float_bytes // 4


def test_changed_weights_are_noticed():
    et5, decoder = tiny_et5(), ET5Decoder()
    round_et5(et5, "int8")
    before = decoded(et5, decoder, CALLS[:1])[0]
    for change in (lambda w: w.neg_(), lambda w: w.data.copy_(w.data.roll(1, 0))):  # the second PyTorch does not count
        with torch.no_grad():
            change(et5.decoder.block[0].layer[2].DenseReluDense.wo.qweight)
        after = decoded(et5, decoder, CALLS[:1])[0]
        assert not torch.allclose(before, after, atol=1e-3)
        before = after


def test_a_source_depends_little_on_its_neighbours():
    """Its own products do not at all; attention is PyTorch's."""
    et5 = tiny_et5()
    round_et5(et5, "int8")
    batch = random_batch(LENGTHS)
    together = encoded(et5)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            alone = et5.encoder(input_ids=batch["input_ids"][row : row + 1, :length])[0]
        assert apart(together[row : row + 1, :length], alone) < 0.02


# ---- in a model


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind, folders, tmp_path):
    model = load(folders[kind])
    exact = answers(model)
    model.quantize("int8", et5="int8").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["quantization_config"] == {"quant_method": "mambaformer", "weights": "int8", "et5": "int8"}
    loaded, info = MambaFormerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[which] for which in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    at_load = load(folders[kind], quantization_config=MambaFormerQuantizationConfig("int8", et5="int8"))
    tokens, logits = answers(model)
    assert apart(logits[0], exact[1][0]) < LOGITS_NEAR
    for other in (loaded, at_load, copy.deepcopy(loaded)):
        found = answers(other)
        assert torch.equal(found[0], tokens) and torch.equal(found[1], logits)
        assert other.et5.shared is other.et5.encoder.embed_tokens is other.et5.decoder.embed_tokens
        assert (other.et5.lm_head.qweight is other.et5.shared.qweight) == (kind != "untied")
        assert not any(p.requires_grad for n, p in other.named_parameters() if n.endswith((".qweight", ".scales")))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_a_plain_model(kind, folders, tmp_path):
    model = load(folders[kind]).quantize("int8", et5="int8")
    expected = encoded(model.et5, exact=True)
    model = model.dequantize()
    assert not is_rounded(model) and apart(encoded(model.et5), expected) < 1e-5
    model.train().eval()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert getattr(loaded.config, "quantization_config", None) is None
    assert torch.equal(encoded(loaded.et5), encoded(model.et5)) and torch.equal(answers(loaded)[1], answers(model)[1])
    assert (loaded.et5.lm_head.weight is loaded.et5.shared.weight) == (kind != "untied")


def test_either_expert_alone(folders, tmp_path):
    """A checkpoint of EMamba alone has no word of ET5, as those of earlier versions."""
    source = folders["v1.1"]
    for chosen, written in (
        ({"weights": None, "et5": "int8"}, {"weights": None, "et5": "int8"}),
        ({}, {"weights": "int8"}),
    ):
        folder = tmp_path / str(len(written))
        load(source).quantize(**chosen).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert config == {"quant_method": "mambaformer", **written}
        model = load(folder)
        assert is_rounded(model.emamba) == (written["weights"] is not None) and is_rounded(model.et5) == bool(chosen)
        answers(model, routing="auto")
        assert not is_rounded(model.dequantize())


def test_mixed_answers_and_beams(folders, passes):
    model = load(folders["v1.1"]).quantize("int8", et5="int8")
    options = {"routing": "auto", "max_new_tokens": 12}
    here = answers(model, **options)
    assert passes or not native_linear.AVAILABLE
    there = answers(model.pack_et5("off"), **options)
    assert apart(here[1][0], there[1][0]) < 1e-4
    assert answers(model, routing="auto", num_beams=2)[0].shape[0] == len(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rounded", [True, False])
def test_the_default_dtype_does_not_matter(folders, rounded, dtype):
    """Compiled code writes float32, whatever PyTorch makes by default."""
    model, before = load(folders["v1.1"]), torch.get_default_dtype()
    if rounded:
        model.quantize("int8", et5="int8")
    wanted = [answers(model, routing=routing) for routing in ("et5", "emamba", "auto")]
    try:
        torch.set_default_dtype(dtype)
        found = [answers(model, routing=routing) for routing in ("et5", "emamba", "auto")]
    finally:
        torch.set_default_dtype(before)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[1].float(), theirs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_in_bfloat16_et5_stays_float32(folders, tmp_path, attention):
    """Norms and biases of distance are few, and the states need their precision."""
    load(folders["v1.1"]).quantize("int8", et5="int8").save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16, attn_implementation=attention)
    at_load = load(
        folders["v1.1"],
        dtype=torch.bfloat16,
        attn_implementation=attention,
        quantization_config=MambaFormerQuantizationConfig("int8", et5="int8"),
    )
    whole = load(tmp_path)
    for model in (loaded, at_load):
        assert {p.dtype for p in model.et5.parameters()} == {torch.int8, torch.float32}
        assert model.router.hidden_proj.weight.dtype == torch.bfloat16
        assert apart(answers(model)[1][0], answers(whole)[1][0]) < 0.15
        answers(model, routing="auto")
    restored = loaded.dequantize()
    assert {p.dtype for p in restored.et5.parameters()} == {torch.bfloat16}


def test_it_takes_about_a_quarter(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "vocab_size": 2048}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "et5")
    emamba = MambaConfig(vocab_size=2048, hidden_size=256, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    MambaForCausalLM(emamba).save_pretrained(tmp_path / "emamba")
    model = MambaFormerForConditionalGeneration.from_experts_pretrained(
        str(tmp_path / "et5"), str(tmp_path / "emamba")
    )
    before = sum(parameter.nbytes for parameter in model.parameters())
    model.quantize("int8", et5="int8").save_pretrained(tmp_path / "rounded")
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.3 * before
    assert (tmp_path / "rounded" / "model.safetensors").stat().st_size < 0.3 * before


@compiled
def test_the_encoder_runs_on_int8_products(folders, monkeypatch):
    model, seen, run = load(folders["v1.1"]).quantize(None, et5="int8"), [], native_linear.is_served
    monkeypatch.setattr(native_linear, "is_served", lambda layer, *rest: seen.append(layer) or run(layer, *rest))
    fast = encoded(model.et5)
    linear = [module for module in model.et5.encoder.modules() if hasattr(module, "in_features")]
    assert {id(layer) for layer in seen} == {id(layer) for layer in linear}
    monkeypatch.setattr(native_linear, "AVAILABLE", False)
    assert 0 < apart(fast, encoded(model.et5)) < LOGITS_NEAR


# ---- what is refused


def test_training_is_refused_by_name(folders):
    both = load(folders["v1.1"]).quantize("int8", et5="int8")
    with pytest.raises(ValueError, match=r"EMamba's and ET5's weights are rounded and cannot be trained.*`model.dequ"):
        both.train()
    assert not any(module.training for module in both.modules())
    with pytest.raises(ValueError, match="^ET5's weights are rounded"):
        both.et5.train()
    with pytest.raises(ValueError, match="^ET5's weights are rounded"):
        load(folders["v1.1"]).quantize(None, et5="int8").train()


def test_bad_choices_name_the_value_and_change_nothing(folders):
    for bad, said in (({"et5": "int4"}, "et5 is 'int4'.*'int8'"), ({"weights": None}, "weights is None")):
        with pytest.raises(ValueError, match=said):
            MambaFormerQuantizationConfig(**bad)
    model = load(folders["v1.1"])
    with pytest.raises(ValueError, match="et5 is 'int4'"):
        round_et5(model.et5, "int4")
    et5 = model.et5
    model.et5 = BartForConditionalGeneration(
        BartConfig(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=16)
    )
    with pytest.raises(ValueError, match="family 'bart'.*keep its float weights"):
        model.quantize("int8", et5="int8")
    assert not is_rounded(model) and not getattr(model, "is_quantized", False)
    model.et5 = et5
    model.quantize("int8")
    with pytest.raises(ValueError, match="EMamba's weights are rounded already"):
        model.quantize(None, et5="int8")
    assert not is_rounded(model.et5)
    rounded = tiny_et5()
    round_et5(rounded, "int8")
    with pytest.raises(ValueError, match="ET5's weights are rounded already"):
        round_et5(rounded, "int8")


# ---- the command line


def test_the_command(folders, tmp_path, capsys):
    assert ROUNDED_ET5 == ET5_ROUNDED
    assert main(["quantize", str(folders["untied"]), str(tmp_path / "out"), "--et5", "int8"]) == 0
    said = capsys.readouterr().out
    assert "ET5's to int8" in said and "ET5 " in said
    model = load(tmp_path / "out")
    assert is_rounded(model.et5) and is_rounded(model.emamba) and model.config.quantization_config.et5 == "int8"
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "more"), "--et5", "int8"]) == 2
    assert "--weights int8 --et5 int8" in (said := capsys.readouterr().err) and "rounded already" in said
