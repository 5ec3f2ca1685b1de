# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Make the embedded default again, from text to the folder that the package ships.

    python -m mambaformer.trainer.embedded [--out mambaformer/embedded] [--plain]

Tokenizer and token store first; then both experts side by side, one core each, in two parts, the second with noise in
the questions; then the router's questions, adapters, router and thresholds (`run.py`); then the look-ahead heads, on
the training answers of DentalQA. Everything lies under `runs/`, and a command given again goes on where it was
stopped. Pretraining ends by the clock: on another machine the same command sees more or fewer tokens. With `--plain`
it makes, on two cores for as long, the plain T5 that the evaluation sets beside them, in
`runs/embedded_plain_t5_noise/et5`, and nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"
DATA = Path("runs/embedded_pretrain/data")
ROUTER_QUESTIONS = Path("runs/router_questions")
PARTS = {
    "embedded_pretrain": {
        "et5": ("--reading_from", "2200", "--reading_factor", "2.5"),
        "emamba": ("--weight_dental", "0.80", "--weight_context", "0.13", "--weight_recall", "0.02"),
    },
    "embedded_noise": {
        "et5": (),
        "emamba": ("--weight_dental", "0.86", "--weight_context", "0.09", "--weight_recall", "0.02"),
    },
}
"""
The parts of pretraining, each a file in `configs/`, and what differs between the experts there: ET5 reads more from
the middle of the first part on, while a state of fixed size gains little from exercises in copying.
"""
PLAIN = Path("runs/embedded_plain_t5")
PLAIN_NOISE = Path("runs/embedded_plain_t5_noise")


def command(module: str, *arguments: str) -> None:
    """Run a module of this package in a process of its own; raises `CalledProcessError` where it fails."""
    subprocess.run([sys.executable, "-m", f"mambaformer.trainer.{module}", *arguments], check=True)


def pretrain(config: str, *arguments: str) -> None:
    """One step of `trainer.pretrain` with the shipped configuration of that name."""
    command("pretrain", str(CONFIGS / f"{config}.yaml"), *arguments)


def is_trained(folder: Path) -> bool:
    """Whether an expert's pretraining has ended there."""
    return (folder / "config.json").is_file()


def pretrain_experts() -> None:
    """Both experts through all parts, side by side."""
    for part, differences in PARTS.items():
        experts = [name for name in differences if not is_trained(Path("runs") / part / name)]
        with ThreadPoolExecutor(max_workers=2) as pool:
            started = [pool.submit(pretrain, part, "--expert", name, *differences[name]) for name in experts]
            for finished in started:
                finished.result()


def pretrain_plain() -> None:
    """The plain T5 through the same parts."""
    if not is_trained(PLAIN / "et5"):
        pretrain("embedded_plain_t5")
    if not is_trained(PLAIN_NOISE / "et5"):
        folders = ("--initial_dir", str(PLAIN), "--output_dir", str(PLAIN_NOISE))
        pretrain("embedded_noise", "--expert", "et5", "--threads", "2", *folders)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mambaformer/embedded"), help="folder of the result")
    parser.add_argument("--plain", action="store_true", help="make the plain T5 to measure it against instead")
    arguments = parser.parse_args()
    if not (DATA / "probes.json").is_file():
        pretrain("embedded_pretrain", "--stage", "data")
    if arguments.plain:
        pretrain_plain()
        return
    pretrain_experts()
    if not (ROUTER_QUESTIONS / "distil.jsonl").is_file():
        command("router_questions", str(ROUTER_QUESTIONS))
    command("run", str(CONFIGS / "dental_embedded.yaml"), "--resume", "true")
    shutil.copytree("runs/dental_embedded/model", arguments.out, dirs_exist_ok=True)
    command("look_ahead_heads", str(arguments.out), "--dataset", "dental_qa", "--save_dtype", "bfloat16")
    print(f"saved: {arguments.out}")


if __name__ == "__main__":
    main()
