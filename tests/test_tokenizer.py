# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The tokenizer: T5's ids from T5's folder, roles from the file, one source format, remote code that stands alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, T5Tokenizer

import mambaformer
from mambaformer.tokenizer.source_format import format_context, format_source
from mambaformer.tokenizer.tokenization_mambaformer import DEFAULT_MODEL_MAX_LENGTH, MambaFormerTokenizer
from mambaformer.trainer.train_tokenizer import train_tokenizer

CORPUS = [
    "Brush your teeth twice a day with a fluoride toothpaste.",
    "question: How often should I floss? context: Floss once a day to clean between the teeth.",
    "Plaque that stays on the gums causes gingivitis; the gums bleed and swell.",
] * 30

VARIED = [
    "How often should I floss?",
    "  two   spaces,\ttabs\nand line breaks  ",
    "Caries: 1.5 mg/L of fluoride (pH 5.5), 95% CI 0.8-1.2; p = 0.03",
    "naïve café, Zürich, e\u0301clair, ﬁlling",
    "<extra_id_0> fills the gap <extra_id_1>",
    "written out </s> in the text <pad>",
    "β < 3 ≥ ± 日本語 😀",
    "don't won't it's -- ... ?!",
    "",
    " ",
]


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    return train_tokenizer(CORPUS, 600)


@pytest.fixture
def tokenizer(backend: Tokenizer) -> MambaFormerTokenizer:
    return MambaFormerTokenizer(tokenizer_object=backend)


@pytest.fixture(scope="module")
def t5_folder(shared_data: Path) -> Path:
    return shared_data / "t5_tokenizer"


def test_t5_folder_gives_t5_ids(t5_folder: Path) -> None:
    theirs, ours = T5Tokenizer.from_pretrained(t5_folder), MambaFormerTokenizer.from_pretrained(t5_folder)
    for text in VARIED:
        expected = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == expected
        assert ours.decode(expected) == theirs.decode(expected)
        assert ours.decode(expected, skip_special_tokens=True) == theirs.decode(expected, skip_special_tokens=True)
    assert ours("one", "two")["input_ids"] == theirs("one", "two")["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)


def test_t5_ids_of_real_answers(shared_data: Path, t5_folder: Path) -> None:
    records = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    texts = [record["LONG_ANSWER"] for record in records.values()]
    theirs, ours = T5Tokenizer.from_pretrained(t5_folder), MambaFormerTokenizer.from_pretrained(t5_folder)
    assert len(texts) == 1000
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_t5_roles_and_length(t5_folder: Path) -> None:
    tokenizer = MambaFormerTokenizer.from_pretrained(t5_folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert (len(tokenizer), tokenizer.bos_token, tokenizer.model_max_length) == (32100, None, 512)
    assert tokenizer.sentinel_token_ids == list(range(32099, 31999, -1))


def test_roles_come_from_tokenizer_json_alone(t5_folder: Path, tmp_path: Path) -> None:
    shutil.copy(t5_folder / "tokenizer.json", tmp_path)
    tokenizer = MambaFormerTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("Floss daily.")["input_ids"][-1] == 1
    assert tokenizer.model_max_length == DEFAULT_MODEL_MAX_LENGTH


def test_sentencepiece_model_alone_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    shutil.copy(t5_folder / "spiece.model", tmp_path)
    with pytest.raises((OSError, ValueError), match=r"tokenizer|spiece"):
        MambaFormerTokenizer.from_pretrained(tmp_path)


def test_no_file_and_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer.json"):
        MambaFormerTokenizer()


def test_unknown_token_is_the_models_own() -> None:
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("??", 0.0), ("t", -1.0)], unk_id=2))
    tokenizer = MambaFormerTokenizer(tokenizer_object=backend)
    assert (tokenizer.unk_token, tokenizer("tx")["input_ids"]) == ("??", [3, 2, 1])


def test_missing_padding_token_is_named() -> None:
    backend = Tokenizer(models.WordLevel({"teeth": 0, "</s>": 1}, unk_token="teeth"))
    with pytest.raises(ValueError, match="pad_token"):
        MambaFormerTokenizer(tokenizer_object=backend)


def test_eos_is_appended_where_the_file_does_not() -> None:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "teeth": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = MambaFormerTokenizer(tokenizer_object=backend)
    assert tokenizer("teeth gums")["input_ids"] == [3, 2, 1]
    assert tokenizer("teeth", "teeth")["input_ids"] == [3, 1, 3, 1]
    assert tokenizer("teeth", add_special_tokens=False)["input_ids"] == [3]


