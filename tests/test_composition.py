# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Composing, saving and reloading: bits are kept, and what cannot be read is said with its name and the remedy."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from mixed_routing import mixed_model, random_targets
from safetensors.torch import load_file, save_file
from tiny_experts import VOCAB, random_batch, tiny_emamba, tiny_et5
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, MambaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from mambaformer.configuration.configuration_mambaformer import MambaFormerConfig
from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

compose = MambaFormerForConditionalGeneration.from_experts_pretrained
OWN_ROWS = 300


def shared_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer of a few dozen pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "▁tooth", "▁gum", "ing", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def own_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as Mamba's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the tooth and the gum", "the teeth of the gum"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def save(folder: Path, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def saved(tmp_path, et5_folder, emamba_folder) -> Path:
    """A saved MambaFormer."""
    mixed_model(et5_folder, emamba_folder).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def broken(tmp_path, et5_folder):
    """A copy of the T5 checkpoint that a test may spoil."""
    shutil.copytree(et5_folder, tmp_path / "broken")
    return tmp_path / "broken"


def assert_same_weights(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = module.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def changed(folder: Path, **fields) -> None:
    """Edit a saved config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def spoiled(folder: Path, spoil) -> None:
    """Rewrite a saved checkpoint's tensors as `spoil` leaves them."""
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tokenizers", [False, True], ids=["no tokenizers", "the same tokenizer"])
@pytest.mark.parametrize("kind", ["v1.0", "untied"])
def test_composing_copies_bits(tmp_path, kind, tokenizers):
    tokenizer = shared_tokenizer() if tokenizers else None
    et5, emamba = tiny_et5(kind), tiny_emamba(tied=kind != "untied")
    model = compose(save(tmp_path / "et5", et5, tokenizer), save(tmp_path / "emamba", emamba, tokenizer))
    assert type(model.et5) is T5ForConditionalGeneration and type(model.emamba) is MambaForCausalLM
    assert_same_weights(model.et5, et5)
    assert_same_weights(model.emamba, emamba)
    assert not model.training and not any(p.is_meta for p in model.parameters())
    assert (model.vocabulary_report is None) != tokenizers
    if tokenizers:
        assert "agree" in model.vocabulary_report
    config = model.config
    assert (config.et5_name_or_path, config.emamba_name_or_path) == ("et5", "emamba")
    assert config.et5 is model.et5.config and config.emamba is model.emamba.config


@pytest.mark.parametrize("kind", ["v1.0", "untied"])
def test_loading_says_nothing(tmp_path, kind):
    """A head of its own is no surprise, whatever a `T5Config` says; other messages come through."""
    model = compose(save(tmp_path / "et5", tiny_et5(kind)), save(tmp_path / "emamba", tiny_emamba()))
    model.save_pretrained(tmp_path / "saved")
    said, logger = [], logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # whatever other tests want to hear
    try:
        MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert not said
        T5ForConditionalGeneration.from_pretrained(tmp_path / "et5")
        assert bool(said) == (kind == "untied")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_different_tokenizers(tmp_path):
    """EMamba's rows are rebuilt for the shared vocabulary out of its own."""
    emamba, own, shared = tiny_emamba(vocab=OWN_ROWS), own_tokenizer(), shared_tokenizer()
    et5_folder = save(tmp_path / "et5", tiny_et5(), shared)
    emamba_folder = save(tmp_path / "emamba", emamba, own)
    model = compose(et5_folder, emamba_folder)
    old, new = emamba.get_input_embeddings().weight, model.emamba.get_input_embeddings().weight
    assert new.shape == (VOCAB, 24) and model.config.vocab_size == model.config.emamba.vocab_size == VOCAB
    assert model.emamba.lm_head.weight is new
    ids, own_ids = shared.get_vocab(), own.get_vocab()
    for piece, token in (("a", "a"), ("▁", "Ġ"), ("▁the", "Ġthe"), ("</s>", "<|endoftext|>")):
        assert torch.equal(new[ids[piece]], old[own_ids[token]]), piece
    spelled = old[own(" tooth", add_special_tokens=False)["input_ids"]].mean(0)
    torch.testing.assert_close(new[ids["▁tooth"]], spelled)
    assert f"{len(ids)} shared tokens" in model.vocabulary_report
    assert_same_weights(model.emamba.backbone.layers, emamba.backbone.layers)
    for given in ({"tokenizer": shared}, {"emamba_tokenizer": own}, {"tokenizer": shared, "emamba_tokenizer": own}):
        assert_same_weights(compose(et5_folder, emamba_folder, **given).emamba, model.emamba)
    assert model.generate(**random_batch([4, 6]), max_new_tokens=3, routing="soft").shape == (2, 4)
    assert_reloads(model, tmp_path / "saved")


def assert_reloads(model, folder: Path, **options) -> MambaFormerForConditionalGeneration:
    """A saved model comes back with equal weights, logits and answers."""
    model.save_pretrained(folder)
    again = MambaFormerForConditionalGeneration.from_pretrained(folder, **options)
    assert_same_weights(again, model)
    batch, ids = random_batch([7, 3, 11]), random_targets(3, 6)
    for routing in ("auto", "et5", "emamba", "soft"):
        with torch.no_grad():
            before, after = (
                m(**batch, decoder_input_ids=ids, routing=routing, use_cache=False).logits for m in (model, again)
            )
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    before, after = (m.generate(**batch, **options) for m in (model, again))
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(before.route_trace.expert, after.route_trace.expert)
    return again


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("v1.0", torch.float32), ("untied", torch.float32), ("v1.1", torch.bfloat16), ("untied", torch.bfloat16)],
)
def test_reloading(tmp_path, kind, dtype):
    folders = save(tmp_path / "et5", tiny_et5(kind)), save(tmp_path / "emamba", tiny_emamba(tied=kind != "untied"))
    model = mixed_model(*folders, dtype=dtype, threshold_table=[[0.1, 1.0], [0.9, -1.0]], merger="mix")
    assert {p.dtype for p in model.parameters()} == {dtype}
    again = assert_reloads(model, tmp_path / "saved")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.config.router_threshold == model.config.router_threshold
    assert again.config.threshold_table == [[0.1, 1.0], [0.9, -1.0]]
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    keys = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert ("et5.lm_head.weight" in keys) == ("emamba.lm_head.weight" in keys) == (kind == "untied")
    assert {key.split(".")[0] for key in keys} == {"et5", "emamba", "router", "gate"}
    written = "".join(file.read_text() for file in (tmp_path / "saved").glob("*.json"))
    assert str(tmp_path) not in written, "a path of this machine was saved"


