# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The one text format of a source, shared by training data, the pipeline and the command line.

The context stands before the question: EMamba's state after a long document can then be kept and continued with
one question after another, since a causal state depends only on what it has already read.
"""

from __future__ import annotations

CONTEXT_PREFIX = "context:"
QUESTION_PREFIX = "question:"


def collapse_whitespace(text: str) -> str:
    """Return `text` with every run of white space (line breaks and tabs too) as one space and none at the ends."""
    return " ".join(text.split())


def format_context(context: str | None) -> str:
    """Return the part of a source that stands before the question, without a space at its end.

    Args:
        context: a passage to answer from; `None`, empty or blank means that there is none.

    Returns:
        `"context: {context}"`, or `""` when there is no context. `format_source(question, context)` always starts
        with it.

    Raises:
        TypeError: if `context` is neither `None` nor a string.
    """
    if context is not None and not isinstance(context, str):
        raise TypeError(f"context must be a string or None, not {type(context).__name__}; pass the passage's text.")
    passage = collapse_whitespace(context or "")
    return f"{CONTEXT_PREFIX} {passage}" if passage else ""


def format_source(question: str, context: str | None = None) -> str:
    """Return the source text of one question.

    Args:
        question: the question, in plain text.
        context: a passage to answer from; `None`, empty or blank means that there is none.

    Returns:
        `"context: {context} question: {question}"` with a context, else `"question: {question}"`. White space is
        collapsed in both parts.

    Raises:
        TypeError: if `question` is not a string, or `context` is neither `None` nor a string.
        ValueError: if `question` is empty or blank.
    """
    if not isinstance(question, str):
        raise TypeError(f"question must be a string, not {type(question).__name__}; pass the question's text.")
    asked = collapse_whitespace(question)
    if not asked:
        raise ValueError(
            f"the question is empty or blank (received {question!r}); pass a question with at least one visible "
            'character, for example "How often should I floss?".'
        )
    before = format_context(context)
    return f"{before} {QUESTION_PREFIX} {asked}" if before else f"{QUESTION_PREFIX} {asked}"
