# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Put the Inference Endpoints handler, or the Space's app, beside a saved model."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
INFERENCE = ("torch", "transformers", "tokenizers", "safetensors")


def requirements(*further: str) -> str:
    """Return `requirements.txt` for remote code: what this package declares for inference, and `further` packages."""
    declared = [Requirement(line) for line in importlib.metadata.requires("mambaformer") or ()]
    return "".join(f"{line}\n" for line in (*(r for r in declared if r.name in INFERENCE), *further))


def write_endpoint(folder: str | os.PathLike) -> list[Path]:
    """Write `handler.py` and `requirements.txt` into the folder of a saved model; return their paths."""
    return _write(Path(folder), "handler.py", requirements())


def write_space(folder: str | os.PathLike) -> list[Path]:
    """Write `app.py` and `requirements.txt` of the Space into `folder`; return their paths."""
    return _write(Path(folder), "app.py", requirements("gradio>=5"))


def _write(folder: Path, program: str, needed: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "requirements.txt"
    listed.write_text(needed, encoding="utf-8", newline="\n")
    return [Path(shutil.copyfile(HERE / program, folder / program)), listed]
