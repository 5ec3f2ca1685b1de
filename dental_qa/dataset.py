# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""From concepts to the finished rows: composes them, removes what would leak between splits, keeps them as Parquet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .compose import Composer
from .loading import PACKAGE, load_concepts
from .schema import COLUMNS, SPLITS, Concept, Row
from .similarity import near_duplicates, normalise
from .splitting import choose_held_out, read_held_out

if TYPE_CHECKING:
    from datasets import Dataset

DATA = PACKAGE / "data"


def data_dir() -> Path:
    """The folder with the built data set and its card; `datasets.load_dataset(data_dir())` loads it."""
    return DATA


def load_dental_qa(split: str = "train", folder: Path | str | None = None) -> Dataset:
    """One split as a `datasets.Dataset`, held in memory; needs no network and writes no cache.

    Args:
        split: one of `train`, `validation`, `test_phrasing`, `test_concept`, `test_long`.
        folder: where the Parquet files are; by default the packaged data.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the data set has not been built.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; the splits are {', '.join(SPLITS)}.")
    path = Path(folder or DATA) / f"{split}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run `python -m mambaformer.dental_qa.build` first.")
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(pq.read_table(path)))


def build_rows(concepts: list[Concept], held_out: list[str] | None = None) -> tuple[list[Row], Counter[str]]:
    """All rows, sorted by split, and how many rows were removed for which reason.

    Args:
        held_out: ids of the concepts of test_concept; by default the frozen choice, or a fresh one.
    """
    if held_out is None:
        held_out = read_held_out() or choose_held_out(concepts)
    rows = list(Composer(concepts, held_out).rows())
    rows.sort(key=lambda row: SPLITS.index(row.split))  # stable: concepts keep their order
    return without_leaks(rows)


def probe_rows(count: int, concepts: list[Concept] | None = None) -> list[Row]:
    """Single questions about training concepts in unseen wordings; see `Composer.probe`. Deterministic."""
    if concepts is None:
        concepts, _ = load_concepts()
    return Composer(concepts, read_held_out() or choose_held_out(concepts)).probe(count)


def without_leaks(rows: list[Row]) -> tuple[list[Row], Counter[str]]:
    """Removes repeated rows, then every row whose question or answer an earlier split has too (or nearly so)."""
    removed: Counter[str] = Counter()
    kept = [row for split in SPLITS for row in _distinct([row for row in rows if row.split == split], removed)]
    for part in ("question", "answer"):
        groups = [{normalise(getattr(row, part)) for row in kept if row.split == split} for split in SPLITS]
        clashes = {(SPLITS[later], text) for later, text, *_ in near_duplicates(groups)}
        clean = [row for row in kept if (row.split, normalise(getattr(row, part))) not in clashes]
        removed.update(f"{row.split}: {part} in an earlier split" for row in set(kept) - set(clean))
        kept = clean
    return kept, removed


def _distinct(rows: list[Row], removed: Counter[str]) -> list[Row]:
    """The first of the rows that share question and context."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (normalise(row.question), row.context)
        if key in first:
            removed[f"{row.split}: repeated question"] += 1
        else:
            first[key] = row
    return list(first.values())


def write_parquet(rows: list[Row], folder: Path) -> None:
    """One `<split>.parquet` per split, byte for byte the same for the same rows and the same pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.list_(pa.string()) if name == "facts" else pa.string()) for name in COLUMNS])
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        table = pa.Table.from_pylist([row.as_dict() for row in rows if row.split == split], schema=schema)
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", compression_level=19)


def read_rows(folder: Path = DATA) -> list[Row]:
    """The rows of a built data set, as `build_rows` made them."""
    import pyarrow.parquet as pq

    records = [record for split in SPLITS for record in pq.read_table(folder / f"{split}.parquet").to_pylist()]
    return [Row(**{**record, "facts": tuple(record["facts"])}) for record in records]
