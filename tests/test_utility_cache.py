# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The cache of both experts' log-probabilities: what it holds, when it is dropped, and that a kill leaves it whole."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_training import tiny_rows, tiny_tokenizer

from mambaformer.trainer import utility_cache
from mambaformer.trainer.adapters import adapted_layers, add_adapters
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import Collator, tokenize_qa
from mambaformer.trainer.distillation import UTILITY_COLUMNS, add_utilities
from mambaformer.trainer.trainer import MambaFormerTrainer
from mambaformer.trainer.utility_cache import FINGERPRINT_FILE, UtilityCache, fingerprint

TOKENIZER = tiny_tokenizer()
PARTS = {"et5": "a", "emamba": "b"}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """20 tokenised rows of different lengths."""
    return tokenize_qa(Dataset.from_list(tiny_rows(20)), TOKENIZER, 48, 16)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Files of four rows, so that twenty rows are five files."""
    monkeypatch.setattr(utility_cache, "SHARD_ROWS", 4)


class Calls:
    """Counts a module's forward calls."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


def columns_of(rows: Dataset) -> dict[str, list]:
    """Columns in the place of the experts': the row's labels, as numbers."""
    labels = rows["labels"]
    return {name: [list(map(float if "log" in name else int, row)) for row in labels] for name in UTILITY_COLUMNS}


def test_cached_equals_computed_and_is_memory_mapped(model, rows, tmp_path):
    collator, rows = Collator(TOKENIZER), rows.shuffle(seed=0)
    in_memory = add_utilities(model, rows, collator, 8)
    calls = Calls(model.et5.decoder)
    first = add_utilities(model, rows, collator, 8, tmp_path)
    assert calls.count == 5  # a batch a file
    again = add_utilities(model, rows, collator, 8, tmp_path)
    assert calls.count == 5
    (folder,) = tmp_path.iterdir()
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"0000{i}-of-00005.arrow" for i in range(5)] + [FINGERPRINT_FILE]
    assert {Path(file["filename"]).parent for file in again.cache_files} >= {folder}
    for name in UTILITY_COLUMNS:
        for one, two, three in zip(in_memory[name], first[name], again[name], strict=True):
            assert two == three
            assert one == (two if name.startswith("top") else pytest.approx(two, rel=1e-4, abs=1e-4))
    assert again["labels"] == rows["labels"]


def kill_at_shard(number: int):
    """A writer that dies by SIGKILL with shard `number` written in part, under a name that is not its own yet."""

    class Killed(utility_cache.ArrowWriter):
        count = 0

        def finalize(self, *args, **kwargs):
            Killed.count += 1
            if Killed.count > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().finalize(*args, **kwargs)

    return Killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill it")
