# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The configuration: what it keeps through a round trip, and what it refuses, naming value and remedy."""

from __future__ import annotations

import json

import pytest
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, MT5Config, T5Config, UMT5Config

from mambaformer.configuration.configuration_mambaformer import DEFAULT_BUDGET, MambaFormerConfig

EXPERTS = {"et5": {"model_type": "t5", "vocab_size": 96}, "emamba": {"model_type": "mamba", "vocab_size": 96}}

IMPOSSIBLE = [
    ("expert_budget", -0.1, "between 0 and 1"),
    ("expert_budget", 1.5, "between 0 and 1"),
    ("expert_budget", float("nan"), "between 0 and 1"),
    ("expert_budget", "much", "between 0 and 1"),
    ("expert_budget", None, "between 0 and 1"),
    ("routing", "both", "choose one of"),
    ("routing", None, "choose one of"),
    ("merger", "average", "choose one of"),
    ("complement_weight", -1.0, "0 or more"),
    ("complement_weight", float("nan"), "0 or more"),
    ("router_rank", 0, "1 or more"),
    ("router_rank", "wide", "1 or more"),
    ("router_hidden_size", -4, "1 or more"),
    ("router_hidden_size", 3.5, "1 or more"),
    ("max_source_length", 0, "1 or more"),
    ("max_target_length", -1, "1 or more"),
    ("router_threshold", float("nan"), "calibrate"),
    ("router_threshold", "low", "calibrate"),
    ("router_threshold", None, "calibrate"),
    ("gate_threshold", float("nan"), "calibrate"),
    ("threshold_table", [], "ascending"),
    ("threshold_table", [[0.5, 1.0], [0.1, 2.0]], "ascending"),
    ("threshold_table", [[0.1, 1.0], [0.1, 2.0]], "ascending"),
    ("threshold_table", [[0.1, 1.0, 2.0]], "ascending"),
    ("threshold_table", [[0.1, float("nan")]], "ascending"),
    ("threshold_table", [0.1, 0.2], "ascending"),
    ("pad_token_id", 96, "below vocab_size 96"),
    ("pad_token_id", -1, "below vocab_size 96"),
    ("decoder_start_token_id", 5000, "below vocab_size 96"),
    ("decoder_start_token_id", None, "below vocab_size 96"),
    ("eos_token_id", 96, "below vocab_size 96"),
    ("eos_token_id", [1, 400], "below vocab_size 96"),
    ("cost_table", {"pass": -1.0}, "milliseconds"),
    ("cost_table", {"coffee": 1.0}, "milliseconds"),
]


@pytest.mark.parametrize(("field", "value", "remedy"), IMPOSSIBLE, ids=lambda x: str(x)[:24])
def test_impossible_values(field, value, remedy):
    with pytest.raises(ValueError) as raised:
        MambaFormerConfig(**EXPERTS, **{field: value})
    message = str(raised.value)
    assert field in message and repr(value) in message and remedy in message


def test_impossible_value_in_a_file(tmp_path):
    """What was edited by hand is refused when read, too."""
    MambaFormerConfig(**EXPERTS).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "expert_budget": 38}))
    with pytest.raises(ValueError, match="expert_budget is 38"):
        MambaFormerConfig.from_pretrained(tmp_path)


def test_mismatched_vocabularies():
    with pytest.raises(ValueError, match=r"et5 has 96 rows and emamba 97.*from_experts_pretrained"):
        MambaFormerConfig(et5=EXPERTS["et5"], emamba={"model_type": "mamba", "vocab_size": 97})


@pytest.mark.parametrize(("name", "model_type"), [("et5", "bart"), ("emamba", "gpt2"), ("et5", "mamba")])
def test_wrong_family(name, model_type):
    with pytest.raises(ValueError, match=f"{name} has model_type '{model_type}': choose"):
        MambaFormerConfig(**{**EXPERTS, name: {"model_type": model_type, "vocab_size": 96}})


@pytest.mark.parametrize("et5", [T5Config, MT5Config, UMT5Config])
@pytest.mark.parametrize("emamba", [MambaConfig, Mamba2Config, FalconMambaConfig])
def test_families(tmp_path, et5, emamba):
    """Every family offered survives a round trip as itself."""
    MambaFormerConfig(et5=et5(vocab_size=96), emamba=emamba(vocab_size=96)).save_pretrained(tmp_path)
    config = MambaFormerConfig.from_pretrained(tmp_path)
    assert type(config.et5) is et5 and type(config.emamba) is emamba
    assert config.vocab_size == 96


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    fields = {
        "router_features": ["length", "past"],
        "router_rank": 5,
        "expert_budget": 0.2,
        "router_threshold": -0.75,
        "threshold_table": [[0.1, 2.0], [0.4, -1.5]],
        "gate_threshold": 0.125,
        "merger": "complement",
        "complement_weight": 0.5,
        "routing": "emamba",
        "cost_table": {"pass": 3.5, "token": 0.25, "encoder": 9.0, "emamba": 1.5},
        "et5_name_or_path": "google/flan-t5-base",
        "et5_revision": "abc",
        "eos_token_id": [1, 2],
    }
    config = MambaFormerConfig(
        et5=T5Config(vocab_size=96, tie_word_embeddings=tied), emamba=MambaConfig(vocab_size=96), **fields
    )
    config.save_pretrained(tmp_path)
    again = MambaFormerConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(again, name) == value, name
    assert again.et5.scale_decoder_outputs == tied
    kept, written = again.to_dict(), config.to_dict()
    for name in ("auto_map", "custom_pipelines"):  # what leads to the remote code is written for others
        written.pop(name, None)
    assert {name: kept[name] for name in written} == written
    assert again.is_encoder_decoder and again.model_type == "mambaformer"


def test_defaults():
    config = MambaFormerConfig()
    assert config.et5.vocab_size == config.emamba.vocab_size == config.vocab_size
    assert config.expert_budget == DEFAULT_BUDGET == 0.038
    assert config.routing == "auto" and config.merger == "select" and config.gate_threshold is None
