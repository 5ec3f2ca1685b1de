# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What the pipeline accepts as a question, brought to the one text format, and to ids no longer than allowed."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from .source_format import CONTEXT_PREFIX, QUESTION_PREFIX, format_source


def source_text(inputs: str | dict) -> str:
    """
    Return the source text of one input.

    Args:
        inputs: a question; a text that already starts with `question:` or `context:`, which is taken as it is; or a
            dict `{"question": …, "context": …}`, whose context may be missing, `None` or blank.

    Raises:
        TypeError: for anything else.
        ValueError: for a blank or missing question, or a dict with other keys.
    """
    if isinstance(inputs, dict):
        unknown = sorted(set(inputs) - {"question", "context"}, key=str)
        if unknown or "question" not in inputs:
            raise ValueError(
                f'a question was given as a dict with the keys {sorted(inputs, key=str)}: give "question" and, where '
                'there is a passage to answer from, "context".'
            )
        return format_source(inputs["question"], inputs.get("context"))
    if not isinstance(inputs, str):
        raise TypeError(
            f'a question must be a string or {{"question": …, "context": …}}, not {type(inputs).__name__}.'
        )
    text = inputs.strip()
    if text.startswith((QUESTION_PREFIX, CONTEXT_PREFIX)):
        if QUESTION_PREFIX not in text:
            raise ValueError(
                f"{text[:80]!r} has a context but no {QUESTION_PREFIX!r}: end it with one, or give a dict."
            )
        format_source(text.rpartition(QUESTION_PREFIX)[2])  # refuses a blank question
        return text
    return format_source(inputs)


def source_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, truncation: bool = False
) -> list[int]:
    """
    Return the ids of a source text, the end-of-sequence token included.

    Args:
        text: as `source_text` returns it.
        tokenizer: the shared tokenizer.
        max_length: longest source in tokens; default the tokenizer's `model_max_length`.
        truncation: cut the context's end where the source is too long; the question is never cut.

    Raises:
        ValueError: where the source, or with `truncation` the question alone, is longer than `max_length`.
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return ids
    before, _, question = text.rpartition(QUESTION_PREFIX)
    asked = tokenizer(QUESTION_PREFIX + question, truncation=False, verbose=False)["input_ids"]
    if before and len(asked) <= limit:
        if truncation:
            passage = tokenizer(before.strip(), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            return passage[: limit - len(asked)] + asked
        remedy = "shorten the context, cut it with truncation=True"
    else:
        remedy = "shorten the question"
    raise ValueError(f"the source has {len(ids)} tokens, {limit} are allowed: {remedy}, or raise max_source_length.")
