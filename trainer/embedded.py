# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Make the embedded default again, from text to the folder that the package ships.

    python -m mambaformer.trainer.embedded [--out mambaformer/embedded]

Tokenizer and token store first; then both experts side by side, one core each; then the router's questions, adapters,
router and thresholds (`run.py`). Everything lies under `runs/`, and a command given again goes on where it was
stopped. Pretraining ends by the clock: on another machine the same command sees more or fewer tokens.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"
PRETRAINING = Path("runs/embedded_pretrain")
ROUTER_QUESTIONS = Path("runs/router_questions")
OVERRIDES = {
    "et5": ("--reading_from", "2200", "--reading_factor", "2.5"),
    "emamba": ("--weight_dental", "0.80", "--weight_context", "0.13", "--weight_recall", "0.02"),
}
"""
What differs between them: ET5 reads more in its second half, while a state of fixed size gains little from exercises
in copying.
"""


def command(module: str, *arguments: str) -> None:
    """Run a module of this package in a process of its own; raises `CalledProcessError` where it fails."""
    subprocess.run([sys.executable, "-m", f"mambaformer.trainer.{module}", *arguments], check=True)


def pretrain(*arguments: str) -> None:
    """One step of `trainer.pretrain` with the shipped configuration."""
    command("pretrain", str(CONFIGS / "embedded_pretrain.yaml"), *arguments)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mambaformer/embedded"), help="folder of the result")
    out = parser.parse_args().out
    if not (PRETRAINING / "data" / "probes.json").is_file():
        pretrain("--stage", "data")
    experts = [name for name in ("et5", "emamba") if not (PRETRAINING / name / "config.json").is_file()]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for finished in [pool.submit(pretrain, "--expert", name, *OVERRIDES[name]) for name in experts]:
            finished.result()
    if not (ROUTER_QUESTIONS / "distil.jsonl").is_file():
        command("router_questions", str(ROUTER_QUESTIONS))
    command("run", str(CONFIGS / "dental_embedded.yaml"), "--resume", "true")
    shutil.copytree("runs/dental_embedded/model", out, dirs_exist_ok=True)
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
