# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Which checkpoint folders of a stopped run may be trusted, and how folders are replaced so that a stop leaves none half.

A process that is killed may leave a checkpoint folder with files missing or cut short. transformers writes
`trainer_state.json` last, torch and safetensors both keep in the file what shows that it is all there.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
RESUMING = ("optimizer*", "scheduler.pt", "rng_state*")
"""Beside weights and state, what training goes on from; FSDP writes the optimizer as a folder or a .bin file."""
BROKEN, EARLIER = "broken-", ".earlier"


def fault_of(folder: Path, resuming: bool = True) -> str | None:
    """
    What is wrong with a checkpoint folder, `None` where it is whole.

    Args:
        folder: `checkpoint-<step>` as transformers' Trainer writes it.
        resuming: whether optimizer, schedule and random states must be there too.
    """
    state = folder / STATE
    if not state.is_file():
        return f"{STATE}, which is written last, is missing"
    for pattern in RESUMING if resuming else ():
        if not any(folder.glob(pattern)):
            return f"{pattern} is missing"
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*")):
        return "it holds no weights"
    for path in sorted(folder.iterdir()):
        reason = fault_of_file(path)
        if reason is not None:
            return f"{path.name} {reason}"
    step = json.loads(state.read_text(encoding="utf-8")).get("global_step")
    if step != int(NAME.fullmatch(folder.name)[1]):
        return f"{STATE} is of step {step}"
    return None


def fault_of_file(path: Path) -> str | None:
    """What is wrong with one file of a checkpoint, by its suffix; `None` where nothing shows."""
    if path.is_dir():  # a sharded state: its index is written last
        return None if any(file.stat().st_size for file in path.glob(".metadata")) else "lacks its .metadata"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # raises where the file is shorter than its header says
                return None
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path):  # its directory stands at the end
                return None
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
        return f"is not readable ({error})"
    return None


def last_whole_checkpoint(folder: str | Path, resuming: bool = True) -> str | None:
    """
    The path of the checkpoint with the highest step in `folder` that is whole, `None` where there is none.

    Broken ones are named in a warning, and renamed to `broken-checkpoint-<step>`, so that nothing is ever written
    among their remains. In a run of several processes, let one call this first.

    Args:
        folder: an output folder of a Trainer; may be absent.
        resuming: as in `fault_of`; False for runs with `save_only_model`.
    """
    folder = Path(folder)
    inside = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in inside if path.is_dir() and NAME.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True):
        reason = fault_of(path, resuming)
        if reason is None:
            return str(path)
        aside = path.with_name(BROKEN + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s is not whole and is not loaded: %s. It is now %s.", path, reason, aside.name)
    return None


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all is written; a stop before leaves the old."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename the folder of an earlier run, in place of one set aside before, so that a new run never resumes it."""
    if folder.is_dir() and any(folder.iterdir()):
        aside = folder.with_name(folder.name + EARLIER)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        logger.warning("%s is of an earlier run, and this one starts afresh: it is now %s.", folder, aside)
