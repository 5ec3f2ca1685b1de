# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The face of the package: public names, a light import, and Auto classes that know the model type."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import mambaformer

PUBLIC = {
    "MambaFormerConfig",
    "MambaFormerForConditionalGeneration",
    "MambaFormerQuantizationConfig",
    "MambaFormerTokenizer",
    "MambaFormerTrainer",
    "MambaFormerTrainingArguments",
    "embedded_checkpoint",
    "format_source",
}

LIGHT = """
import sys
import mambaformer
heavy = {"torch", "transformers", "numpy", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
assert dir(mambaformer)
"""

# Each line is a way in; after any of them, whatever is looked up first must be found.
WAYS = [
    "import mambaformer; from transformers import AutoConfig",
    "from transformers import AutoConfig; import mambaformer",
    "from mambaformer import MambaFormerTokenizer",
    "from mambaformer.modeling_mambaformer.cache_mambaformer import MambaFormerCache",
    "from mambaformer.pipelines.pipeline_mambaformer import MambaFormerText2TextPipeline",
]
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipelines
config = AutoConfig.for_model("mambaformer")
assert type(config).__module__ == "mambaformer.configuration.configuration_mambaformer"
for auto in (AutoModel, AutoModelForSeq2SeqLM):
    assert auto._model_mapping[type(config)].__name__ == "MambaFormerForConditionalGeneration"
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
assert "MambaFormerTokenizer" in str(TOKENIZER_MAPPING[type(config)])
implementation = pipelines.PIPELINE_REGISTRY.check_task("text2text-generation")[1]["impl"]
assert implementation.__module__ == "mambaformer.pipelines.pipeline_mambaformer"
assert "text2text-generation" not in getattr(pipelines, "REMOVED_TASKS", {})
"""


def test_public_names() -> None:
    assert set(mambaformer.__all__) == PUBLIC <= set(dir(mambaformer))
    for name in PUBLIC:
        assert getattr(mambaformer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mambaformer.nothing  # noqa: B018


def test_import_is_light() -> None:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
    ended = time.perf_counter()
    assert ended - started < 3 + 5 * (started - began)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_auto_classes_know_the_model_type(way: str) -> None:
    subprocess.run([sys.executable, "-c", way + KNOWN], check=True)


def test_missing_extras_are_named(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("mambaformer.trainer", "peft"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(vars(mambaformer), "MambaFormerTrainer", raising=False)
    with pytest.raises(ImportError, match=r'MambaFormerTrainer needs .*peft.*pip install "mambaformer\[train\]"'):
        mambaformer.MambaFormerTrainer  # noqa: B018


def test_embedded_checkpoint_is_there_or_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(mambaformer, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="no embedded checkpoint.*install mambaformer"):
        mambaformer.embedded_checkpoint()
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "config.json").write_text("{}")
    assert mambaformer.embedded_checkpoint() == tmp_path / "embedded"
