# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Vocabulary transfer: copied rows bit for bit, combined rows, roles, ties, and the real pair of tokenizers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from mambaformer.tokenizer.token_text import TokenText, byte_level_alphabet
from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from mambaformer.tokenizer.vocabulary_transfer import (
    VocabularyMap,
    plan_transfer,
    transfer_embedding,
    transfer_vocabulary,
    unspellable,
)
from mambaformer.trainer.train_tokenizer import train_tokenizer

SENTENCES = [
    "Brush the teeth twice a day, and floss the gaps between the teeth.",
    "Plaque on the gums causes gingivitis; then the gums bleed.",
    "The dentist cleans the gums and the teeth with care, twice a year.",
]


@pytest.fixture(scope="module")
def own() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-NeoX's kind, with a token for runs of spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.add_tokens(["    "])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
    )


@pytest.fixture(scope="module")
def shared() -> MambaFormerTokenizer:
    backend = train_tokenizer(SENTENCES * 30, 700)
    return MambaFormerTokenizer(tokenizer_object=backend, extra_special_tokens=["<extra_id_0>"])


@pytest.fixture(scope="module")
def plan(own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer) -> VocabularyMap:
    return plan_transfer(own, shared, len(shared) + 5)


@pytest.fixture(scope="module")
def weight(own: PreTrainedTokenizerFast) -> torch.Tensor:
    """More rows than tokens, as in real checkpoints; those must not leak."""
    torch.manual_seed(0)
    rows = torch.randn(len(own) + 3, 8)
    rows[len(own) :] = 1e6
    return rows


def mamba(rows: int, tied: bool) -> MambaForCausalLM:
    torch.manual_seed(1)
    config = MambaConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, state_size=4, tie_word_embeddings=tied, pad_token_id=1
    )
    return MambaForCausalLM(config).eval()


def sources(plan: VocabularyMap, index: int) -> list[int]:
    return plan.sources[plan.offsets[index] : plan.offsets[index + 1]].tolist()


def test_every_shared_token_is_accounted_for(plan: VocabularyMap, shared: MambaFormerTokenizer) -> None:
    counts = plan.counts
    assert plan.tokens == len(shared)
    assert counts["padding"] == 5
    assert (counts["special"], counts["unmatched"]) == (3, 1)
    assert counts["exact"] > 300 and counts["combined"] > 10
    assert f"{counts['exact']:,}" in plan.describe()


def test_each_row_spells_its_piece(
    plan: VocabularyMap, own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer
) -> None:
    """A leading space belongs to the piece, and a piece within a word gets none."""
    ours = TokenText(own).texts
    exact = 0
    for index, text in enumerate(TokenText(shared).texts):
        if text is not None:
            spelled = sources(plan, index)
            assert b"".join(ours[token] for token in spelled) == text
            exact += len(spelled) == 1
    assert exact == plan.counts["exact"]
    the, inner = shared.convert_tokens_to_ids(["▁the", "t"])
    assert own.convert_ids_to_tokens(sources(plan, the)) == ["Ġthe"]
    assert own.convert_ids_to_tokens(sources(plan, inner)) == ["t"]


def test_spelling_is_what_the_tokenizer_does(own: PreTrainedTokenizerFast) -> None:
    text = TokenText(own)
    for words in (" teeth", "teeth", " gingivitis", "ing", ";", "é", " 日", "    "):
        assert text.spell(words.encode()) == own(words)["input_ids"]
    assert text.spell(b"\xe6") == own.convert_tokens_to_ids([byte_level_alphabet()[0xE6]])