@pytest.mark.parametrize("groups", [[], ["past"]])
def test_reloading_a_router_without_features(tmp_path, et5_folder, emamba_folder, groups):
    assert_reloads(mixed_model(et5_folder, emamba_folder, router_features=groups), tmp_path / "saved")


def test_partial_checkpoint(saved):
    """Weights that a checkpoint lacks start as transformers' own models would, not with a deviation of one."""
    missing = ("SelfAttention.q.", "EncDecAttention.q.", "wi_0.", "relative_attention_bias", "emamba.", "router.")

    def drop(tensors):
        for name in [name for name in tensors if any(part in name for part in missing)]:
            del tensors[name]

    whole = MambaFormerForConditionalGeneration.from_pretrained(saved)
    spoiled(saved, drop)
    model = MambaFormerForConditionalGeneration.from_pretrained(saved)
    fresh = MambaFormerForConditionalGeneration(whole.config)
    d_model, d_kv = model.config.et5.d_model, model.config.et5.d_kv
    deviations = {"q.": (d_model * d_kv) ** -0.5, "wi_0.": d_model**-0.5, "relative_attention_bias": d_model**-0.5}
    seen = set()
    for name, tensor in model.et5.state_dict().items():
        kind = [part for part in deviations if part in name]
        if kind:
            assert tensor.std() == pytest.approx(deviations[kind[0]], rel=0.3), name
            seen.add(kind[0])
        else:
            assert torch.equal(tensor, whole.et5.state_dict()[name]), name
    assert seen == set(deviations)
    for name, tensor in [*model.emamba.state_dict().items(), *model.router.state_dict().items()]:
        expected = {**fresh.emamba.state_dict(), **fresh.router.state_dict()}[name]
        assert tensor.isfinite().all()
        if tensor.numel() > 40:
            assert tensor.std() == pytest.approx(float(expected.std()), rel=0.5, abs=0.02), name
    assert model.generate(**random_batch([4, 6]), max_new_tokens=3).shape == (2, 4)


def test_resizing(saved, tmp_path):
    """Both experts, the router's table and the configuration keep one size."""
    model = MambaFormerForConditionalGeneration.from_pretrained(saved)
    before = model.et5.get_input_embeddings().weight[:VOCAB].clone()
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.vocab_size == model.config.emamba.vocab_size == VOCAB + 8
    assert model.router.domain_weight.shape == (VOCAB + 8,)
    assert torch.equal(model.et5.get_input_embeddings().weight[:VOCAB], before)
    again = assert_reloads(model, tmp_path / "resized")
    output = again(**random_batch([4]), decoder_input_ids=torch.tensor([[0, VOCAB + 7]]), routing="soft")
    assert output.logits.shape == (1, 2, VOCAB + 8)


# What cannot be composed or read.


@pytest.mark.parametrize("name", ["et5", "emamba"])
@pytest.mark.parametrize("source", ["nobody/no-such-checkpoint", "./no/such/folder"])
def test_unknown_checkpoint(et5_folder, emamba_folder, name, source):
    experts = {"et5": str(et5_folder), "emamba": str(emamba_folder), name: source}
    with pytest.raises((OSError, ValueError), match=f"{name}='.*no.such.*' is neither a folder"):
        compose(**experts)


def test_wrong_family(et5_folder, emamba_folder):
    with pytest.raises(ValueError, match=r"et5='.*emamba' has model_type 'mamba': give a checkpoint of one of \['t5'"):
        compose(str(emamba_folder), str(emamba_folder))
    with pytest.raises(ValueError, match=r"emamba='.*et5' has model_type 't5': give a checkpoint of one of \['mamba'"):
        compose(str(et5_folder), str(et5_folder))


