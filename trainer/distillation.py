# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Both experts run once over a data set, and what they thought of each gold token becomes columns of it.

The router is then distilled on these columns: from here on ET5 is not needed. Two floats and two ids a token, kept on
disk where a folder is named (see `utility_cache`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from .data import Collator
from .utility import CallCosts, price_for_share
from .utility_cache import UTILITY_COLUMNS, Columns, UtilityCache, fingerprint

logger = logging.getLogger(__name__)


def ask_both(model: nn.Module, batch: dict[str, torch.Tensor]) -> ModelOutput:
    """Both experts at every position of the gold answers `batch["labels"]` `(B, T)`; the router is not run."""
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        routing="emamba",
        output_experts=True,
        use_cache=False,
    )


@torch.no_grad()
def score_experts(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Both experts on gold answers `batch["labels"]` `(B, T)`.

    Returns:
        `(B, T)` tensors under the names of `UTILITY_COLUMNS`: log-probabilities in nats of the gold tokens, 0 on
        padding, and first choices.
    """
    output = ask_both(model, batch)
    scores = {}
    for expert, logits in (("et5", output.et5_logits), ("emamba", output.emamba_logits)):
        scores[f"log_p_{expert}"] = gold_log_probability(logits, batch["labels"])
        scores[f"top_{expert}"] = logits.argmax(-1)
    return scores


def gold_log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats `(B, T)` of `labels` `(B, T)` under `logits` `(B, T, V)`; 0 where a label is -100."""
    gold = labels.clamp(min=0)
    flat = nn.functional.cross_entropy(logits.flatten(0, 1).float(), gold.flatten(), reduction="none")
    return -flat.view_as(gold).masked_fill(labels == -100, 0.0)


def add_utilities(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Dataset:
    """
    `dataset` with `UTILITY_COLUMNS`, one list a row, as long as its labels; rows that have them are not run again.

    Batches are made of rows of about equal length; the model is put in evaluation mode and left as it was. Called by
    several processes with the same `cache_dir`, they share the work.

    Args:
        cache_dir: folder of caches on disk; what is there for these experts, this tokenizer and these rows is read
            and not computed, the rest is added file by file. `None`: in memory.
        progress: show a progress bar.
    """
    if set(UTILITY_COLUMNS) <= set(dataset.column_names):
        return dataset
    if dataset._indices is not None:  # selected or shuffled; joined later, its rows would be written beside the cache
        dataset = dataset.flatten_indices()
    was_training = model.training
    model.eval()
    with tqdm(total=len(dataset), desc="Both experts", unit="row", disable=not progress) as bar:

        def compute(rows: Dataset) -> Columns:
            return utilities_of(model, rows, collator, batch_size, bar)

        if cache_dir is None:
            columns = Dataset.from_dict(compute(dataset))
        else:
            columns = cached_utilities(model, dataset, collator, cache_dir, compute)
    model.train(was_training)
    return concatenate_datasets([dataset, columns], axis=1)


def cached_utilities(model, dataset: Dataset, collator, cache_dir: str | Path, compute) -> Dataset:
    """The utilities' columns from disk, after `compute(rows)` of those that are not there yet."""
    cache = UtilityCache(cache_dir, dataset, fingerprint(model, dataset, getattr(collator, "tokenizer", None)))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = 0
    if distributed:
        count += cache.fill(compute, torch.distributed.get_rank(), torch.distributed.get_world_size())
        torch.distributed.barrier()
    count += cache.fill(compute)  # all; of several processes, what others wrote to a disk that is not seen here
    logger.info("utilities in %s: %d of %d shards computed", cache.folder, count, len(cache.spans))
    return cache.columns()


def utilities_of(
    model: nn.Module, dataset: Dataset, collator: Collator, batch_size: int, bar: tqdm | None = None
) -> Columns:
    """Lists for `UTILITY_COLUMNS` in the order of the rows; `model` is in evaluation mode."""
    device = next(model.parameters()).device
    lengths = [len(ids) + len(labels) for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True)]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    columns: Columns = {name: [None] * len(dataset) for name in UTILITY_COLUMNS}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collator([dataset[row] for row in rows])
        scores = score_experts(model, {name: tensor.to(device) for name, tensor in batch.items()})
        sizes = (batch["labels"] != -100).sum(-1).tolist()
        for name, values in scores.items():
            for row, size, value in zip(rows, sizes, values.tolist(), strict=True):
                columns[name][row] = value[:size]
        if bar is not None:
            bar.update(len(rows))
    return columns


def padded(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of different lengths as a `(n, longest)` float tensor, and its mask of 1 where there was a value."""
    tensors = [torch.tensor(row, dtype=torch.float) for row in rows]
    values = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return values, mask


def benefits(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta in nats `(n, longest)` of a data set with utilities, and its mask."""
    et5, mask = padded(dataset["log_p_et5"])
    emamba, _ = padded(dataset["log_p_emamba"])
    return et5 - emamba, mask


def price_of(
    dataset: Dataset, share: float, cost_table: dict[str, float] | None, clip: float
) -> tuple[float, CallCosts]:
    """The price at which an oracle on `dataset`'s utilities asks ET5 for `share` of the tokens, and the call costs."""
    delta, mask = benefits(dataset)
    costs = CallCosts.from_table(cost_table, share, float(mask.sum() / len(mask)))
    price = price_for_share(delta.clamp(-clip, clip), mask, share, costs)
    logger.info("price %.4f nats a call for a share of %.4f", price, share)
    return price, costs
