# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Keeps the engines of a benchmark ready, as many at a time as the machine's memory holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .latency_contestants import ENGINES
from .latency_process import EngineError, EngineProcess, build, missing_packages, respond

MEMORY = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that programs may still take without swapping; `None` where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    return int(found[1]) * 1024 if found else None


class LocalEngine:
    """An engine in this process, with the face of `EngineProcess`: quick to start, its memory not told apart."""

    alive = True

    def __init__(self, setup: dict[str, Any], patience: float):
        self.become(setup)

    def become(self, setup: dict[str, Any]) -> None:
        """Be the engine of `setup`."""
        try:
            self.engine = build(setup)
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """As `EngineProcess.ask`."""
        try:
            return {**respond(self.engine, do, **request), "peak_bytes": None}
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let the engine go."""
        self.engine = None


class Pool:
    """
    The engines, each written to disk once and loaded when first asked.

    Args:
        setup: what all engines share, see `EngineProcess`. folder: where their files go. patience: in seconds.
        processes: `False` keeps all of them in this process.

    `loaded` has what each engine said when it was loaded; `reloads` counts how often one had been closed for want of
    memory. An engine that cannot be prepared or loaded is not tried again.
    """

    def __init__(self, setup: dict[str, Any], folder: Path, patience: float, processes: bool = True):
        self.setup, self.folder, self.patience = setup, folder, patience
        self.kind = EngineProcess if processes else LocalEngine
        self.running: dict[str, Any] = {}  # the least recently asked first
        self.writer: Any = None
        self.loaded: dict[str, dict[str, Any]] = {}
        self.reloads: dict[str, int] = {}
        self.broken: dict[str, str] = {}

    def ask(self, engine: str, length: int, **request: Any) -> dict[str, Any]:
        """
        An answer of `engine` to a source of `length` tokens, see the engines' `answer`.

        Raises:
            EngineError: with the reason where there is none.
        """
        if engine in self.broken:
            raise EngineError(self.broken[engine])
        self.make_room(engine, length)
        running = self.running.pop(engine, None)
        if running is not None and not running.alive:
            running.close()
            running = None
        if running is None:
            try:
                running = self.start(engine)
            except EngineError as error:
                self.broken[engine] = str(error)
                raise
        self.running[engine] = running
        return running.ask("answer", length=length, **request)

    def prepare(self, engine: str) -> None:
        """
        Write an engine's files, unless they are there. Raises `EngineError` where it cannot.
        """
        missing = missing_packages(engine)
        try:
            if missing:
                raise EngineError(f"{' and '.join(missing)} not installed; pip install 'mambaformer[bench]'")
            if not self.mark(engine).exists():
                if self.writer is None or not self.writer.alive:
                    self.writer = self.kind(self.of(engine), self.patience)
                else:
                    self.writer.become(self.of(engine))
                self.writer.ask("prepare")
                self.mark(engine).touch()
        except EngineError as error:
            self.broken[engine] = str(error)
            raise

    def start(self, engine: str) -> Any:
        """Load an engine; one that had to be closed before answers once, to be warm again."""
        running = self.kind(self.of(engine), self.patience)
        told = running.ask("load")
        if engine in self.loaded:
            self.reloads[engine] = self.reloads.get(engine, 0) + 1
            running.ask("answer", length=16, new_tokens=4, turn=0)
        self.loaded.setdefault(engine, told)
        return running

    def make_room(self, engine: str, length: int) -> None:
        """Close other engines, the least recently asked first, until the memory for an answer is there."""
        needed = ENGINES[engine].working_bytes(self.setup["sizes"], length)
        for name in [name for name in self.running if name != engine]:
            free = available_memory()
            if free is None or free >= needed:
                break
            self.running.pop(name).close()

    def of(self, engine: str) -> dict[str, Any]:
        """The setup of one engine."""
        return {**self.setup, "engine": engine, "folder": str(self.folder / engine)}

    def mark(self, engine: str) -> Path:
        """The file that says that an engine's others are whole."""
        return self.folder / f"{engine}.{self.setup['sizes']}.ready"

    def written(self) -> None:
        """No engine is to be prepared any more."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def close(self) -> None:
        """End all engines."""
        self.written()
        while self.running:
            self.running.popitem()[1].close()
