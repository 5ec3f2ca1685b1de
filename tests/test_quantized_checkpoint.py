# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""EMamba's rounded weights: saved and loaded as any quantised model is, decoded by the compiled step, not trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from mixed_routing import mixed_model
from remote_code_probe import bare_environment, run_bare
from safetensors.torch import load_file
from step_sizes import step_sizes
from test_emamba_decoder import begin, by_modules, deviation, odd_emamba
from tiny_experts import VOCAB, random_batch, tiny_emamba
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from mambaformer import MambaFormerForConditionalGeneration, MambaFormerQuantizationConfig
from mambaformer.cli import main
from mambaformer.modeling_mambaformer import emamba_decoder
from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY
from mambaformer.modeling_mambaformer.quantized_modules import RoundedLinear, is_rounded, restore_emamba, round_emamba
from mambaformer.modeling_mambaformer.weight_rounding import dequantize_groups, quantize_groups

compiled = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled decoding step is not built")
FORMATS = ("int8", "int4")
STEP_BOUND = 0.03
"""Largest deviation of a compiled step's logits from products of the same rounded weights with float inputs."""
BATCH = {"max_new_tokens": 6, "routing": "emamba"}
PROBE = """
import json, sys, torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(torch.tensor([[5, 9, 33, 1]]), max_new_tokens=6, routing="emamba").tolist()
model.save_pretrained(sys.argv[2])
quantizer = type(model.hf_quantizer)
print(json.dumps([f"{quantizer.__module__}.{quantizer.__qualname__}", tokens]))
"""


@pytest.fixture(scope="module")
def source(et5_folder, emamba_folder, tmp_path_factory) -> Path:
    """A composed float32 model and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("float")
    mixed_model(et5_folder, emamba_folder).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=FORMATS)
def rounded(request, source) -> MambaFormerForConditionalGeneration:
    """That model with rounded weights, in memory."""
    return MambaFormerForConditionalGeneration.from_pretrained(source).quantize(request.param)


def logits(model: nn.Module, exact: bool = False, **options) -> torch.Tensor:
    """Of a forward pass; `exact` records gradients, which keeps inputs of rounded layers as they are."""
    batch = random_batch([7, 3, 11, 5], seed=1)
    ids = torch.randint(3, VOCAB, (4, 4), generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(exact):
        output = model(**batch, decoder_input_ids=ids, use_cache=False, **{"routing": "soft", **options})
    return output.logits.detach()


# ---- numbers


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 96])
def test_groups_have_a_scale_each(columns):
    weight = torch.randn(6, columns) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-30, 1.0])[:, None]
    weight[5, :1] = -7.0  # a group whose largest value is negative
    packed, scale = quantize_groups(weight)
    groups = -(-columns // 32)
    assert packed.dtype == torch.uint8 and packed.shape == (6, 16 * groups)
    assert scale.dtype == torch.bfloat16 and scale.shape == (6, groups)
    found = dequantize_groups(packed, scale, columns)
    assert found.shape == weight.shape and not found[3].any()
    # Half a step; a whole one where the largest value's opposite is cut off; bfloat16 adds 1/256 of 8 steps.
    step = scale.float().abs().repeat_interleave(32, 1)[:, :columns]
    assert ((found - weight).abs() <= 1.04 * step + 1e-36).all()
    close = ((found - weight).abs() <= 0.54 * step).float().mean()
    assert close > 0.9


def test_the_lower_half_of_a_byte_is_the_earlier_column():
    weight = torch.zeros(1, 32)
    weight[0, 2], weight[0, 18] = -8.0, 3.0
    packed, scale = quantize_groups(weight)
    assert float(scale) == 1.0 and packed[0, 2] == (3 + 8) << 4 | 0 and packed[0, 3] == 8 << 4 | 8


@compiled
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("odd", [False, True])
def test_the_step_says_what_the_rounded_modules_say(weight_format, rows, odd, instructions):
    """Both have the same weights; the step rounds its inputs to int8 too."""
    model = odd_emamba(tie_word_embeddings=False) if odd else tiny_emamba(layers=3)
    use_selective_scan(model)
    round_emamba(model, weight_format)
    cache, ids = begin(model.eval(), rows)
    found = steps(model, copy.deepcopy(cache), ids)
    assert deviation(found, by_modules(model, cache, ids)) < STEP_BOUND


@compiled
@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_step_multiplies_the_rounded_values_exactly(weight_format, instructions):
    """With inputs that int8 holds exactly, the sums are those of the dequantised matrix."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=96, num_hidden_layers=1, state_size=4, tie_word_embeddings=False)
    model = MambaForCausalLM(config).eval()
    use_selective_scan(model)
    with torch.no_grad():  # the head alone is left: the only layer adds nothing
        model.backbone.layers[0].mixer.out_proj.weight.zero_()
        model.backbone.embeddings.weight.copy_(torch.randint(0, 2, (40, 96)) * 2.0 - 1)  # of rms 1, +1 and -1
        model.backbone.norm_f.weight.fill_(1)
    round_emamba(model, weight_format)
    if weight_format == "int4":
        model.lm_head = RoundedLinear("int4", nn.Linear(96, 40, bias=False))
    cache, ids = begin(model, 3)
    hidden, found = by_one_step(model, cache, ids)
    expected = hidden.double() @ model.lm_head.dequantize().double().T
    assert deviation(found, expected) < 1e-5
    assert set(hidden.abs().flatten().tolist()) == {hidden.abs().max().item()}


