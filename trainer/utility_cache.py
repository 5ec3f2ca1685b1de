# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Both experts' opinions of a data set on disk: Arrow files, memory-mapped, that a killed run can go on with.

A cache is a folder named by the fingerprint of all that its values depend on: the experts' weights, configurations and
adapters, the tokenizer, the rows and their lengths. Whatever of these changes, the fingerprint changes, and nothing
old is read. A shard appears under its name only when it is whole and on disk: it is written under another name,
flushed, and renamed. What is read is checked against the rows all the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)

UTILITY_COLUMNS = ("log_p_et5", "log_p_emamba", "top_et5", "top_emamba")
FEATURES = Features(
    {name: Sequence(Value("float32" if name.startswith("log_p") else "int32")) for name in UTILITY_COLUMNS}
)
"""Of one row: nats and token ids, each as long as the row's labels."""
SHARD_ROWS = 1024
"""Rows a file: what a killed run computes again at most, on each process."""
FORMAT = 1
"""Of the files; part of the fingerprint."""
FINGERPRINT_FILE = "fingerprint.json"
NOT_WEIGHTS = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Fields of an expert's configuration on which its outputs do not depend."""

Columns = dict[str, list]


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Hexadecimal BLAKE2b of 128 bits of `parts`, one after another, each with its length."""
    running = hashlib.blake2b(digest_size=16)
    for part in parts:
        running.update(len(part).to_bytes(8, "little"))
        running.update(part)
    return running.hexdigest()


def expert_digest(expert: nn.Module) -> str:
    """Of an expert's configuration, of every weight by name, type, shape and bits, and of its adapters' scales."""

    def parts() -> Iterable[bytes | memoryview]:
        config = {name: value for name, value in expert.config.to_dict().items() if name not in NOT_WEIGHTS}
        yield json.dumps(config, sort_keys=True, default=str).encode()
        for name, module in expert.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield f"{name} {sorted(module.scaling.items())} {module.active_adapters} {module.merged}".encode()
        for name, tensor in expert.state_dict().items():
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    return digest(parts())


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a tokenizer's vocabulary and rules, its padding side and special ids; of nothing where there is none."""
    if tokenizer is None:
        return digest([])
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # of the last call
    vocabulary = {} if rules else tokenizer.get_vocab()
    named = [rules, vocabulary, tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return digest([json.dumps(named, sort_keys=True).encode()])


def rows_digest(dataset: Dataset) -> tuple[str, str]:
    """Of the token ids of sources and labels, and of their lengths."""
    content, lengths = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    columns = ["input_ids", "attention_mask", "labels"]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            values = table.column(name).combine_chunks()
            ids = pc.cast(values.flatten(), pa.int64())
            content.update(ids.to_numpy(zero_copy_only=False).tobytes())
            lengths.update(pc.cast(pc.list_value_length(values), pa.int64()).to_numpy(zero_copy_only=False).tobytes())
    return content.hexdigest(), lengths.hexdigest()


def fingerprint(model: nn.Module, dataset: Dataset, tokenizer: Any = None) -> dict[str, Any]:
    """
    All that the cached values depend on, by name, as digests: `et5`, `emamba`, `special_ids`, `tokenizer`, `rows`,
    `lengths`, `count` and `format`. Weights are read once: about a second a gigabyte.
    """
    rows, lengths = rows_digest(dataset)
    config = model.config
    return {
        "et5": expert_digest(model.et5),
        "emamba": expert_digest(model.emamba),
        "special_ids": [config.pad_token_id, config.eos_token_id, config.decoder_start_token_id],
        "tokenizer": tokenizer_digest(tokenizer),
        "rows": rows,
        "lengths": lengths,
        "count": len(dataset),
        "format": [FORMAT, SHARD_ROWS],
    }


class UtilityCache:
    """
    The cache of one data set under one pair of experts.

    Args:
        folder: of all caches; this one is a folder in it, made where it is missing.
        dataset: rows with `labels`.
        parts: what `fingerprint` returned.
    """

    def __init__(self, folder: str | Path, dataset: Dataset, parts: dict[str, Any]):
        text = json.dumps(parts, sort_keys=True, indent=1)
        self.folder = Path(folder) / digest([text.encode()])
        self.dataset = dataset
        count = len(dataset)
        self.spans = [range(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
        if not self.folder.is_dir():
            for other in sorted(Path(folder).glob(f"*/{FINGERPRINT_FILE}")):
                logger.info("cache %s is of other %s", other.parent.name, " and ".join(differing(other, parts)))
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / FINGERPRINT_FILE, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.folder / f"{number:05d}-of-{len(self.spans):05d}.arrow"

    def read(self, number: int) -> Dataset | None:
        """A shard, memory-mapped; `None` where there is none, or none that fits its rows."""
        path = self.path(number)
        if not path.is_file():
            return None
        try:
            shard = Dataset.from_file(str(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): it is computed again", path, error)
            return None
        span = self.spans[number]
        fits = shard.features == FEATURES and len(shard) == len(span)
        if fits:
            expected = lengths_of(self.dataset.select(span), "labels")
            fits = all(lengths_of(shard, name) == expected for name in UTILITY_COLUMNS)
        if not fits:
            logger.warning("%s does not fit its rows: it is computed again", path)
        return shard if fits else None

    def write(self, number: int, columns: Columns) -> None:
        """A shard from `columns`, all of it or nothing."""

        def save(path: str) -> None:
            with ArrowWriter(path=path, features=FEATURES) as writer:
                writer.write_batch(columns)
                writer.finalize()

        replace_file(self.path(number), save)

    def fill(self, compute: Callable[[Dataset], Columns], rank: int = 0, processes: int = 1) -> int:
        """Compute the missing shards among every `processes`-th from `rank`; returns how many there were."""
        missing = [n for n in range(rank, len(self.spans), processes) if self.read(n) is None]
        for number in missing:
            self.write(number, compute(self.dataset.select(self.spans[number])))
        return len(missing)

    def columns(self) -> Dataset:
        """
        All shards as one memory-mapped data set in the order of the rows; leftovers of killed runs are removed.

        Raises:
            RuntimeError: where a shard is missing: `fill` first.
        """
        shards = [self.read(number) for number in range(len(self.spans))]
        missing = [self.path(number).name for number, shard in enumerate(shards) if shard is None]
        if missing:
            raise RuntimeError(f"{self.folder} lacks {len(missing)} shards, the first is {missing[0]}: fill it first.")
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        return concatenate_datasets(shards)


def lengths_of(dataset: Dataset, column: str) -> list[int]:
    """Lengths of a column's lists."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return pc.list_value_length(table.column(column)).to_pylist()


def differing(path: Path, parts: dict[str, Any]) -> list[str]:
    """Names of the `parts` that differ from those in a fingerprint's file."""
    other = json.loads(path.read_text(encoding="utf-8"))
    return [name for name, value in parts.items() if other.get(name) != value]


def replace_file(path: Path, save: Callable[[str], Any]) -> None:
    """Let `save(name)` write a file beside `path`, flush it to the disk and rename it to `path`, whole."""
    name = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        save(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except FileNotFoundError:  # taken for a leftover by a run that has just finished the same cache
        if not path.is_file():
            raise
    finally:
        Path(name).unlink(missing_ok=True)
    if os.name == "posix":  # the name, too, is to survive a crash
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
