# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Run transformers' model linter on the rooms that hold a configuration, a tokenizer or a model.

The linter takes a whole rules file or none. This writes one: its own, with the rules of `mlinter.toml` switched off.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mlinter

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where the linter itself brings this one
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configuration", "tokenizer", "modeling_mambaformer")


def main() -> int:
    """Write the rules, run the linter, return its exit code."""
    rules = (Path(mlinter.__file__).parent / "rules.toml").read_text(encoding="utf-8")
    for rule in tomllib.loads((ROOT / ".ci" / "mlinter.toml").read_text(encoding="utf-8"))["excluded"]:
        heading = rf"(\[rules\.{rule}\]\n(?:(?!\[).*\n)*?default_enabled = )true"
        rules, found = re.subn(heading, r"\1false", rules)
        if not found:
            sys.exit(f"{rule} is no enabled rule of this linter: remove it from .ci/mlinter.toml.")
    path = ROOT / "build" / "mlinter_rules.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(rules, encoding="utf-8")
    command = [str(Path(sys.executable).parent / "mlinter"), "--no-progress", "--rules-toml", str(path), *ROOMS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
