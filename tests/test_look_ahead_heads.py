# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Heads that propose tokens: what they learn, how they are saved, and answers that stay those of plain decoding."""

from __future__ import annotations

import copy
import ctypes
import json

import pytest
import torch
from mixed_routing import mixed_model
from taught_heads import teach_answers
from test_look_ahead import check_same, question
from tiny_experts import VOCAB
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer import MambaFormerForConditionalGeneration
from mambaformer.modeling_mambaformer import draft_weights, look_ahead
from mambaformer.modeling_mambaformer.draft_weights import Drafter
from mambaformer.modeling_mambaformer.look_ahead_heads import add_heads
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY
from mambaformer.trainer import look_ahead_heads
from mambaformer.trainer.look_ahead_heads import later, train_heads

compiled = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled library was not built here")
GREEDY = {"max_new_tokens": 30, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture
def model(et5_folder, emamba_folder):
    made = copy.deepcopy(mixed_model(et5_folder, emamba_folder, seed=3))
    add_heads(made, 3, torch.arange(VOCAB), 20)
    return made


def test_untrained_heads_say_what_emambas_own_head_says(model):
    heads, hidden = model.look_ahead_heads, torch.randn(5, model.config.emamba.hidden_size)
    assert sorted(heads.tokens.tolist()) == list(range(VOCAB - 20, VOCAB))  # the most frequent ones
    expected = model.emamba.get_output_embeddings()(hidden)[:, heads.tokens]
    embeddings = model.emamba.get_input_embeddings()(torch.randint(VOCAB, (5, 3)))
    torch.testing.assert_close(heads(hidden, embeddings), expected[:, None].expand(-1, 3, -1))


def drafted(model, hidden: torch.Tensor, token: int, most: int, likely: float) -> list[int]:
    """What compiled code proposes."""
    heads = model.look_ahead_heads
    packed = heads.drafter.prepare(heads, model.emamba_decoder.prepare(model.emamba))
    packed.args.likely, packed.args.threads = likely, 2
    found = (ctypes.c_int64 * 9)(*[-1] * 9)
    hidden = ctypes.c_void_p(hidden.contiguous().data_ptr())
    count = DECODE_LIBRARY.mambaformer_draft(
        ctypes.byref(packed.args), hidden, ctypes.c_int64(token), ctypes.c_int64(most), found
    )
    assert all(rest == -1 for rest in found[count:])  # what it does not propose it does not write
    return found[:count]


@compiled
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8 embeddings"])
def test_compiled_proposals_are_those_of_the_modules(model, kind):
    """As many as all of them together are likely enough."""
    heads = model.look_ahead_heads
    heads.drafter = Drafter("float32")
    for layer in (heads.in_proj, heads.out_proj, heads.rows):
        torch.nn.init.normal_(layer.weight, std=0.4)
    if kind == "bfloat16":
        heads.to(torch.bfloat16).to(torch.float32)  # read as bfloat16, exactly
    if kind == "int8 embeddings":
        model.quantize("int8")
    embeddings, lengths = model.emamba.get_input_embeddings(), set()
    with torch.no_grad():
        for seed in range(30):
            torch.manual_seed(seed)
            hidden, token = torch.randn(model.config.emamba.hidden_size), seed % VOCAB
            read, chance, chances = [token], 1.0, []
            for _ in range(3):
                logits = heads(hidden[None], embeddings(torch.tensor([read])))[0, -1]
                chance *= float(logits.softmax(-1).max())
                chances.append(chance)
                read.append(int(heads.tokens[logits.argmax()]))
            assert drafted(model, hidden, token, 9, 0.0) == read[1:]  # three, however many are asked for
            assert drafted(model, hidden, token, 1, 0.0) == read[1:2]
            likely = 0.3
            expected = sum(chance >= likely for chance in chances)
            assert all(abs(chance - likely) > 1e-4 for chance in chances)
            assert drafted(model, hidden, token, 3, likely) == read[1 : 1 + expected]
            lengths.add(expected)
        assert drafted(model, hidden, token, 0, 0.0) == drafted(model, hidden, VOCAB, 3, 0.0) == []
    assert len(lengths) > 1


@compiled
def test_rounded_heads_propose_much_the_same(model):
    heads, same = model.look_ahead_heads, 0
    for layer in (heads.in_proj, heads.out_proj, heads.rows):
        torch.nn.init.normal_(layer.weight, std=0.4)
    with torch.no_grad():
        for seed in range(30):
            torch.manual_seed(seed)
            hidden, found = torch.randn(model.config.emamba.hidden_size), []
            for heads.drafter in (Drafter("float32"), Drafter()):
                found.append(drafted(model, hidden, seed % VOCAB, 1, 0.0))
            same += found[0] == found[1]
    assert same > 24


@compiled
def test_changed_heads_are_packed_anew(model):
    heads, emamba = model.look_ahead_heads, model.emamba_decoder.prepare(model.emamba)
    heads.to(torch.bfloat16).to(torch.float32)  # of which a copy is read
    with torch.no_grad():
        packed = heads.drafter.prepare(heads, emamba)
        assert heads.drafter.prepare(heads, emamba) is packed
        heads.rows.weight.data.mul_(2.0)
        again = heads.drafter.prepare(heads, emamba)
        assert again is not packed and copy.deepcopy(heads.drafter).prepare(heads, emamba) is not again
        heads.in_proj.register_forward_hook(lambda *_: None)
        assert heads.drafter.prepare(heads, emamba) is None
    assert heads.drafter.prepare(heads, emamba) is None  # gradients are wanted


@compiled
@pytest.mark.parametrize("cache", [0, 2**40])
def test_heads_are_asked_where_the_cache_is_too_small_for_the_weights(model, cache, monkeypatch):
    monkeypatch.setattr(draft_weights, "LIKELY", 0.0)
    monkeypatch.setattr(draft_weights, "last_cache", lambda: cache)
    monkeypatch.setattr(look_ahead, "SHORTEST", 100)  # the text proposes nothing
    assert bool(model.generate(**question(0), **GREEDY, look_ahead=4).look_ahead.proposed) == (cache == 0)


@compiled
@pytest.mark.parametrize("routing", ["auto", "emamba"])
def test_answers_stay_the_same(model, routing, monkeypatch):
    """Whatever heads propose, at random or trained on the answers themselves, and where the text does so too."""
    monkeypatch.setattr(draft_weights, "LIKELY", 0.0)
    monkeypatch.setattr(draft_weights, "last_cache", lambda: 0)
    asked = GREEDY | {"routing": routing}
    plains = [model.generate(**question(seed), **asked) for seed in range(4)]
    found = [check_same(model.generate(**question(s), **asked, look_ahead=4), x) for s, x in enumerate(plains)]
    assert all(count.proposed > count.accepted for count in found)
    monkeypatch.setattr(look_ahead, "SHORTEST", 100)  # the heads alone
    teach_answers(model, [(question(seed)["input_ids"], x.sequences) for seed, x in enumerate(plains)], epochs=200)
    for seed, plain in enumerate(plains):
        count = check_same(model.generate(**question(seed), **asked, look_ahead=4), plain)
        assert count.accepted > count.proposed / 2 > 3
        narrow = check_same(model.generate(**question(seed), **asked, look_ahead=1), plain)
        assert narrow.proposed == narrow.passes > 0  # one at a time, as was asked


def test_heads_are_saved_and_loaded(model, tmp_path):
    torch.nn.init.normal_(model.look_ahead_heads.out_proj.weight)
    model.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.look_ahead_heads.state_dict().items():
        assert torch.equal(tensor, loaded.look_ahead_heads.state_dict()[name]), name
    assert loaded.look_ahead_heads.tokens.dtype == torch.long


def test_a_checkpoint_that_lacks_them_has_heads_that_propose_nothing_wild(model, tmp_path):
    model.look_ahead_heads = None
    model.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    heads = loaded.look_ahead_heads
    assert not any(tensor.any() for tensor in (heads.out_proj.weight, heads.rows.weight, heads.tokens))


def test_what_comes_later_ends_with_the_answer():
    said = torch.tensor([5, 6, 7, -1, 8, -1])
    assert later(said, 2).tolist() == [[6, 7], [7, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]


def test_training_makes_them_right(model, tmp_path, monkeypatch, capsys):
    """EMamba says much the same along these answers; the heads learn it, and nothing else changes."""
    model.look_ahead_heads = None
    rows = tiny_rows(60)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    right = train_heads(model, tiny_tokenizer(), rows, heads=2, candidates=48, epochs=40, batch=64, rate=1e-2)
    assert len(right) == 2 and right[0] > 0.3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="3 rows with sources of at most 256 tokens are too few"):
        train_heads(model, tiny_tokenizer(), rows[:3])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.look_ahead_heads, model.config.look_ahead_heads = None, 0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    argv = ["look_ahead_heads", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--epochs", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--candidates", "8"])
    look_ahead_heads.main()
    assert capsys.readouterr().out.count("%") == 3
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.look_ahead_heads.heads == 3 and loaded.config.look_ahead_candidates == 8
