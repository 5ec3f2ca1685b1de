# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The command line: `mambaformer ask`, `compose`, `merge`, `quantize` and `demo`.

Only parses and dispatches. Each command lives in a module of its own, imported when it runs, so that `--help` loads
neither torch nor transformers. An error that a user can mend is one or two lines on stderr and exit code 2;
`MAMBAFORMER_DEBUG=1` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .cli_errors import DEBUG, UserError, one_line

ROUTINGS = ("auto", "et5", "emamba", "soft")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDED = ("int8", "int4")
ROUNDED_ET5 = ("int8",)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sub-parser names the module whose `run(arguments)` serves it."""
    parser = argparse.ArgumentParser(
        prog="mambaformer", description="A T5 and a Mamba that share one answer, token by token. Not medical advice."
    )
    parser.add_argument("--version", action="version", version=f"mambaformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer one question")
    ask.set_defaults(module="cli_ask")
    ask.add_argument("question", help="the question, in plain text")
    ask.add_argument("--context", metavar="FILE", help="a UTF-8 text file to answer from")
    _add_model(ask)
    ask.add_argument("--show-routing", action="store_true", help="show which expert wrote each token, and the cost")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    ask.add_argument("--routing", choices=ROUTINGS, help="force an expert or a rule; default: the model's own")
    ask.add_argument("--budget", type=float, metavar="X", help="largest share of tokens for ET5, 0 to 1")
    ask.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")

    compose = commands.add_parser("compose", help="make a MambaFormer of two pretrained checkpoints")
    compose.set_defaults(module="cli_compose")
    compose.add_argument("--et5", required=True, metavar="ID", help="T5-family checkpoint: a Hub id or a folder")
    compose.add_argument("--emamba", required=True, metavar="ID", help="Mamba checkpoint: a Hub id or a folder")
    compose.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for model and tokenizer")
    compose.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    compose.add_argument("--quantize", choices=ROUNDED, help="hold EMamba's matrices rounded, for answering only")
    compose.add_argument("--tokenizer", metavar="ID", help="the shared tokenizer; default: ET5's own")
    compose.add_argument(
        "--emamba-tokenizer", metavar="ID", help="EMamba's own tokenizer; default: beside its weights"
    )
    compose.add_argument("--et5-revision", metavar="REV", help="pin ET5's revision on the Hub")
    compose.add_argument("--emamba-revision", metavar="REV", help="pin EMamba's revision on the Hub")

    merge = commands.add_parser("merge", help="write the whole model of adapters on named bases")
    merge.set_defaults(module="cli_merge")
    merge.add_argument("adapters", metavar="PATH_OR_ID", help="what was saved as adapters: a folder or a Hub id")
    merge.add_argument("out", metavar="DIR", help="new or empty folder for model and tokenizer")
    merge.add_argument("--et5", metavar="ID", help="ET5's base; default: the one that the adapters name")
    merge.add_argument("--emamba", metavar="ID", help="EMamba's base; default: the one that the adapters name")
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as saved")

    quantize = commands.add_parser("quantize", help="write a model with its matrices rounded to 8 or 4 bits")
    quantize.set_defaults(module="cli_quantize")
    quantize.add_argument("source", metavar="PATH_OR_ID", help="the model: a folder or a Hub id")
    quantize.add_argument("out", metavar="DIR", help="new or empty folder for model and tokenizer")
    quantize.add_argument("--weights", choices=ROUNDED, default="int8", help="EMamba's format (default: %(default)s)")
    quantize.add_argument("--et5", choices=ROUNDED_ET5, help="ET5's format; default: float, as it is")

    demo = commands.add_parser("demo", help="answer five dental questions and show the routing")
    demo.set_defaults(module="cli_demo")
    _add_model(demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="folder or Hub id; default: the embedded model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error the user can mend, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = build_parser().parse_args(argv)
    try:
        importlib.import_module(f".{arguments.module}", __package__).run(arguments)
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get(DEBUG):
            raise
        print(f"mambaformer: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left; Python must not flush into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
