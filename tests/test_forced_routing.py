# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Forced to one expert, a MambaFormer is that expert: the same logits and tokens, whatever the batch around them."""

from __future__ import annotations

import copy

import pytest
import torch
from mixed_routing import after_end
from tiny_experts import VOCAB, random_batch, tiny_emamba, tiny_et5
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

TOLERANCE = 1e-4
NEW_TOKENS = 8
LENGTHS = [7, 3, 11, 5]
ET5_KINDS = {  # kind of T5, encoder layers, decoder layers
    "v1.0": ("v1.0", 2, 2),
    "v1.1": ("v1.1", 2, 2),
    "untied": ("untied", 2, 2),
    "deeper-decoder": ("v1.1", 1, 3),
    "deeper-encoder": ("untied", 3, 1),
}
BATCHES = {
    "one": ([7], "right"),
    "right-padded": (LENGTHS, "right"),
    "left-padded": (LENGTHS, "left"),
}


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    """Save both experts and compose them; returns the composed model and the two experts read back as plain ones."""

    def composed(et5, emamba):
        folder = tmp_path_factory.mktemp("pair")
        et5.save_pretrained(folder / "et5")
        emamba.save_pretrained(folder / "emamba")
        model = MambaFormerForConditionalGeneration.from_experts_pretrained(
            str(folder / "et5"), str(folder / "emamba")
        )
        plain_et5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "et5").eval()
        plain_emamba = AutoModelForCausalLM.from_pretrained(folder / "emamba").eval()
        return model, plain_et5, plain_emamba

    return composed


@pytest.fixture(scope="module", params=ET5_KINDS.values(), ids=ET5_KINDS.keys())
def et5_pair(request, compose):
    """A composed model and its plain T5."""
    kind, encoder_layers, decoder_layers = request.param
    et5 = tiny_et5(kind, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    if kind == "untied":  # of a trained head's size: as drawn, the plain model's own rounding comes to the tolerance
        et5.lm_head.weight.data *= et5.config.d_model**-0.5
    model, plain, _ = compose(et5, tiny_emamba())
    assert type(plain) is T5ForConditionalGeneration
    assert plain.config.scale_decoder_outputs == (kind == "v1.0")
    tied = plain.lm_head.weight.data_ptr() == plain.shared.weight.data_ptr()
    assert tied == (kind != "untied")
    return model, plain


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def emamba_pair(request, compose):
    """A composed model and its plain Mamba, on transformers' own scan."""
    model, _, plain = compose(tiny_et5(), tiny_emamba(tied=request.param))
    assert type(plain) is MambaForCausalLM
    assert {type(layer.mixer).__name__ for layer in plain.backbone.layers} == {"MambaMixer"}
    return model, plain


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def sources(request) -> dict[str, torch.Tensor]:
    lengths, side = request.param
    return random_batch(lengths, seed=5, side=side)


def targets(rows: int) -> torch.Tensor:
    """Decoder inputs `(rows, 9)`: the start token, then anything."""
    ids = torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(9))
    ids[:, 0] = 0
    return ids


def rows_of(batch: dict[str, torch.Tensor]):
    """Each row's source tokens alone, `(1, length)`."""
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield ids[mask.bool()][None]


def with_start(source: torch.Tensor) -> torch.Tensor:
    """`[source][decoder_start]`, what EMamba reads before the answer."""
    return torch.cat([source, source.new_zeros(1, 1)], dim=1)


