# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Run a training command and kill its process, without warning, in the middle of writing one file.

    python stop_at.py checkpoint-6/optimizer.pt trainer/run.py config.yaml …
    python stop_at.py checkpoint-6/optimizer.pt mambaformer.trainer.pretrain --expert et5 …
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch


def stopping(write, at: int):
    """`write`, whose argument `at` is the path; where that is the named file, half of it is left and no process."""

    def wrapper(*arguments, **options):
        result = write(*arguments, **options)
        path = Path(arguments[at])
        if str(path).endswith(WHERE):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


if __name__ == "__main__":
    WHERE, command = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    safetensors.torch.save_file = stopping(safetensors.torch.save_file, 1)
    torch.save = stopping(torch.save, 1)
    from transformers import TrainerState

    TrainerState.save_to_json = stopping(TrainerState.save_to_json, 1)
    if command.endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
