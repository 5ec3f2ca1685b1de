# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The texts that a run trains, distils and calibrates on, as its arguments name them."""

from __future__ import annotations

from datasets import Dataset

from .data import is_one_split, load_qa, numbered
from .run_arguments import RunArguments


def load_texts(run: RunArguments, seed: int, keep: tuple[str, ...] = ()) -> dict[str, Dataset]:
    """
    Rows under `train`, `distil` and `validation`, with their number in `row`.

    Of a file that holds a single split, a tenth is held out for validation, `max_validation_samples` at most.

    Args:
        keep: other columns to keep.

    Raises:
        ValueError, OSError: as `load_qa`; and `ValueError` where nothing is left to distil on.
    """

    def read(name: str, split: str) -> Dataset:
        columns = (run.question_column, run.context_column, run.answer_column, run.dataset_config)
        return numbered(load_qa(name, split, *columns, None, seed, run.decision_column, keep))

    if run.validation_dataset is None and is_one_split(run.dataset):
        every = read(run.dataset, run.train_split).shuffle(seed=seed)
        cut = max(1, min(len(every) // 10, run.max_validation_samples or len(every)))
        held_out, train_text = every.select(range(cut)), every.select(range(cut, len(every)))
    else:
        train_text = read(run.dataset, run.train_split)
        held_out = read(run.validation_dataset or run.dataset, run.validation_split).shuffle(seed=seed)
    if run.max_train_samples is not None and run.max_train_samples < len(train_text):
        train_text = train_text.shuffle(seed=seed).select(range(run.max_train_samples))
    count = min(len(held_out), run.max_validation_samples or len(held_out))
    texts = {"train": train_text, "validation": held_out.select(range(count)), "distil": train_text}
    if run.distil_dataset is not None:
        texts["distil"] = read(run.distil_dataset, run.distil_split or run.train_split)
    elif run.distil_split == run.validation_split:
        texts["distil"] = held_out.select(range(count, len(held_out)))
    elif run.distil_split is not None:
        texts["distil"] = read(run.dataset, run.distil_split)
    if len(texts["distil"]) == 0:
        raise ValueError(
            f"max_validation_samples is {run.max_validation_samples}, which leaves none of the {count} rows of "
            f"{run.validation_split!r} to distil on: lower it, or give another distil_split."
        )
    if run.max_distil_samples is not None and run.max_distil_samples < len(texts["distil"]):
        texts["distil"] = texts["distil"].shuffle(seed=seed).select(range(run.max_distil_samples))
    return texts
