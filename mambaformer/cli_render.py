# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Who wrote what, for the eye: colours in a terminal, brackets elsewhere, and one line that says what it cost."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cli_ask import Answer

EMAMBA_STYLE, ET5_STYLE, QUIET_STYLE, HEAD_STYLE = "green", "bold magenta", "dim", "bold"
ANSI = {EMAMBA_STYLE: "32", ET5_STYLE: "1;35", QUIET_STYLE: "2", HEAD_STYLE: "1"}
Part = tuple[str, str]  # text, style


def spans(answer: Answer) -> list[tuple[str, bool]]:
    """Runs of text by one expert: `(text, whether ET5 wrote it)`."""
    pairs = [(text, expert == 1) for text, expert in zip(answer.tokens, answer.experts, strict=True) if text]
    return [("".join(text for text, _ in run), by_et5) for by_et5, run in groupby(pairs, key=lambda pair: pair[1])]


def bracketed(answer: Answer) -> str:
    """The answer as plain text with ET5's words in square brackets, spaces left outside them."""
    parts = []
    for text, by_et5 in spans(answer):
        space = " " * (len(text) - len(text.lstrip(" ")))
        parts.append(f"{space}[{text.lstrip(' ')}]" if by_et5 else text)
    return "".join(parts).strip()


def cost(answers: Sequence[Answer]) -> str:
    """What ET5 wrote and what was run for it, over one or more answers."""
    tokens = sum(len(answer.experts) for answer in answers)
    routed = sum(expert == 1 for answer in answers for expert in answer.experts)
    run = sum(answer.et5_tokens for answer in answers)
    passes = sum(answer.et5_passes for answer in answers)
    encoder_calls = sum(answer.encoder_calls for answer in answers)
    milliseconds = sum(answer.milliseconds for answer in answers)
    return (
        f"ET5 wrote {routed} of {tokens} tokens ({routed / max(tokens, 1):.1%}) in {count(passes, 'decoder pass')}, "
        f"{max(run - routed, 0)} caught up, {count(encoder_calls, 'encoder call')} · {milliseconds:.0f} ms"
    )


def count(number: int, noun: str) -> str:
    """`1 pass`, `2 passes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def coloured() -> bool:
    """Whether standard output shows colours: a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def write(parts: Sequence[Part]) -> None:
    """Print one coloured line, by rich where it is installed (it wraps at words), else with ANSI codes."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print("".join(f"\033[{ANSI[style]}m{text}\033[0m" for text, style in parts))
    else:
        Console(file=sys.stdout).print(Text.assemble(*parts))


def write_quiet(text: str, style: str = QUIET_STYLE) -> None:
    """Print a line in `style` where there are colours."""
    if coloured():
        write([(text, style)])
    else:
        print(text)


def legend() -> None:
    """Say how the two experts are told apart."""
    if coloured():
        write([("Written by ", QUIET_STYLE), ("EMamba", EMAMBA_STYLE), (", ", QUIET_STYLE), ("ET5", ET5_STYLE)])
    else:
        print("Written by EMamba, [by ET5]")


def show_routing(answer: Answer) -> None:
    """Print an answer with its experts, then its cost."""
    if coloured():
        write([(text, ET5_STYLE if by_et5 else EMAMBA_STYLE) for text, by_et5 in spans(answer)])
    else:
        print(bracketed(answer))
    write_quiet(cost([answer]))


def print_question(question: str) -> None:
    """Print a question after an empty line."""
    print()
    write_quiet(question, HEAD_STYLE)


def totals(answers: Sequence[Answer]) -> None:
    """Print the totals over all answers after an empty line."""
    print()
    print(f"{count(len(answers), 'question')}: {cost(answers)}")