def test_missing_tokenizers(tmp_path, et5_folder):
    emamba = save(tmp_path / "emamba", tiny_emamba(vocab=OWN_ROWS))
    with pytest.raises(ValueError, match=f"has {OWN_ROWS} vocabulary rows.*{VOCAB}.*pass emamba_tokenizer="):
        compose(str(et5_folder), emamba)
    own_tokenizer().save_pretrained(emamba)
    with pytest.raises(ValueError, match="No tokenizer could be read beside .*et5.*pass tokenizer="):
        compose(str(et5_folder), emamba)


def test_tokenizer_of_another_model(tmp_path, et5_folder):
    """A tokenizer with more ids than there are rows is not that model's."""
    emamba = save(tmp_path / "emamba", tiny_emamba(vocab=OWN_ROWS))
    with pytest.raises(ValueError, match=f"target_rows={VOCAB} is too small"):
        compose(str(et5_folder), emamba, own_tokenizer(), emamba_tokenizer=own_tokenizer())
    small = save(tmp_path / "small", tiny_emamba())
    with pytest.raises(ValueError, match=f"embedding has {VOCAB} rows but its tokenizer has ids up to"):
        compose(str(et5_folder), small, shared_tokenizer(), emamba_tokenizer=own_tokenizer())


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no header": lambda data: b"\xff" * 64 + data[64:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("way", ["et5", "emamba", "reload"])
def test_damaged_weights(et5_folder, emamba_folder, request, tmp_path, way, damage):
    experts = {"et5": et5_folder, "emamba": emamba_folder}
    folder = tmp_path / "damaged"
    shutil.copytree(request.getfixturevalue("saved") if way == "reload" else experts[way], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    message = r"damaged.*'model.safetensors' is damaged or cut short.*fetch or save the checkpoint again"
    with pytest.raises(OSError, match=message):
        if way == "reload":
            MambaFormerForConditionalGeneration.from_pretrained(folder)
        else:
            compose(**{name: str(path) for name, path in {**experts, way: folder}.items()})


def test_damaged_shard(saved, tmp_path):
    """Of several files the damaged one is named."""
    model = MambaFormerForConditionalGeneration.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-40])
    with pytest.raises(OSError, match=f"'{shards[1].name}' is damaged"):
        MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "shards")


def test_missing_weights(broken, emamba_folder, saved):
    for folder in (broken, saved):
        (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="broken"):
        compose(str(broken), str(emamba_folder))
    with pytest.raises(OSError, match="saved"):
        MambaFormerForConditionalGeneration.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(broken, emamba_folder, saved, value):
    def spoil(tensors):
        name = next(name for name in tensors if "block.1.layer.0.SelfAttention.v" in name and "decoder" in name)
        tensors[name][3, 5] = value

    spoiled(broken, spoil)
    with pytest.raises(ValueError, match=r"broken': the weights in 'decoder.block.1.*v.weight' are not finite; fetch"):
        compose(str(broken), str(emamba_folder))
    spoiled(saved, spoil)
    with pytest.raises(ValueError, match=r"saved': the weights in 'et5.decoder.block.1.*v.weight' are not finite"):
        MambaFormerForConditionalGeneration.from_pretrained(saved)


def test_configuration_of_another_model(saved, broken, emamba_folder):
    changed(saved, router_rank=5)
    with pytest.raises(ValueError, match="saved': the weights have other shapes than config.json says"):
        MambaFormerForConditionalGeneration.from_pretrained(saved)
    changed(broken, d_ff=52)
    with pytest.raises(ValueError, match="broken': the weights have other shapes"):
        compose(str(broken), str(emamba_folder))


def test_impossible_router_fields(et5_folder, emamba_folder, saved):
    with pytest.raises(ValueError, match="expert_budget is 3"):
        compose(str(et5_folder), str(emamba_folder), expert_budget=3)
    with pytest.raises(ValueError, match=r"\['smell'\] do not exist: choose from"):
        compose(str(et5_folder), str(emamba_folder), router_features=["smell"])
    config = MambaFormerConfig.from_pretrained(saved).to_dict()
    changed(saved, emamba={**config["emamba"], "vocab_size": 80})
    with pytest.raises(ValueError, match="et5 has 96 rows and emamba 80"):
        MambaFormerForConditionalGeneration.from_pretrained(saved)


def test_tokenizer_fixtures_load_by_auto(tmp_path):
    """The tests' tokenizers are read as any checkpoint's are."""
    for tokenizer in (shared_tokenizer(), own_tokenizer()):
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_missing_weights_are_named(tmp_path, et5_folder, emamba_folder):
    folder = tmp_path / "partial"
    shutil.copytree(emamba_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.layers.0.mixer.in_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*mixer.in_proj.weight"):
        MambaFormerForConditionalGeneration.from_experts_pretrained(str(et5_folder), str(folder))
