# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A tiny tokenizer and a tiny question-answer set for the tests of the trainer."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_experts import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers

from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer

WORDS = ["pulp", "tooth", "gum", "root", "crown", "decay", "pain", "clean", "soft", "hard", "what", "is", "the", "a"]


def tiny_tokenizer() -> MambaFormerTokenizer:
    """Word-level, with fewer ids than the tiny experts have rows."""
    words = ["<pad>", "</s>", "<unk>", "question", "context", ":", "?", ".", *WORDS]
    words += [f"word{i}" for i in range(VOCAB - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return MambaFormerTokenizer(tokenizer_object=backend, model_max_length=64)


def tiny_rows(count: int = 32) -> list[dict[str, str]]:
    """Questions with answers of two to seven words, every third with a context."""
    rows = []
    for i in range(count):
        noun, other = WORDS[i % 7], WORDS[(3 * i + 1) % 10]
        rows.append(
            {
                "question": f"what is {noun} word{i % 20}?",
                "context": f"the {other} is {noun}." if i % 3 == 0 else "",
                "answer": " ".join(["the", noun, "is", other, "word5", "word7"][: 2 + i % 5]) + ".",
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
