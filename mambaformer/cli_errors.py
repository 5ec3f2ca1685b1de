# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What a command line says when something is wrong: one sentence with the value and the remedy, never a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEBUG = "MAMBAFORMER_DEBUG"
LONGEST_MESSAGE = 600  # characters; two to five lines of a terminal
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class UserError(Exception):
    """An error that the user can mend; its text names the value received and what to do."""


def one_line(error: BaseException) -> str:
    """The message of `error` with white space collapsed, cut where it becomes a page; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"


def check_source(source: str, argument: str) -> None:
    """
    Check, without the network, that `source` can be a checkpoint: a folder with a config.json and whole safetensors
    files, or a Hub id.

    Raises:
        UserError: naming `argument` and what was found instead.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{argument} {source!r} is a folder without config.json: give a checkpoint's own folder.")
        for weights in sorted(path.glob("*.safetensors")):
            check_weights(weights, argument)
    elif path.exists():
        raise UserError(f"{argument} {source!r} is a file: give the folder it lies in, or a Hub id.")
    elif not HUB_ID.fullmatch(source) or source.startswith("."):
        raise UserError(f"{argument} {source!r} does not exist: check the path, or give a Hub id such as owner/name.")


def check_weights(file: Path, argument: str) -> None:
    """`UserError` where a safetensors file is not whole: its header says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{argument} {str(file)!r} is damaged or cut short ({one_line(error)}): fetch or save the checkpoint "
            "again."
        ) from error


@contextmanager
def reading(source: str, argument: str) -> Iterator[None]:
    """
    Turn what loading the checkpoint `source` may raise into a `UserError` that names `argument`.

    A foreign file can make the libraries raise nearly anything, hence the breadth of what is caught.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if Path(source).is_dir():
            raise UserError(f"{argument} {source!r} cannot be read: {one_line(error)}") from error
        raise UserError(
            f"{argument} {source!r} is neither a folder here nor a checkpoint that could be fetched from the Hub: "
            "check the spelling and the connection, and that HF_HUB_OFFLINE is not set."
        ) from error
    except Exception as error:
        raise UserError(f"{argument} {source!r} cannot be loaded: {one_line(error)}") from error


def say_less() -> None:
    """Silence progress bars, load reports and advice of the libraries; errors still reach the user."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