def test_byte_alphabet_is_the_librarys() -> None:
    assert sorted(byte_level_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_level_alphabet()[ord(" ")] == "Ġ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(plan: VocabularyMap, own: PreTrainedTokenizerFast, weight: torch.Tensor, dtype: torch.dtype) -> None:
    old = weight.to(dtype)
    new = transfer_embedding(old, plan)
    assert new.shape == (plan.target_rows, 8) and new.dtype == dtype
    texts = TokenText(own).texts
    ordinary = [index for index, text in enumerate(texts) if text is not None]
    mean = old[ordinary].float().mean(0).to(dtype)
    for index in range(plan.target_rows):
        spelled = sources(plan, index)
        if len(spelled) == 1:
            assert torch.equal(new[index], old[spelled[0]])
        elif spelled:
            lengths = torch.tensor([max(len(texts[token].strip()), 0.5) for token in spelled])
            expected = (old[spelled].float() * lengths[:, None]).sum(0) / lengths.sum()
            torch.testing.assert_close(new[index], expected.to(dtype), rtol=1e-2, atol=1e-2)
        else:
            torch.testing.assert_close(new[index], mean, rtol=1e-2, atol=1e-2)


def test_specials_go_by_role(
    plan: VocabularyMap, own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer, weight: torch.Tensor
) -> None:
    new = transfer_embedding(weight, plan)
    assert torch.equal(new[shared.pad_token_id], weight[own.pad_token_id])
    assert torch.equal(new[shared.eos_token_id], weight[own.eos_token_id])
    assert torch.equal(new[shared.unk_token_id], weight[own.unk_token_id])
    sentinel = new[shared.convert_tokens_to_ids("<extra_id_0>")]
    assert torch.equal(sentinel, new[-1]) and sentinel.abs().max() < 10
    assert plan.special_ids == {"pad": 0, "eos": 1, "unk": 2, "bos": None}


@pytest.mark.parametrize("tied", [True, False])
def test_model_gets_the_new_vocabulary(
    plan: VocabularyMap, own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer, tmp_path: Path, tied: bool
) -> None:
    model = mamba(len(own) + 3, tied)
    embedding = model.get_input_embeddings().weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    assert torch.equal(embedding, head) == tied
    ids = shared("the teeth", add_special_tokens=False)["input_ids"]
    spelled = [sources(plan, index) for index in ids]
    assert all(len(tokens) == 1 for tokens in spelled)
    with torch.no_grad():
        before = model(torch.tensor([[tokens[0] for tokens in spelled]])).logits
        transfer_vocabulary(model, plan)
        after = model(torch.tensor([ids])).logits
    assert (
        after.shape[-1] == plan.target_rows == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    )
    assert model.lm_head.out_features == plan.target_rows
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (0, 1, None)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 1)
    exact = [index for index in range(plan.target_rows) if len(sources(plan, index)) == 1]
    old_of_exact = [sources(plan, index)[0] for index in exact]
    torch.testing.assert_close(after[..., exact], before[..., old_of_exact], rtol=1e-6, atol=1e-6)
    assert torch.equal(model.lm_head.weight[exact], head[old_of_exact])

    model.save_pretrained(tmp_path)
    again = MambaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([ids])).logits, after)


def test_head_bias_moves_too(plan: VocabularyMap, own: PreTrainedTokenizerFast) -> None:
    model = mamba(len(own), tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(len(own)), requires_grad=False)
    bias = model.lm_head.bias.detach().clone()
    transfer_vocabulary(model, plan)
    assert model.lm_head.bias.shape == (plan.target_rows,) and not model.lm_head.bias.requires_grad
    assert model.lm_head.bias[1] == bias[own.eos_token_id]


@pytest.mark.parametrize("tied", [True, False])
def test_agreeing_vocabularies_are_the_identity(shared: MambaFormerTokenizer, tied: bool) -> None:
    model = mamba(len(shared) + 5, tied)
    model.config.pad_token_id = 7
    parameters = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    plan = transfer_vocabulary(model, plan_transfer(shared, shared, len(shared) + 5))
    assert plan.identity and plan.counts["exact"] == len(shared) and "agree" in plan.describe()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name][0] and torch.equal(parameter, parameters[name][1])
    assert (model.config.pad_token_id, model.config.vocab_size) == (0, len(shared) + 5)


def test_agreeing_vocabularies_with_other_row_counts(shared: MambaFormerTokenizer) -> None:
    plan = plan_transfer(shared, shared, len(shared) + 5)
    weight = torch.randn(len(shared), 4)
    new = transfer_embedding(weight, plan)
    assert torch.equal(new[: len(shared)], weight)
    assert torch.equal(new[len(shared)], new[-1])


