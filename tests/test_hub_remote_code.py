# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A saved folder answers the same in a process that has torch, transformers and tokenizers, but not this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from remote_code_probe import HIDDEN, bare_environment, facts, run_probe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, pipeline

from mambaformer import MambaFormerTokenizer

QUESTIONS = ["What is plaque?", "Why do gums bleed after flossing?", "teeth"]


@pytest.fixture
def saved(model, tmp_path: Path) -> Path:
    """A composed model and its tokenizer, saved."""
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_process_without_the_package_gives_the_same_answers(saved: Path, tmp_path: Path) -> None:
    there = run_probe(bare_environment(tmp_path / "bare"), tmp_path / "elsewhere", str(saved), QUESTIONS)
    here = facts(str(saved), QUESTIONS)
    assert there["hidden"] == dict.fromkeys(HIDDEN, True) and there["path"] == []
    assert here["config"].startswith("mambaformer.") and here["AutoModel"]["class"].startswith("mambaformer.")
    for found in (there, there["again"]):
        assert found["config"].startswith("transformers_modules.")
        assert found["tokenizer"].startswith("transformers_modules.")
        for auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
            assert found[auto]["class"].startswith("transformers_modules.")
            assert found[auto]["class"].endswith(".MambaFormerForConditionalGeneration")
            assert found[auto]["tokens"] == here[auto]["tokens"]
            torch.testing.assert_close(
                torch.tensor(found[auto]["logits"]), torch.tensor(here[auto]["logits"]), atol=1e-4, rtol=1e-4
            )
    answers = pipeline("text2text-generation", model=str(saved))(
        QUESTIONS, max_new_tokens=12, expert_budget=0.5, return_route=True
    )
    for found in (there["pipeline"], there["again_pipeline"]):
        assert found["class"].startswith("transformers_modules.")
        assert found["unnamed"] == "MambaFormerText2TextPipeline"
        assert found["answers"] == answers
    assert set(there["again_files"]) == {path.name for path in saved.iterdir()}
    config = json.loads((tmp_path / "elsewhere" / "again" / "config.json").read_text(encoding="utf-8"))
    assert "--" not in json.dumps([config["auto_map"], config["custom_pipelines"]])


def test_the_package_serves_its_own_folders(saved: Path, tmp_path: Path) -> None:
    """
    Where the package is installed its classes are used, with and without `trust_remote_code`, and save again.

    With `trust_remote_code=True` transformers prefers a folder's own tokenizer class to a registered one: same code.
    """
    trusting = facts(str(saved), QUESTIONS)
    for name in (trusting["config"], trusting["AutoModel"]["class"], trusting["AutoModelForSeq2SeqLM"]["class"]):
        assert name.startswith("mambaformer.")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert isinstance(tokenizer, MambaFormerTokenizer)
    assert tokenizer(QUESTIONS)["input_ids"] == trusting["tokenizer_object"](QUESTIONS)["input_ids"]
    trusting["model_object"].save_pretrained(tmp_path / "again")
    trusting["tokenizer_object"].save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in saved.iterdir()}
    for name in ("config.json", "tokenizer_config.json", "modeling_mambaformer.py"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("saver", ["config", "model", "tokenizer", "pipeline"])
def test_whatever_is_saved_carries_all_files(saver: str, model, saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    savers = {
        "config": model.config,
        "model": model,
        "tokenizer": tokenizer,
        "pipeline": pipeline("text2text-generation", model=model, tokenizer=tokenizer),
    }
    savers[saver].save_pretrained(tmp_path / "new")
    files = {path.name for path in saved.glob("*.py")}
    assert {"modeling_mambaformer.py", "tokenization_mambaformer.py", "pipeline_mambaformer.py"} < files
    assert {path.name for path in (tmp_path / "new").glob("*.py")} == files
    if saver != "tokenizer":
        written = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
        model_class = "modeling_mambaformer.MambaFormerForConditionalGeneration"
        assert written["auto_map"] == {
            "AutoConfig": "configuration_mambaformer.MambaFormerConfig",
            "AutoModel": model_class,
            "AutoModelForSeq2SeqLM": model_class,
        }
        implementation = written["custom_pipelines"]["text2text-generation"]["impl"]
        assert implementation == "pipeline_mambaformer.MambaFormerText2TextPipeline"
