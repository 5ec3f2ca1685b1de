# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer compose`: two pretrained checkpoints in, one MambaFormer folder out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_errors import UserError, check_source, one_line, reading, say_less

if TYPE_CHECKING:
    from .tokenizer.tokenization_mambaformer import MambaFormerTokenizer


def run(arguments: argparse.Namespace) -> None:
    """Serve `mambaformer compose`; nothing is loaded before the output folder is known to be free."""
    out = Path(arguments.out)
    check_free(out)
    check_source(arguments.et5, "--et5")
    check_source(arguments.emamba, "--emamba")
    say_less()
    import torch
    from transformers import AutoConfig

    from .modeling_mambaformer.composition import load_tokenizer
    from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    for source, argument, revision in (
        (arguments.et5, "--et5", arguments.et5_revision),
        (arguments.emamba, "--emamba", arguments.emamba_revision),
    ):
        with reading(source, argument):
            AutoConfig.from_pretrained(source, revision=revision)
    tokenizer = shared_tokenizer(arguments)
    emamba_tokenizer = None
    if arguments.emamba_tokenizer:
        with reading(arguments.emamba_tokenizer, "--emamba-tokenizer"):
            emamba_tokenizer = load_tokenizer(arguments.emamba_tokenizer, None, "--emamba-tokenizer")
    try:
        model = MambaFormerForConditionalGeneration.from_experts_pretrained(
            arguments.et5,
            arguments.emamba,
            tokenizer,
            emamba_tokenizer=emamba_tokenizer,
            et5_revision=arguments.et5_revision,
            emamba_revision=arguments.emamba_revision,
            dtype=getattr(torch, arguments.dtype),
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if arguments.quantize:
            model.quantize(arguments.quantize)
    except Exception as error:  # as in `reading`; the message names the expert
        raise UserError(
            f"--et5 {arguments.et5!r} and --emamba {arguments.emamba!r} cannot be composed: {one_line(error)}"
        ) from error
    print(model.vocabulary_report or "EMamba has no tokenizer of its own: its rows are taken to be the shared ones.")
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"--out {arguments.out!r} cannot be written: {one_line(error)}") from error
    rounded = f", EMamba's matrices in {arguments.quantize}," if arguments.quantize else ""
    remedy = "compose without --quantize to train it" if arguments.quantize else "train it next"
    print(
        f"{parameters:,} parameters in {arguments.dtype}{rounded} written to {out}. The router is untrained: {remedy}."
    )


def shared_tokenizer(arguments: argparse.Namespace) -> MambaFormerTokenizer:
    """The tokenizer of the new model: `--tokenizer`, or the one beside ET5's checkpoint."""
    from .tokenizer.tokenization_mambaformer import MambaFormerTokenizer

    if arguments.tokenizer:
        with reading(arguments.tokenizer, "--tokenizer"):
            return MambaFormerTokenizer.from_pretrained(arguments.tokenizer)
    try:
        return MambaFormerTokenizer.from_pretrained(arguments.et5, revision=arguments.et5_revision)
    except Exception as error:  # as in `reading`
        raise UserError(
            f"no shared tokenizer could be read beside --et5 {arguments.et5!r}: name one with --tokenizer "
            f"({one_line(error)})"
        ) from error


def check_free(out: Path) -> None:
    """`UserError` unless `out` is new or an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file: name a new folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {str(out)!r} is not empty: name a new folder, or empty this one first.")
