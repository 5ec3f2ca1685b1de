# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`push_to_hub` against a Hub in this process, then loading by name in a process without the package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from remote_code_probe import bare_environment, facts, run_probe
from test_hub_remote_code import QUESTIONS
from tiny_tokenizer import tiny_tokenizer

PUSH = """
import sys
from mambaformer import MambaFormerConfig, MambaFormerForConditionalGeneration, MambaFormerTokenizer
from transformers import pipeline

source = sys.argv[1]
model = MambaFormerForConditionalGeneration.from_pretrained(source)
tokenizer = MambaFormerTokenizer.from_pretrained(source)
model.push_to_hub("tester/two-steps")
tokenizer.push_to_hub("tester/two-steps")
pipeline("text2text-generation", model=model, tokenizer=tokenizer).push_to_hub("tester/at-once")
for saved, name in ((model, "model"), (tokenizer, "tokenizer"), (model.config, "config")):
    saved.save_pretrained(source, push_to_hub=True, repo_id=f"tester/{name}-alone")
"""


@pytest.fixture
def hub(repo_root: Path):
    """The URL and the store of a Hub on this machine."""
    path = repo_root.parent / "shared" / "tools" / "loopback_hub.py"
    if not path.is_file():
        pytest.skip(f"there is no Hub to push to: {path.name} is absent beside the repository")
    spec = importlib.util.spec_from_file_location("loopback_hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server, url = module.serve()
    yield url, server.store
    server.shutdown()


def test_pushed_models_load_by_name(hub, model, tmp_path: Path) -> None:
    url, store = hub
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    online = {
        "HF_ENDPOINT": url,
        "HF_TOKEN": "hf_dummy",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment = {**os.environ, **online}
    subprocess.run([sys.executable, "-c", PUSH, str(saved)], env=environment, cwd=tmp_path, check=True, timeout=1800)
    code = {path.name for path in saved.glob("*.py")}
    for (_, name), repository in store.repos.items():
        pushed = set(repository["commits"][-1][1])
        assert code <= pushed, name
        assert ("model.safetensors" in pushed) == (name not in ("tester/tokenizer-alone", "tester/config-alone"))
    files = {path.name for path in saved.iterdir()}
    assert files <= set(store.repos["models", "tester/two-steps"]["commits"][-1][1])
    assert files <= set(store.repos["models", "tester/at-once"]["commits"][-1][1])
    bare, here = bare_environment(tmp_path / "bare"), facts(str(saved), QUESTIONS)
    there = run_probe(bare, tmp_path / "elsewhere", "tester/two-steps", QUESTIONS, **online)
    for auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
        assert there[auto]["class"].startswith("transformers_modules.tester.")
        assert there[auto]["tokens"] == there["again"][auto]["tokens"] == here[auto]["tokens"]
    assert there["pipeline"]["answers"] == there["again_pipeline"]["answers"]
    assert there["again_pipeline"]["class"].startswith("transformers_modules.again.")
