# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Start training commands that are killed, without warning, in the middle of writing a file.

Reads one JSON object a line: `command` (a script, or a module's name, and its arguments), `log` (a file for all that
it says), and `half` (the end of a path: the process kills itself once half of that file is written) or `once` (a path:
it is killed as soon as that exists) or neither. Answers with the exit code of each, negative for a signal. The
commands are processes forked from this one, which has done nothing but import: only thereby do they start quickly.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerState

import mambaformer.trainer.pretrain
import mambaformer.trainer.training_run  # noqa: F401


def stopping(write, end: str):
    """`write`, whose second argument is a path; where that has this end, half of the file is left and no process."""

    def wrapper(*arguments, **options):
        result = write(*arguments, **options)
        if str(arguments[1]).endswith(end):
            os.truncate(arguments[1], Path(arguments[1]).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


def patch(end: str) -> None:
    """Let the functions that write checkpoints stop at the path with this end."""
    for module in list(sys.modules.values()):
        for name in ("save_file", "safe_save_file"):
            if getattr(module, "__dict__", {}).get(name) is SAVE_FILE:
                setattr(module, name, stopping(SAVE_FILE, end))
    torch.save = stopping(torch.save, end)
    TrainerState.save_to_json = stopping(TrainerState.save_to_json, end)


def child(command: list[str], log: str, half: str | None) -> None:
    """The forked process: never returns."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        if half:
            patch(half)
        sys.argv = command
        if command[0].endswith(".py"):
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(command: list[str], log: str, half: str | None = None, once: str | None = None) -> int:
    """Fork, wait, and give the exit code."""
    process = os.fork()
    if process == 0:
        child(command, log, half)
    while once and not Path(once).exists():
        time.sleep(0.002)
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    if once:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    SAVE_FILE = safetensors.torch.save_file
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
