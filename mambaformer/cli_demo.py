# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer demo`: five dental questions, their answers, and which expert wrote each token."""

from __future__ import annotations

import argparse

from .cli_ask import answer_question, embedded_model, load
from .cli_errors import say_less
from .cli_render import legend, print_question, show_routing, totals

QUESTIONS = (
    "What is gingivitis?",
    "What causes halitosis?",
    "How is irreversible pulpitis treated?",
    "How can dental erosion be prevented?",
    "What are the symptoms of a dry socket?",
)


def run(arguments: argparse.Namespace) -> None:
    """Serve `mambaformer demo`."""
    say_less()
    source = arguments.model or embedded_model()
    model, tokenizer = load(source)
    legend()
    answers = []
    for question in QUESTIONS:
        print_question(question)
        answers.append(answer_question(model, tokenizer, source, question))
        show_routing(answers[-1])
    totals(answers)