def steps(model: nn.Module, cache: DynamicCache, ids: torch.Tensor, weight_format: str = "float32") -> torch.Tensor:
    """Logits of the compiled step, token by token."""
    decoder = EMambaDecoder(weight_format)
    with torch.no_grad():
        return torch.cat([decoder.step(model, cache, column)[1] for column in ids.split(1, 1)], 1)


def by_one_step(model: nn.Module, cache: DynamicCache, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return EMambaDecoder().step(model, cache, ids[:, :1])


@compiled
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(weight_format, instructions):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=128, num_hidden_layers=2)).eval()
    use_selective_scan(model)
    round_emamba(model, weight_format)
    cache, ids = begin(model, 5)
    together, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            together.append(by_one_step(model, copy.deepcopy(cache), ids)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*together)
    for row in range(5):
        alone = copy.deepcopy(cache)
        alone.reorder_cache(torch.tensor([row]))
        assert torch.equal(by_one_step(model, alone, ids[row : row + 1])[1], together[0][row : row + 1])


@compiled
@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_not_finite_shows(weight_format, instructions):
    model = tiny_emamba()
    use_selective_scan(model)
    round_emamba(model, weight_format)
    cache, ids = begin(model, 2)
    cache.layers[1].recurrent_states[0][0, 3, 2] = float("nan")
    found = by_one_step(model, cache, ids)[1]
    assert found[0].isnan().all() and found[1].isfinite().all()


@compiled
def test_int8_weights_decode_as_the_copy_in_int8_does():
    """Of an untied model, whose embeddings the copy leaves float; the source is read with the same weights."""
    model = tiny_emamba(tied=False)
    use_selective_scan(model)
    cache, ids = begin(model, 3)
    copied = steps(model, copy.deepcopy(cache), ids, "int8")
    embeddings = model.backbone.embeddings
    round_emamba(model, "int8")
    model.backbone.embeddings = embeddings
    assert torch.equal(steps(model, cache, ids), copied)


# ---- the model


def test_what_is_rounded_and_what_is_not(rounded):
    kinds = {name: p.dtype for name, p in rounded.emamba.named_parameters()}
    coarse = torch.uint8 if rounded.config.quantization_config.weights == "int4" else torch.int8
    for name, dtype in kinds.items():
        if name.endswith("qweight"):
            assert dtype == (coarse if "in_proj" in name or "out_proj" in name else torch.int8), name
        else:
            assert dtype == torch.float32 or (name.endswith("scales") and coarse == torch.uint8), name
    for kept in ("A_log", "D", "conv1d.weight", "dt_proj.weight", "dt_proj.bias"):
        assert f"backbone.layers.0.mixer.{kept}" in kinds
    assert rounded.emamba.lm_head.qweight is rounded.emamba.backbone.embeddings.qweight
    assert not is_rounded(rounded.et5) and not is_rounded(rounded.router)


def test_rounded_weights_are_near_and_the_products_are_theirs(rounded, source):
    model = MambaFormerForConditionalGeneration.from_pretrained(source)
    exact, found = logits(model, routing="emamba"), logits(rounded, routing="emamba")
    near = {"int8": 0.1, "int4": 0.9}[rounded.config.quantization_config.weights]
    assert 0 < deviation(found, exact) < near
    with torch.no_grad():  # the float model with the rounded values
        for name, module in rounded.emamba.named_modules():
            if hasattr(module, "qweight"):
                model.emamba.get_submodule(name).weight.copy_(module.dequantize())
    exact = logits(model, routing="emamba")
    assert deviation(exact, logits(rounded, exact=True, routing="emamba")) < 1e-5
    assert deviation(exact, found) < STEP_BOUND


