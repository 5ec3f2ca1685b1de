# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Make the embedded default again, from text to the folder that the package ships.

    python -m mambaformer.trainer.embedded [--out mambaformer/embedded]

Tokenizer and token stores first; then both experts side by side, one core each, in two and three passes; then
adapters, router and thresholds (`run.py`). Everything lies under `runs/`, and a command given again goes on where it
was stopped. The minutes are wall-clock on two cores: on another machine the same command sees more or fewer tokens.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"
PASSES = {
    "embedded_pretrain": {"et5": 30, "emamba": 50},
    "embedded_pretrain_wordings": {"et5": 26, "emamba": 23},
    "embedded_pretrain_openings": {"emamba": 16},
}
"""Minutes of each pass by expert; each pass has a YAML file and a folder of its name."""


def command(module: str, *arguments: str) -> None:
    """Run a module of this package in a process of its own; raises `CalledProcessError` where it fails."""
    subprocess.run([sys.executable, "-m", f"mambaformer.trainer.{module}", *arguments], check=True)


def pretrain_expert(expert: str) -> None:
    """All passes of one expert, skipping what is finished."""
    for name, minutes in PASSES.items():
        if expert in minutes and not (Path("runs") / name / expert / "config.json").is_file():
            config = str(CONFIGS / f"{name}.yaml")
            command("pretrain", config, "--expert", expert, "--max_minutes", str(minutes[expert]))


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mambaformer/embedded"), help="folder of the result")
    out = parser.parse_args().out
    for name in PASSES:
        if not (Path("runs") / name / "data" / "probes.json").is_file():
            command("pretrain", str(CONFIGS / f"{name}.yaml"), "--stage", "data")
    with ThreadPoolExecutor(max_workers=2) as pool:
        for finished in [pool.submit(pretrain_expert, expert) for expert in ("et5", "emamba")]:
            finished.result()
    command("run", str(CONFIGS / "dental_embedded.yaml"), "--resume", "true")
    shutil.copytree("runs/dental_embedded/model", out, dirs_exist_ok=True)
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
