# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Tables from local files, folders of files and Hub data sets, as they are, with errors that say what to mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, ReadInstruction, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def read_file(path: Path) -> Dataset:
    """
    A single local file, by its suffix. Cells of CSV and TSV files are taken as written: "None" and "NA" are answers.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for one that is not UTF-8, not readable in its format, or without rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file, a folder, 'dental_qa' or a Hub id.")
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has no rows: it is empty.")
    if suffix in TEXT_SUFFIXES:
        check_utf8(path)
    options: dict[str, bool | str] = {"keep_default_na": False} if READERS[suffix] == "csv" else {}
    if suffix == ".tsv":
        options["sep"] = "\t"
    try:
        return load_dataset(READERS[suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # the reader of each format raises errors of its own
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows: it is empty but for the names of its columns.") from error
        raise unreadable(f"{path} could not be read as {path.suffix[1:]}", error) from error


def read_named(name: str, config_name: str | None, split: str) -> Dataset:
    """
    One split of a folder of files, or of a Hub data set.

    Raises:
        FileNotFoundError: there is no such folder or data set.
        ValueError: for an unknown split or configuration, or files that are not UTF-8 or not readable.
    """
    if Path(name).is_dir():
        for path in sorted(Path(name).rglob("*")):
            if path.suffix.lower() in TEXT_SUFFIXES and path.is_file():
                check_utf8(path)
    try:
        return load_dataset(name, config_name, split=split)
    except FileNotFoundError:
        raise
    except DatasetsError as error:
        raise unreadable(f"{name} could not be read", error) from error


def unreadable(what: str, error: Exception) -> ValueError:
    """An error of one line, with the reader's own reason."""
    return ValueError(f"{what}: {' '.join(str(error.__cause__ or error).split())[:200]}")


def check_utf8(path: Path) -> None:
    """Raise `ValueError` naming the first byte that is not UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}. Save it as UTF-8, "
            f"for example with `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`."
        ) from None


def read_slices(spec: str, read_split: Callable[[str], Dataset]) -> Dataset:
    """
    What a split specification of `datasets` names, such as `train`, `train[:350]`, `train[10%:]+validation`.

    Args:
        read_split: gives a whole split by its name.
    """
    parts = [part.strip() for part in spec.split("+")]
    tables = {name: read_split(name) for name in dict.fromkeys(part.partition("[")[0] for part in parts)}
    if list(tables) == [spec]:
        return tables[spec]
    sizes = {name: len(table) for name, table in tables.items()}
    pieces = [
        tables[piece.splitname].select(
            range(piece.from_ or 0, sizes[piece.splitname] if piece.to is None else piece.to)
        )
        for part in parts
        for piece in ReadInstruction.from_spec(part).to_absolute(sizes)
    ]
    return concatenate_datasets(pieces)