def test_save_and_reload_are_equal(tokenizer: MambaFormerTokenizer, tmp_path: Path) -> None:
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path / "a")
    again = MambaFormerTokenizer.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.model_max_length == 77
    assert again(VARIED)["input_ids"] == tokenizer(VARIED)["input_ids"]


def test_t5_saved_and_reloaded(t5_folder: Path, tmp_path: Path) -> None:
    first = MambaFormerTokenizer.from_pretrained(t5_folder)
    first.save_pretrained(tmp_path)
    again = MambaFormerTokenizer.from_pretrained(tmp_path)
    assert again(VARIED)["input_ids"] == first(VARIED)["input_ids"]
    assert (again.all_special_ids, again.model_max_length) == (first.all_special_ids, 512)


@pytest.mark.parametrize("endless", [None, int(1e30), 0])
def test_model_max_length_is_always_finite(backend: Tokenizer, tmp_path: Path, endless: int | None) -> None:
    tokenizer = MambaFormerTokenizer(tokenizer_object=backend, model_max_length=endless)
    assert tokenizer.model_max_length == DEFAULT_MODEL_MAX_LENGTH
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == DEFAULT_MODEL_MAX_LENGTH


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_padding_sides(tokenizer: MambaFormerTokenizer, tmp_path: Path, side: str) -> None:
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    tokenizer = MambaFormerTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["Floss.", "Brush your teeth twice a day."], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    short, mask = batch["input_ids"][0], batch["attention_mask"][0]
    assert len(short) == len(batch["input_ids"][1])
    padding = mask.count(0)
    assert padding > 0
    ids = tokenizer("Floss.")["input_ids"]
    assert short == ([0] * padding + ids if side == "left" else ids + [0] * padding)


def test_truncation_keeps_eos(tokenizer: MambaFormerTokenizer) -> None:
    ids = tokenizer("Brush your teeth twice a day.", truncation=True, max_length=4)["input_ids"]
    assert len(ids) == 4 and ids[-1] == tokenizer.eos_token_id


def test_source_format() -> None:
    assert format_source("How often\n should I  floss? ") == "question: How often should I floss?"
    assert format_source("Why?", "  Plaque\tgrows. ") == "context: Plaque grows. question: Why?"
    assert format_source("Why?", " \n") == format_source("Why?", None) == "question: Why?"


@pytest.mark.parametrize("question", ["", "  ", "\n\t"])
def test_blank_question_is_refused_with_a_remedy(question: str) -> None:
    with pytest.raises(ValueError, match="pass a question") as failure:
        format_source(question, "context")
    assert repr(question) in str(failure.value)


@pytest.mark.parametrize("arguments", [(None,), (3,), ("Why?", 3)])
def test_source_of_a_wrong_type_is_refused(arguments: tuple) -> None:
    with pytest.raises(TypeError, match="must be a string"):
        format_source(*arguments)


def test_context_ids_are_a_prefix_of_the_source(tokenizer: MambaFormerTokenizer) -> None:
    """So EMamba's state after a context serves every question about it."""
    passage = "Floss once a day to clean between the teeth"
    read = tokenizer(format_context(passage), add_special_tokens=False)["input_ids"]
    source = tokenizer.encode_source("How often should I floss?", passage)
    assert source[: len(read)] == read and len(source) > len(read)
    assert source[-1] == tokenizer.eos_token_id
    assert format_context("  ") == ""


REMOTE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mambaformer":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "mambaformer" not in sys.modules
assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
print(type(tokenizer).__name__, tokenizer.encode_source("Why floss?", "Plaque grows."), tokenizer.padding_side)
"""


def test_remote_code_without_the_package(
    tokenizer: MambaFormerTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert written["auto_map"] == {"AutoTokenizer": ["tokenization_mambaformer.MambaFormerTokenizer", None]}
    assert written["tokenizer_class"] == "MambaFormerTokenizer"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "model")],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = tokenizer.encode_source("Why floss?", "Plaque grows.")
    assert done.stdout.strip().endswith(f"MambaFormerTokenizer {expected} left")


def test_auto_tokenizer_in_process(tokenizer: MambaFormerTokenizer, tmp_path: Path) -> None:
    """With the package imported its own class is used, and a garbled text can't slip in."""
    assert mambaformer.MambaFormerConfig.model_type == "mambaformer"
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert type(auto) is MambaFormerTokenizer
    text = "Plaque on the gums: 12.5 mg, β < 3."
    assert auto(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text
