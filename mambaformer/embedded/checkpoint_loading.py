# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What can be wrong with a checkpoint's weights, said with its name and the remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

LOADER = logging.getLogger("transformers.modeling_utils")


def is_news(record: logging.LogRecord) -> bool:
    """
    Whether a message of transformers' loader says what the user should know.

    T5 v1.1 has a head of its own. transformers 5 lets every `T5Config` say that it is tied, finds the two different,
    leaves them apart, as is right, and asks for a change of the configuration that it would not keep.
    """
    message = record.getMessage()
    return not ("will NOT tie them" in message and "et5.lm_head.weight" in message)


@contextmanager
def reading_weights(source: str | os.PathLike) -> Iterator[None]:
    """
    Around the loading of the checkpoint `source`, a Hub id or a folder.

    Raises:
        OSError: naming the file, where a safetensors file is damaged or cut short.
        ValueError: where the weights have other shapes than the configuration says.
    """
    LOADER.addFilter(is_news)
    try:
        yield
    except SafetensorError as error:
        damaged = [repr(file.name) for file in sorted(Path(source).glob("*.safetensors")) if not whole(file)]
        files = " and ".join(damaged) or "a safetensors file"
        raise OSError(
            f"{str(source)!r}: {files} is damaged or cut short ({error}): fetch or save the checkpoint again."
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r}: the weights have other shapes than config.json says: use the config.json that was "
            "saved with them."
        ) from error
    finally:
        LOADER.removeFilter(is_news)


def whole(file: Path) -> bool:
    """Whether a safetensors file is as long and as ordered as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def check_finite(model: nn.Module, source: str | os.PathLike) -> None:
    """Raise `ValueError` where a weight of `model`, loaded from `source`, is NaN or infinite, naming the tensor."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point() or tensor.element_size() < 2:
            continue
        low, high = tensor.detach().aminmax()  # NaN where any element is
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(
                f"{str(source)!r}: the weights in {name!r} are not finite; fetch or train the checkpoint again."
            )
