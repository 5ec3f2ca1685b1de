# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer quantize`: a model in, the same model with its experts' matrices rounded out."""

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
        model.quantize(arguments.weights, arguments.et5)
    except ValueError as error:
        formats = f"--weights {arguments.weights}" + (f" --et5 {arguments.et5}" if arguments.et5 else "")
        raise UserError(f"{source!r} cannot be written with {formats}: {one_line(error)}") from error
    after = stored_bytes(model)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{arguments.out!r} cannot be written: {one_line(error)}") from error
    sizes = ", ".join(f"{part} {was / 1e6:.1f} -> {after[part] / 1e6:.1f} MB" for part, was in before.items())
    et5 = f", ET5's to {arguments.et5}," if arguments.et5 else ""
    print(f"EMamba's matrices rounded to {arguments.weights}{et5} and written to {out}: {sizes}.")


def stored_bytes(model) -> dict[str, int]:
    """Bytes of the parameters of either expert, and of all; what is shared counts once."""
    parts = {"EMamba": model.emamba, "ET5": model.et5, "all weights": model}
    return {name: sum(parameter.nbytes for parameter in part.parameters()) for name, part in parts.items()}
