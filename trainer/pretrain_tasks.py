# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Synthetic tasks that teach an expert to use its source, and the text functions they stand on.

A small model trained on closed-book questions alone learns facts and never learns to look at a context. Four tasks,
all generated from the same text as the questions, make recall worth learning:

* `copy_words`: write a list of words again. The words are shuffled, so no language model can guess the next one.
* `repeat_span`: given a passage and the words at which to begin, write the words that follow there.
* `lookup_value`: given pairs "key is value", write the value of one key. Keys and values are drawn at random.
* `find_sentence`: given a passage, write the one sentence that names a given word.

Every answer is literally present in its source, which a test checks. The functions take a `random.Random` and keep no
state; text goes in and text comes out, so nothing here knows a tokenizer.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..tokenizer.source_format import format_source

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
_WORD = re.compile(r"[A-Za-z][A-Za-z-]{3,}")
_FUNCTION_WORDS = """
about after also been before being between both cause caused causes could does each every from have into itself like
many mean means might more most much need needs often only other over people same should some such than that their them
then there these they this those through under used uses using usually very were what when where which while with
within without would your patient patients teeth tooth dental
"""
_COMMON = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Example:
    """One training pair: `source` and `target` text, and the mixture `group` that it belongs to."""

    source: str
    target: str
    group: str


def split_sentences(text: str) -> list[str]:
    """Split prose at sentence ends that are followed by a capital letter; white space is collapsed."""
    text = " ".join(text.split())
    return [part for part in _SENTENCE_END.split(text) if part]


def content_words(text: str) -> list[str]:
    """Words of at least four letters that are not function words, in order, with their case kept."""
    return [word for word in _WORD.findall(text) if word.lower() not in _COMMON]


def copy_words(words: Sequence[str], rng: random.Random, longest: int = 12) -> Example:
    """Ask for a random list of 2 to `longest` words back, word by word."""
    chosen = [rng.choice(words) for _ in range(rng.randint(2, longest))]
    listed = " ".join(chosen)
    return Example(format_source("Repeat the words.", listed), listed, "recall")


def repeat_span(sentences: Sequence[str], rng: random.Random, shuffle: float = 0.5, span: int = 8) -> Example | None:
    """Ask for the `span` words that follow a two-word anchor in a passage of 1 to 3 sentences.

    With probability `shuffle` the passage's words are put in random order, so that only copying can answer. None if
    no two words occur together exactly once.
    """
    passage = " ".join(rng.sample(list(sentences), min(len(sentences), rng.randint(1, 3))))
    words = passage.split()
    if rng.random() < shuffle:
        rng.shuffle(words)
    words = words[: rng.randint(8, 40)]
    pairs = list(zip(words, words[1:], strict=False))
    counts = Counter(pairs)
    starts = [position for position, pair in enumerate(pairs[:-1]) if counts[pair] == 1]
    if not starts:
        return None
    start = rng.choice(starts)
    answer = words[start + 2 : start + 2 + span]
    question = f"What follows {' '.join(words[start : start + 2])}?"
    return Example(format_source(question, " ".join(words)), " ".join(answer), "recall")


def lookup_value(words: Sequence[str], rng: random.Random, most: int = 6) -> Example:
    """Ask for the value of one key among 2 to `most` random pairs; keys are distinct, values are 1 or 2 words."""
    distinct = list(dict.fromkeys(word.lower() for word in rng.sample(list(words), min(len(words), 4 * most))))
    keys = distinct[: rng.randint(2, most)]
    values = [" ".join(rng.choice(words).lower() for _ in range(rng.randint(1, 2))) for _ in keys]
    context = " ".join(f"{key} is {value}." for key, value in zip(keys, values, strict=True))
    asked = rng.randrange(len(keys))
    return Example(format_source(f"What is {keys[asked]}?", context), values[asked], "recall")


def find_sentence(sentences: Sequence[str], rng: random.Random, most: int = 4) -> Example | None:
    """Ask for the sentence that names a word which no other sentence of the passage names; None if there is none."""
    passage = list(dict.fromkeys(rng.sample(list(sentences), min(len(sentences), rng.randint(2, most)))))
    index = rng.randrange(len(passage))
    others = {w.lower() for i, s in enumerate(passage) if i != index for w in _WORD.findall(s)}
    names = [w for w in content_words(passage[index]) if w.lower() not in others]
    if not names:
        return None
    question = rng.choice(
        ("Which sentence names {}?", "Find the sentence about {}.", "What does the text say about {}?")
    ).format(rng.choice(names).lower())
    return Example(format_source(question, " ".join(passage)), passage[index], "recall")


TASKS: dict[str, Callable[..., Example | None]] = {
    "copy": copy_words,
    "repeat": repeat_span,
    "lookup": lookup_value,
    "find": find_sentence,
}
RECALL_SHARES = {"copy": 0.1, "repeat": 0.15, "lookup": 0.3, "find": 0.45}
"""How often each task is set; what takes longest to learn comes most often."""
_TAKES_WORDS = frozenset({"copy", "lookup"})


def recall_examples(
    sentences: Sequence[str], count: int, seed: int, shares: dict[str, float] | None = None
) -> list[tuple[str, Example]]:
    """Generate `count` recall pairs from `sentences`, as (task name, example); the same seed gives the same pairs.

    Args:
        sentences: short sentences (about 40 words at most) from the training text.
        count: how many pairs.
        seed: of the generator.
        shares: task name to weight; equal parts when None.

    Raises:
        ValueError: fewer than eight sentences, or a share names an unknown task.
    """
    if len(sentences) < 8:
        raise ValueError(f"recall tasks need at least 8 sentences to draw from, got {len(sentences)}: give more text")
    shares = shares or dict.fromkeys(TASKS, 1.0)
    unknown = sorted(set(shares) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown recall tasks {unknown}: choose among {sorted(TASKS)}")
    rng = random.Random(seed)
    words = sorted({word for sentence in sentences for word in content_words(sentence)})
    names = list(shares)
    made: list[tuple[str, Example]] = []
    while len(made) < count:
        name = rng.choices(names, [shares[n] for n in names])[0]
        example = TASKS[name](words if name in _TAKES_WORDS else sentences, rng)
        if example is not None:
            made.append((name, example))
    return made
