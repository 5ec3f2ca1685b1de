# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Heads that propose tokens: what they learn, how they are saved, and answers that stay those of plain decoding."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from mixed_routing import mixed_model
from test_look_ahead import check_same, question
from tiny_experts import VOCAB
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer import MambaFormerForConditionalGeneration
from mambaformer.modeling_mambaformer import look_ahead, state_log
from mambaformer.modeling_mambaformer.greedy_run import GreedyRun
from mambaformer.modeling_mambaformer.look_ahead_heads import LookAheadHeads, add_heads
from mambaformer.trainer import look_ahead_heads
from mambaformer.trainer.look_ahead_heads import later, train_heads

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
    torch.testing.assert_close(heads(hidden), expected[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("routing", ["auto", "emamba"])
def test_answers_stay_the_same(model, routing, monkeypatch):
    """Whether the heads are never right, as at random, or always."""
    if not state_log.can_log():
        pytest.skip("the compiled decoding step is not built")
    plain = model.generate(**question(3), **GREEDY, routing=routing)
    answer = plain.sequences[0].tolist()
    found = check_same(model.generate(**question(3), **GREEDY, routing=routing, look_ahead=4), plain)
    assert found.proposed > 0

    calls, run = [], GreedyRun.run
    monkeypatch.setattr(GreedyRun, "run", lambda self, *given: calls.append(given[1]) or run(self, *given))
    monkeypatch.setattr(LookAheadHeads, "propose", lambda self, hidden: answer[calls[-1] :][:3])
    monkeypatch.setattr(look_ahead, "SHORTEST", 100)  # what the text proposes may be wrong
    found = check_same(model.generate(**question(3), **GREEDY, routing=routing, look_ahead=4), plain)
    assert found.accepted == found.proposed > 0 and found.passes + found.accepted < len(answer)
    narrow = check_same(model.generate(**question(3), **GREEDY, routing=routing, look_ahead=1), plain)
    assert narrow.proposed == narrow.passes > 0  # one at a time, as was asked


def test_heads_are_saved_and_loaded(model, tmp_path):
    torch.nn.init.normal_(model.look_ahead_heads.proj)
    model.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.look_ahead_heads.state_dict().items():
        assert torch.equal(tensor, loaded.look_ahead_heads.state_dict()[name]), name
    assert loaded.look_ahead_heads.tokens.dtype == torch.long


def test_a_checkpoint_that_lacks_them_has_heads_that_propose_nothing_wild(model, tmp_path):
    model.look_ahead_heads = None
    model.save_pretrained(tmp_path)
    loaded = MambaFormerForConditionalGeneration.from_pretrained(tmp_path)
    assert all(not tensor.any() for tensor in loaded.look_ahead_heads.state_dict().values())


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
    with pytest.raises(ValueError, match="3 rows are too few"):
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
    assert loaded.look_ahead_heads.proj.shape[0] == 3 and loaded.config.look_ahead_candidates == 8
