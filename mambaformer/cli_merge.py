# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer merge`: adapters on named bases in, one whole model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_compose import check_free
from .cli_errors import UserError, check_source, one_line, reading, say_less


def run(arguments: argparse.Namespace) -> None:
    """Serve `mambaformer merge`; nothing is loaded before the output folder is known to be free."""
    out = Path(arguments.out)
    check_free(out)
    check_source(arguments.adapters, "PATH_OR_ID")
    for base, argument in ((arguments.et5, "--et5"), (arguments.emamba, "--emamba")):
        if base is not None:
            check_source(base, argument)
    say_less()
    from .modeling_mambaformer.adapter_checkpoint import ADAPTED_FILE, is_adapter_checkpoint
    from .modeling_mambaformer.composition import load_tokenizer
    from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    source = arguments.adapters
    if not is_adapter_checkpoint(source):
        raise UserError(
            f"{source!r} holds no adapters on named bases ({ADAPTED_FILE} is absent, or whole weights are there): "
            "give a folder that `save_adapters` wrote, or its Hub id."
        )
    try:
        model = MambaFormerForConditionalGeneration.from_adapters_pretrained(
            source, arguments.et5, arguments.emamba, dtype=arguments.dtype
        )
    except Exception as error:  # as in `reading`; the message names the base
        raise UserError(
            f"{source!r} cannot be merged; --et5 and --emamba name the bases: {one_line(error)}"
        ) from error
    with reading(source, "PATH_OR_ID"):
        tokenizer = load_tokenizer(source, None, "PATH_OR_ID")
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{arguments.out!r} cannot be written: {one_line(error)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters in {str(model.dtype).removeprefix('torch.')} written to {out}.")
