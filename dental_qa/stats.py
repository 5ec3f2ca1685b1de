# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The figures of the data set, as Markdown tables; the card is the only place that shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from .contexts import word_count
from .schema import ASPECTS, DIFFICULTIES, LENGTH_CLASSES, SPLITS, STYLES, Concept, Row


def table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers get thousands separators."""
    head = list(header)
    shown = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line] for line in lines]
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *shown]],
    )


def statistics(concepts: list[Concept], rows: list[Row]) -> str:
    """Markdown with the counts of sources and rows."""
    facts = sum(len(concept.all_facts) for concept in concepts)
    fields = Counter(concept.field for concept in concepts)
    by_split = {split: [row for row in rows if row.split == split] for split in SPLITS}
    parts = [
        f"{len(concepts):,} concepts in {len(fields):,} fields with {facts:,} facts; {len(rows):,} rows.",
        table(
            ["split", "rows", "concepts", "answers", "words in an answer", "words in a context", "longest context"],
            [[split, *_split_line(own)] for split, own in by_split.items()],
        ),
        _counts("style", STYLES, by_split, lambda row: [row.style]),
        _counts("length class", LENGTH_CLASSES, by_split, lambda row: [row.length_class]),
        _counts("difficulty", DIFFICULTIES, by_split, lambda row: [row.difficulty]),
        _counts("aspect", ASPECTS, by_split, lambda row: row.aspect.split("+")),
        table(
            ["field", "concepts", "rows", "concepts in test_concept"],
            [
                [
                    field,
                    count,
                    sum(row.field == field for row in rows),
                    len({row.concept for row in by_split["test_concept"] if row.field == field}),
                ]
                for field, count in sorted(fields.items())
            ],
        ),
    ]
    return "\n\n".join(parts)


def _split_line(rows: list[Row]) -> list[object]:
    """Rows, concepts, distinct answers, median words of the answer, and median and most words of the contexts."""
    answers = sorted(word_count(row.answer) for row in rows)
    lengths = sorted(word_count(row.context) for row in rows if row.context)
    median = [values[len(values) // 2] if values else "–" for values in (answers, lengths)]
    return [
        len(rows),
        len({row.concept for row in rows}),
        len({row.answer for row in rows}),
        f"median {median[0]}",
        f"median {median[1]}" if lengths else "none",
        lengths[-1] if lengths else "none",
    ]


def _counts(title: str, values: Iterable[str], by_split: dict[str, list[Row]], of: Callable[[Row], list[str]]) -> str:
    counters = {split: Counter(value for row in rows for value in of(row)) for split, rows in by_split.items()}
    return table([title, *SPLITS], [[value, *(counters[split][value] for split in SPLITS)] for value in values])
