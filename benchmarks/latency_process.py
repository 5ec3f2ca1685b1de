# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
An engine in a process of its own, asked over a pipe: its memory is its own, and no two pools of threads meet.

A request is one line of JSON, and so is its answer. What libraries print goes to a log, whose end is shown where a
process dies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from .latency_contestants import ENGINES

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CODE = f"from {__name__} import serve; serve()"
LOG_TAIL = 300  # characters
REFUSED_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EngineError(RuntimeError):
    """An engine could not do what it was asked; the text says why."""


def peak_memory() -> int | None:
    """Most bytes of memory that this process has had since `forget_peak`; `None` where the system does not tell."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) * 1024 if found else None


def forget_peak() -> None:
    """Let the peak of memory start again at what the process has now, where the system can."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def serve() -> None:
    """Answer requests from standard input until it ends; one that names an engine says which to be from then on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "engine" in request:
                engine, answer = build(request), {}
            else:
                answer = respond(engine, **request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def build(setup: dict[str, Any]) -> Any:
    """The engine that `setup` names, not loaded yet."""
    kind = ENGINES[setup["engine"]]
    return getattr(importlib.import_module(f".{kind.module}", __package__), kind.name)(setup, **kind.options)


def respond(engine: Any, do: str, **request: Any) -> dict[str, Any]:
    """Prepare, load or answer, with the peak of memory meanwhile; and what the engine was asked to measure."""
    forget_peak()
    start = time.perf_counter()
    answer = getattr(engine, do)(**request) or {}
    answer.setdefault("seconds", time.perf_counter() - start)
    answer.setdefault("peak_bytes", peak_memory())
    return answer


class EngineProcess:
    """
    A running engine.

    Args:
        setup: `engine` (a name in `ENGINES`), `folder`, `sizes`, `threads`, `device` and `longest` (tokens of the
            longest source).
        patience: seconds after which an answer is given up.

    Raises:
        EngineError: where the engine does not start.
    """

    def __init__(self, setup: dict[str, Any], patience: float):
        self.patience = patience
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        threads = dict.fromkeys(REFUSED_NAMES, str(setup["threads"]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=read_lines, args=(self.process.stdout, self.lines), daemon=True).start()
        self.become(setup)

    def become(self, setup: dict[str, Any]) -> None:
        """Be the engine of `setup`, in place of what it was. Raises as `ask`."""
        self._exchange(setup)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """
        The engine's answer to `prepare`, `load` or `answer`.

        Raises:
            EngineError: with the reason, where it failed, died or took too long; the process has then ended, unless it
                could say itself what went wrong.
        """
        return self._exchange({"do": do, **request})

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            self.close()
            raise EngineError(f"no answer within {self.patience:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        said = " ".join(self.log.read().decode(errors="replace").split())[-LOG_TAIL:]
        return f"its process ended with exit code {code}: {said}" if said else f"its process ended with {code}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process and give its memory back."""
        if self.alive:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()


def read_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Pass on what a process says, and an empty line when it has ended."""
    for line in stream:
        lines.put(line)
    lines.put("")


def missing_packages(engine: str) -> list[str]:
    """The packages that an engine needs and that are not installed."""
    return [name for name in ENGINES[engine].packages if importlib.util.find_spec(name) is None]
