# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What a figure needs beside it: the machine, the versions and the date of the run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "bert-score",
    "rouge-score",
)


VECTORS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "asimd": "NEON",
}
"""Instructions that decide how fast products are, the best first: the flag in /proc/cpuinfo and the usual name."""


def cpu_info(*names: str) -> str | None:
    """The first line of /proc/cpuinfo under one of these names, where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split("\t", 1)[0] in names:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def processor() -> str:
    """The processor's name, as the system gives it."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def vectors() -> str | None:
    """The best of `VECTORS` that the processor has, where the system tells."""
    flags = (cpu_info("flags", "Features") or "").split()
    return next((name for flag, name in VECTORS.items() if flag in flags), None)


def describe_machine() -> dict[str, object]:
    """Machine, versions and date, ready for a result's JSON."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "vectors": vectors(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