def plain_emamba_logits(plain, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits `(B, 9, V)` of `targets` after each row's source, each row alone and without padding."""
    ids = targets(len(batch["input_ids"]))
    rows = zip(rows_of(batch), ids, strict=True)
    return torch.stack([plain(torch.cat([s, row[None]], dim=1)).logits[0, -ids.shape[1] :] for s, row in rows])


def plain_et5_answers(plain, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    # transformers' own cache is one layer short where the decoder is deeper than the encoder
    cached = plain.config.num_decoder_layers <= plain.config.num_layers
    return plain.generate(**batch, max_new_tokens=NEW_TOKENS, use_cache=cached, **options)[:, 1:]


def plain_emamba_answers(plain, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """Each row alone and without padding, then padded to one width."""
    rows = []
    for source in rows_of(batch):
        prompt = with_start(source)
        mask = torch.ones_like(prompt)
        rows.append(plain.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)[0])
        rows[-1] = rows[-1][prompt.shape[1] :]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def stepwise(
    model, batch: dict[str, torch.Tensor], ids: torch.Tensor, chunks: list[int], routing: str
) -> torch.Tensor:
    """Logits `(B, T, V)` of `ids` read in `chunks` onto one cache."""
    cache, logits = None, []
    for part in ids.split(chunks, dim=1):
        given = batch if cache is None else {}
        output = model(**given, decoder_input_ids=part, past_key_values=cache, use_cache=True, routing=routing)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


READINGS = {"uncached": None, "by token": [1] * 9, "by chunks": [4, 1, 3, 1]}


def check_logits(model, batch: dict[str, torch.Tensor], expected: torch.Tensor, routing: str) -> None:
    """Logits of `targets` equal `expected`, however the target is read."""
    ids = targets(len(expected))
    for name, chunks in READINGS.items():
        if chunks is None:
            logits = model(**batch, decoder_input_ids=ids, routing=routing, use_cache=False).logits
        else:
            logits = stepwise(model, batch, ids, chunks, routing)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def check_greedy(model, batch: dict[str, torch.Tensor], expected: torch.Tensor, routing: str) -> None:
    """Greedy answers equal `expected`, with a cache and without, also where one row ends before the others."""
    options = {"max_new_tokens": NEW_TOKENS, "routing": routing}
    for use_cache in (True, False):
        assert torch.equal(model.generate(**batch, **options, use_cache=use_cache)[:, 1:], expected)
    assert len(expected) == 1 or len(expected.unique()) > 3
    ends = [1, int(expected[0, 4])]
    over = after_end(expected, ends)
    ended = expected.masked_fill(over, 0)[:, : int((~over).sum(1).max())]
    assert torch.equal(model.generate(**batch, **options, eos_token_id=ends)[:, 1:], ended)


@torch.no_grad()
def test_et5_logits(et5_pair, sources):
    model, plain = et5_pair
    expected = plain(**sources, decoder_input_ids=targets(len(sources["input_ids"]))).logits
    check_logits(model, sources, expected, "et5")


@torch.no_grad()
def test_et5_is_as_exact_as_the_plain_model(et5_pair):
    """Beside float64, which no size of the logits hides; the median of some batches, as each rounds by chance."""
    model, plain = et5_pair
    double, errors, ids = copy.deepcopy(plain).double(), [], targets(len(LENGTHS))
    for seed in range(9):
        batch = random_batch(LENGTHS, seed=seed)
        exact = double(**batch, decoder_input_ids=ids).logits
        theirs = plain(**batch, decoder_input_ids=ids).logits
        ours = stepwise(model, batch, ids, READINGS["by token"], "et5")
        errors.append([(logits - exact).square().mean().sqrt() for logits in (ours, theirs)])
    ours, theirs = torch.tensor(errors).median(0).values
    assert 0 < ours < 1.5 * theirs


@torch.no_grad()
def test_emamba_logits(emamba_pair, sources):
    model, plain = emamba_pair
    check_logits(model, sources, plain_emamba_logits(plain, sources), "emamba")


def test_et5_greedy(et5_pair, sources):
    model, plain = et5_pair
    check_greedy(model, sources, plain_et5_answers(plain, sources), "et5")


def test_emamba_greedy(emamba_pair, sources):
    model, plain = emamba_pair
    check_greedy(model, sources, plain_emamba_answers(plain, sources), "emamba")


def test_emamba_equals_a_left_padded_mamba(emamba_pair):
    """The plain model's own batch, left-padded as transformers wants it, gives what our batch gives."""
    model, plain = emamba_pair
    left = random_batch(LENGTHS, seed=5, side="left")
    prompt = torch.cat([left["input_ids"], left["input_ids"].new_zeros(4, 1)], dim=1)
    mask = torch.cat([left["attention_mask"], left["attention_mask"].new_ones(4, 1)], dim=1)
    expected = plain.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS)[:, prompt.shape[1] :]
    right = random_batch(LENGTHS, seed=5, side="right")
    assert torch.equal(model.generate(**right, max_new_tokens=NEW_TOKENS, routing="emamba")[:, 1:], expected)


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.8, "temperature": 0.7, "num_return_sequences": 2}])
def test_sampling_with_the_same_seed(compose, options):
    model, et5, emamba = compose(tiny_et5("untied", decoder_layers=2), tiny_emamba())
    batch = random_batch(LENGTHS, seed=6)
    options = {**options, "do_sample": True, "eos_token_id": list(range(3, 12))}
    torch.manual_seed(11)
    expected = plain_et5_answers(et5, batch, **options)
    torch.manual_seed(11)
    answers = model.generate(**batch, **options, max_new_tokens=NEW_TOKENS, routing="et5")[:, 1:]
    assert torch.equal(answers, expected)
    assert (expected == 0).any(1).any(), "no answer ended before the others: the draw after an end is not covered"
    left = random_batch(LENGTHS, seed=6, side="left")
    prompt = torch.cat([left["input_ids"], left["input_ids"].new_zeros(4, 1)], dim=1)
    mask = torch.cat([left["attention_mask"], left["attention_mask"].new_ones(4, 1)], dim=1)
    torch.manual_seed(12)
    expected = emamba.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)
    torch.manual_seed(12)
    answers = model.generate(**batch, **options, max_new_tokens=NEW_TOKENS, routing="emamba")[:, 1:]
    assert torch.equal(answers, expected[:, prompt.shape[1] :])