def test_sentencepiece_to_bytes_and_back(own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer) -> None:
    """The other direction: a byte that is no character finds the byte piece, unknown text finds nothing."""
    plan = plan_transfer(shared, own, len(own))
    byte = own.convert_tokens_to_ids(byte_level_alphabet()[0xE6])
    assert shared.convert_ids_to_tokens(sources(plan, byte)) == ["<0xE6>"]
    assert shared.convert_ids_to_tokens(sources(plan, own.convert_tokens_to_ids("Ġthe"))) == ["▁the"]


def test_what_the_source_cannot_spell_gets_the_mean() -> None:
    def words(*extra: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *extra))}
        backend = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], unk_id=2))
        backend.decoder = decoders.Metaspace()
        return MambaFormerTokenizer(tokenizer_object=backend)

    plan = plan_transfer(words("▁gum", "s"), words("▁gums", "s", "β"), 6)
    assert plan.counts == {"exact": 1, "combined": 1, "special": 3, "unmatched": 1, "padding": 0}
    weight = torch.randn(5, 3)
    new = transfer_embedding(weight, plan)
    torch.testing.assert_close(new[5], weight[3:].mean(0))
    torch.testing.assert_close(new[3], 0.75 * weight[3] + 0.25 * weight[4])
    assert torch.equal(new[4], weight[4])


def test_bad_sizes_are_named(plan: VocabularyMap, own: PreTrainedTokenizerFast, shared: MambaFormerTokenizer) -> None:
    with pytest.raises(ValueError, match=f"target_rows={len(shared) - 1} is too small"):
        plan_transfer(own, shared, len(shared) - 1)
    with pytest.raises(ValueError, match=r"has 10 rows .* pass the tokenizer"):
        transfer_embedding(torch.zeros(10, 4), plan)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[PreTrainedTokenizerFast, MambaFormerTokenizer]:
    return (
        AutoTokenizer.from_pretrained(shared_data / "gptneox_tokenizer"),
        MambaFormerTokenizer.from_pretrained(shared_data / "t5_tokenizer"),
    )


def test_real_pair(real: tuple[PreTrainedTokenizerFast, MambaFormerTokenizer]) -> None:
    """T5's 32,100 pieces in a 32,128-row embedding out of GPT-NeoX's, as for mamba-130m."""
    neox, t5 = real
    start = time.perf_counter()
    plan = plan_transfer(neox, t5, 32128)
    assert time.perf_counter() - start < 30
    print(plan.describe())
    assert plan.counts == {"exact": 18271, "combined": 13726, "special": 3, "unmatched": 100, "padding": 28}
    text = TokenText(t5).texts
    ours = TokenText(neox).texts
    for index in range(0, 32000, 7):
        spelled = sources(plan, index)
        if text[index] is not None:
            assert b"".join(ours[token] for token in spelled) == text[index]
            assert spelled == neox(text[index].decode())["input_ids"], text[index]
    weight = torch.randn(50280, 4)
    new = transfer_embedding(weight, plan)
    the = t5.convert_tokens_to_ids("▁the")
    assert torch.equal(new[the], weight[neox.convert_tokens_to_ids("Ġthe")])


def test_t5_text_round_trip(real: tuple[PreTrainedTokenizerFast, MambaFormerTokenizer], shared_data: Path) -> None:
    """Text survives the shared tokenizer but for the characters that T5 itself can't spell."""
    _, t5 = real
    records = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    texts = [" ".join(record["LONG_ANSWER"].split()) for record in records.values()]
    lost = set(unspellable(t5, "".join(texts)))
    assert {"<", "≥", "≤", "β"} <= lost
    kept = [text for text in texts if not lost & set(text)]
    assert len(kept) > 800
    back = t5.batch_decode(t5(kept)["input_ids"], skip_special_tokens=True)
    normalise = t5.backend_tokenizer.normalizer.normalize_str
    assert [text for text, again in zip(kept, back, strict=True) if again != " ".join(normalise(text).split())] == []


def test_unspellable_of_t5(real: tuple[PreTrainedTokenizerFast, MambaFormerTokenizer]) -> None:
    _, t5 = real
    assert unspellable(t5, "a<b ±≥≤β< é%") == ["<", "±", "≥", "≤", "β"]
    assert unspellable(t5, "") == []