def test_saved_and_loaded_is_the_same(rounded, source, tmp_path):
    rounded.save_pretrained(tmp_path)
    weights = rounded.config.quantization_config.weights
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["quantization_config"] == {"quant_method": "mambaformer", "weights": weights}
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.emamba.lm_head.qweight is loaded.emamba.backbone.embeddings.qweight
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.endswith((".qweight", ".scales")))
    at_load = MambaFormerForConditionalGeneration.from_pretrained(
        source, quantization_config=MambaFormerQuantizationConfig(weights)
    )
    batch = random_batch([7, 3, 11, 5], seed=2)
    expected, tokens = logits(rounded), rounded.generate(**batch, **BATCH)
    for model in (loaded, at_load, copy.deepcopy(loaded)):
        assert torch.equal(logits(model), expected)
        assert torch.equal(model.generate(**batch, **BATCH), tokens)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_file_holds_rounded_tensors_and_is_smaller(rounded, source, tmp_path):
    rounded.save_pretrained(tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert not any(name.endswith(("in_proj.weight", "embeddings.weight", "lm_head.weight")) for name in after)
    assert "emamba.lm_head.qweight" not in after  # tied
    kept = {name for name in before if name in after}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    gone = sum(tensor.nbytes for name, tensor in before.items() if name not in kept)
    come = sum(tensor.nbytes for name, tensor in after.items() if name not in kept)
    groups = -(-24 // 32) * 96 + -(-48 // 32) * 24  # in_proj (96, 24) and out_proj (24, 48) of both layers
    coarse = {"int8": 96 * 28 + 24 * 52, "int4": groups * 18}[rounded.config.quantization_config.weights]
    assert come == 2 * (coarse + (2 + 16) * 52) + VOCAB * 28  # x_proj (rank 2 + 2 * 8, 48), embeddings (VOCAB, 24)
    assert come < gone * 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_keep_their_precision_in_any_dtype(rounded, source, tmp_path, dtype):
    rounded.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    for mine, theirs in zip(loaded.emamba.named_parameters(), rounded.emamba.named_parameters(), strict=True):
        if mine[0].endswith((".qweight", ".scales")):
            assert mine[1].dtype == theirs[1].dtype and torch.equal(mine[1], theirs[1])
        else:
            assert mine[1].dtype == dtype
    assert deviation(logits(loaded, routing="emamba"), logits(rounded, routing="emamba")) < 0.1
    assert loaded.generate(**random_batch([4, 6]), **BATCH).shape == (2, 7)


@compiled
def test_generate_runs_the_compiled_step_on_the_tensors_themselves(rounded, tmp_path, monkeypatch):
    rounded.save_pretrained(tmp_path)
    model = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    sizes = step_sizes(monkeypatch)
    batch = random_batch([7, 3, 11, 5], seed=4)
    assert model.generate(**batch, **BATCH).shape == (4, 7) and sizes == [4] * 6
    for choice in ("bfloat16", "int8"):  # no other copy is made of what is rounded
        packed = model.pack_emamba(choice).emamba_decoder.prepare(model.emamba)
        assert all(matrix.format in (2, 3) for matrix in (packed.layers[0].in_proj, packed.args.head))
    model.generate(**batch, **BATCH, num_beams=2)
    assert sizes[6:] == [8] * 6


@compiled
def test_rows_of_whole_vectors_are_not_copied():
    """Of the sizes that real models have: what is kept beside the parameters are sums of rows, and A."""
    model = MambaForCausalLM(MambaConfig(vocab_size=192, hidden_size=64, num_hidden_layers=1))
    use_selective_scan(model)
    for weight_format in FORMATS:
        own = copy.deepcopy(model).eval()
        round_emamba(own, weight_format)
        packed = EMambaDecoder().prepare(own)
        mixer = own.backbone.layers[0].mixer
        assert packed.args.embedding == own.lm_head.qweight.data_ptr() == packed.args.head.data
        assert packed.layers[0].in_proj.data == mixer.in_proj.qweight.data_ptr()
        rows = 192 + mixer.x_proj.rows + (320 if weight_format == "int8" else 0)  # in_proj 256, out_proj 64
        assert packed.copied_bytes == mixer.A_log.nbytes + 4 * rows


def test_without_the_library_the_modules_say_the_same(rounded, monkeypatch):
    batch = random_batch([7, 3, 11, 5], seed=3)
    rounded.emamba_decoder = EMambaDecoder()
    scores = {"return_dict_in_generate": True, "output_scores": True}
    found = rounded.generate(**batch, **BATCH, **scores)
    monkeypatch.setattr(emamba_decoder, "DECODE_LIBRARY", None)
    rounded.emamba_decoder = EMambaDecoder()
    expected = rounded.generate(**batch, **BATCH, **scores)
    assert deviation(found.scores[0], expected.scores[0]) < STEP_BOUND


def test_training_is_refused(rounded):
    for train in (rounded.train, rounded.emamba.train):
        with pytest.raises(ValueError, match=r"rounded and cannot be trained.*or call `model.dequantize\(\)`"):
            train()
    assert not rounded.training and not any(module.training for module in rounded.et5.modules())
    rounded.eval()


def test_the_trainer_refuses_it(source, tmp_path):
    from mambaformer import MambaFormerTrainer, MambaFormerTrainingArguments

    rounded = MambaFormerForConditionalGeneration.from_pretrained(source).quantize()
    arguments = MambaFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="rounded and cannot be trained"):
        MambaFormerTrainer(model=rounded, args=arguments, processing_class=tiny_tokenizer())


def test_dequantize_gives_a_plain_model_of_the_rounded_values(rounded, tmp_path):
    expected = logits(rounded, exact=True)
    model = rounded.dequantize()
    assert not is_rounded(model) and model.emamba.lm_head.weight is model.emamba.backbone.embeddings.weight
    assert deviation(logits(model), expected) < 1e-5
    model.train().eval()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert torch.equal(logits(MambaFormerForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_restoring_keeps_biases_and_an_untied_head():
    model = odd_emamba(tie_word_embeddings=False)
    ids = torch.randint(3, 33, (2, 5))
    round_emamba(model, "int8")
    expected = model(ids).logits  # recording gradients, with inputs as they are
    restore_emamba(model, torch.float32)
    assert deviation(model(ids).logits.detach(), expected.detach()) < 1e-5
    assert model.lm_head.weight is not model.backbone.embeddings.weight


def test_a_process_without_the_package_loads_it(source, tmp_path):
    """Its own quantiser serves it there; loaded, it says and writes the same."""
    folder, again = tmp_path / "int8", tmp_path / "again"
    model = MambaFormerForConditionalGeneration.from_pretrained(source).quantize("int8")
    model.save_pretrained(folder)
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    said = run_bare(
        bare_environment(tmp_path / "bare"), tmp_path / "work", tmp_path / "probe.py", str(folder), str(again)
    )
    kind, tokens = json.loads(said.splitlines()[-1])
    assert kind.startswith("transformers_modules.") and kind.endswith(".MambaFormerQuantizer")
    assert tokens == model.generate(torch.tensor([[5, 9, 33, 1]]), **BATCH).tolist()
    written, saved = load_file(again / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == saved.keys() and all(torch.equal(written[name], saved[name]) for name in saved)


# ---- what is refused


def test_bad_choices_name_the_value(rounded, source):
    with pytest.raises(ValueError, match="'int3'.*'int8', 'int4'"):
        MambaFormerQuantizationConfig("int3")
    with pytest.raises(ValueError, match="group_size is 64"):
        MambaFormerQuantizationConfig("int4", group_size=64)
    with pytest.raises(ValueError, match="rounded already"):
        rounded.quantize("int8")
    with pytest.raises(ValueError, match="'int3'"):
        MambaFormerForConditionalGeneration.from_pretrained(
            source, quantization_config={"quant_method": "mambaformer", "weights": "int3"}
        )


def test_other_families_are_refused_and_left_alone(source):
    model = MambaFormerForConditionalGeneration.from_pretrained(source)
    config = FalconMambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    model.emamba = FalconMambaForCausalLM(config)
    with pytest.raises(ValueError, match="'falcon_mamba'"):
        model.quantize("int8")
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    with pytest.raises(ValueError, match="MambaForCausalLM does not have"):
        tiny_emamba().save_pretrained(source / "alone")
        MambaForCausalLM.from_pretrained(source / "alone", quantization_config=MambaFormerQuantizationConfig("int8"))


# ---- the command line


def test_quantize_writes_a_whole_folder(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--weights", "int4"]) == 0
    said = capsys.readouterr().out
    assert "int4" in said and str(tmp_path / "out") in said
    model = MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.weights == "int4"
    assert {"tokenizer.json", "modeling_mambaformer.py"} <= {path.name for path in (tmp_path / "out").iterdir()}
    for arguments, reason in (
        ([str(tmp_path / "out"), str(tmp_path / "more")], "rounded already"),
        ([str(tmp_path / "none"), str(tmp_path / "more")], "does not exist"),
        ([str(source), str(tmp_path / "out")], "not empty"),
    ):
        assert main(["quantize", *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_compose_can_round(et5_folder, emamba_folder, source, tmp_path, capsys):
    command = ["compose", "--et5", str(et5_folder), "--emamba", str(emamba_folder), "--tokenizer", str(source)]
    assert main([*command, "--out", str(tmp_path / "out"), "--quantize", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    assert is_rounded(MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "out").emamba)