def test_killed_while_writing_goes_on(rows, tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        utility_cache.ArrowWriter = kill_at_shard(2)
        UtilityCache(tmp_path, rows, PARTS).fill(columns_of)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    cache = UtilityCache(tmp_path, rows, PARTS)
    assert len(list(cache.folder.glob("*.arrow"))) == 2 and len(list(cache.folder.glob("*.tmp"))) == 1
    with pytest.raises(RuntimeError, match="lacks 3 shards"):
        cache.columns()
    computed = []
    assert cache.fill(lambda part: computed.append(len(part)) or columns_of(part)) == 3
    assert computed == [4, 4, 4]
    assert cache.columns()["top_et5"] == rows["labels"]
    assert not list(cache.folder.glob("*.tmp"))


@pytest.mark.parametrize("kept", [0, 0.3, 0.7, 0.95])
def test_a_cut_file_is_computed_again(rows, tmp_path, kept, caplog):
    cache = UtilityCache(tmp_path, rows, PARTS)
    assert cache.fill(columns_of) == 5
    content = cache.path(1).read_bytes()
    cache.path(1).write_bytes(content[: int(kept * len(content))])
    with caplog.at_level(logging.WARNING, utility_cache.logger.name):
        assert cache.fill(columns_of) == 1
    assert cache.path(1).name in caplog.text
    assert cache.path(1).read_bytes() == content
    assert cache.columns()["top_emamba"] == rows["labels"]


def test_a_file_of_other_rows_is_computed_again(rows, tmp_path):
    cache = UtilityCache(tmp_path, rows, PARTS)
    cache.fill(columns_of)
    os.replace(cache.path(3), cache.path(0))
    assert cache.fill(columns_of) == 2
    assert cache.columns()["top_et5"] == rows["labels"]


def test_processes_share_the_work(rows, tmp_path):
    cache = UtilityCache(tmp_path, rows, PARTS)
    assert [cache.fill(columns_of, rank, 2) for rank in (0, 1)] == [3, 2]
    assert cache.fill(columns_of) == 0


def test_fingerprint_changes_with_whatever_the_values_depend_on(model, rows, tmp_path):
    before = fingerprint(model, rows, TOKENIZER)

    def changed(*args) -> set[str]:
        after = fingerprint(*args)
        return {name for name in before if before[name] != after[name]}

    model.router.score.weight.data.add_(1)
    model.train()
    TOKENIZER("what is pulp?", truncation=True, max_length=3)
    assert changed(model, rows.add_column("other", [0] * len(rows)), TOKENIZER) == set()
    shorter = tokenize_qa(Dataset.from_list(tiny_rows(20)), TOKENIZER, 12, 16)
    assert changed(model, shorter, TOKENIZER) == {"rows", "lengths"}
    answers = [{**row, "answer": row["answer"].replace("pulp", "gum")} for row in tiny_rows(20)]
    assert changed(model, tokenize_qa(Dataset.from_list(answers), TOKENIZER, 48, 16), TOKENIZER) == {"rows"}
    assert changed(model, rows.select(range(19)), TOKENIZER) == {"rows", "lengths", "count"}
    other = tiny_tokenizer()
    other.add_tokens(["caries"])
    assert changed(model, rows, other) == {"tokenizer"}
    for expert in ("et5", "emamba"):
        weight = next(getattr(model, expert).parameters()).data.view(-1)
        kept = weight[7].clone()
        weight[7] = torch.nextafter(kept, torch.tensor(9.0))  # one bit
        assert changed(model, rows, TOKENIZER) == {expert}
        weight[7] = kept
    assert changed(model, rows, TOKENIZER) == set()
    add_adapters(model, MambaFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    adapted = fingerprint(model, rows, TOKENIZER)
    (_, layer), *_ = adapted_layers(model.et5)
    layer.scaling["default"] *= 2  # an adapter's strength is no tensor
    assert fingerprint(model, rows, TOKENIZER)["et5"] != adapted["et5"] != before["et5"]


def test_trainer_distils_from_the_cache_until_an_expert_changes(model, rows, tmp_path):
    calls = Calls(model.et5.decoder)

    def train() -> list[float]:
        args = MambaFormerTrainingArguments(
            output_dir=str(tmp_path), stage="distil", max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True,
            disable_tqdm=True, learning_rate=0.0, report_to="none",
        )  # fmt: skip
        trainer = MambaFormerTrainer(model=model, args=args, train_dataset=rows, processing_class=TOKENIZER)
        trainer.train()
        return [entry["loss_util"] for entry in trainer.state.log_history if "loss_util" in entry]

    first = train()
    assert calls.count == 5 and (tmp_path / "utilities").is_dir()
    assert train() == first and calls.count == 5
    with torch.no_grad():
        model.emamba.get_output_embeddings().weight.mul_(1.5)
    assert train() != first and calls.count == 10
    assert len(list((tmp_path / "utilities").iterdir())) == 2


def test_in_memory_where_asked(tmp_path):
    args = MambaFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, utility_cache="none")
    assert args.utility_folder is None
    args = MambaFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, utility_cache="elsewhere")
    assert args.utility_folder == "elsewhere"