def test_et5_beams(et5_pair):
    model, plain = et5_pair
    batch = random_batch(LENGTHS, seed=5)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = plain_et5_answers(plain, batch, **options)
    assert torch.equal(model.generate(**batch, **options, max_new_tokens=NEW_TOKENS, routing="et5")[:, 1:], expected)


def test_emamba_beams(emamba_pair):
    model, plain = emamba_pair
    batch = random_batch(LENGTHS, seed=5)
    expected = plain_emamba_answers(plain, batch, num_beams=3)
    answers = model.generate(**batch, max_new_tokens=NEW_TOKENS, num_beams=3, routing="emamba")
    assert torch.equal(answers[:, 1:], expected)


def test_mask_left_to_generate(et5_pair):
    """Without a mask `generate` takes padding ids for padding, as transformers does."""
    model, _ = et5_pair
    batch = random_batch(LENGTHS, seed=7)
    for routing in ("et5", "emamba"):
        masked = model.generate(**batch, max_new_tokens=6, routing=routing)
        assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=6, routing=routing), masked)


def test_an_end_inside_the_prompt_ends_nothing(et5_pair):
    """A decoder prompt may hold the end token: what follows is still each expert's own."""
    model, plain = et5_pair
    batch = random_batch(LENGTHS, seed=8)
    prompt = torch.tensor([[0, 9, 1, 10]] * 4)
    expected = plain_et5_answers(plain, batch, decoder_input_ids=prompt)
    answers = model.generate(**batch, decoder_input_ids=prompt, max_new_tokens=NEW_TOKENS, routing="et5")
    assert torch.equal(answers[:, 1:], expected)


T5_FAMILY = {
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}
MAMBA_FAMILY = {
    "mamba2": (
        Mamba2Config,
        Mamba2ForCausalLM,
        {"num_heads": 4, "head_dim": 8, "n_groups": 2, "expand": 2, "hidden_size": 16, "chunk_size": 8},
    ),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM, {"hidden_size": 16, "intermediate_size": 32}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", T5_FAMILY)
def test_other_t5_families(compose, name):
    config_class, model_class = T5_FAMILY[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config.dropout_rate = 0.0
    et5 = model_class(config).eval()
    for parameter in et5.parameters():
        if parameter.ndim == 2:
            parameter.mul_(2)
    et5.shared.weight.mul_(0.05)
    et5.decoder.final_layer_norm.weight.mul_(5)
    model, plain, _ = compose(et5, tiny_emamba())
    assert type(model.et5) is type(plain) is model_class
    batch = random_batch(LENGTHS, seed=5)
    check_logits(model, batch, plain(**batch, decoder_input_ids=targets(4)).logits, "et5")
    check_greedy(model, batch, plain_et5_answers(plain, batch), "et5")


@torch.no_grad()
@pytest.mark.parametrize("name", MAMBA_FAMILY)
def test_other_mamba_families(compose, name):
    config_class, model_class, sizes = MAMBA_FAMILY[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=1, bos_token_id=0, **sizes
    )
    emamba = model_class(config).eval()
    for block in emamba.backbone.layers:
        block.mixer.out_proj.weight.mul_(8)
    emamba.backbone.norm_f.weight.mul_(20)
    model, _, plain = compose(tiny_et5(), emamba)
    assert type(model.emamba) is type(plain) is model_class
    batch = random_batch(LENGTHS, seed=5)
    check_logits(model, batch, plain_emamba_logits(plain, batch), "emamba")
    check_greedy(model, batch, plain_emamba_answers(plain, batch), "emamba")
    assert model.generate(**batch, max_new_tokens=4, routing="auto").shape == (4, 5)
