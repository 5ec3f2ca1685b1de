# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer quantize`: a model in, the same model with EMamba's matrices rounded out."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_compose import check_free
from .cli_errors import UserError, check_source, one_line, reading, say_less


def run(arguments: argparse.Namespace) -> None:
    """Serve `mambaformer quantize`; nothing is loaded before the output folder is known to be free."""
    out, source = Path(arguments.out), arguments.source
    check_free(out)
    check_source(source, "PATH_OR_ID")
    say_less()
    from .modeling_mambaformer.composition import load_tokenizer
    from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    with reading(source, "PATH_OR_ID"):
        model = MambaFormerForConditionalGeneration.from_pretrained(source)
        tokenizer = load_tokenizer(source, None, "PATH_OR_ID")
    before = stored_bytes(model)
    try:
        model.quantize(arguments.weights)
    except ValueError as error:
        raise UserError(
            f"{source!r} cannot be written with --weights {arguments.weights}: {one_line(error)}"
        ) from error
    after = stored_bytes(model)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{arguments.out!r} cannot be written: {one_line(error)}") from error
    sizes = ", ".join(f"{part} {was / 1e6:.1f} -> {after[part] / 1e6:.1f} MB" for part, was in before.items())
    print(f"EMamba's matrices rounded to {arguments.weights} and written to {out}: {sizes}.")


def stored_bytes(model) -> dict[str, int]:
    """Bytes of the parameters of EMamba, and of all; what is shared counts once."""
    return {
        "EMamba": sum(parameter.nbytes for parameter in model.emamba.parameters()),
        "all weights": sum(parameter.nbytes for parameter in model.parameters()),
    }
