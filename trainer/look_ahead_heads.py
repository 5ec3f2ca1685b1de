# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Train heads that propose tokens for look-ahead decoding, on a trained model, of which nothing else is changed.

    python -m mambaformer.trainer.look_ahead_heads my-model --dataset runs/router_questions/distil.jsonl

The data set has questions, contexts and answers. EMamba reads all once; the heads learn what it would say one, two or
more tokens after the next. A tenth of the rows is held out to tell how often they are right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..modeling_mambaformer.look_ahead_heads import LookAheadHeads, add_heads
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from ..tokenizer.source_format import format_source
from .data import load_qa
from .training_run import note_dtype

HELD_OUT = 10  # every so many rows, one


@torch.no_grad()
def read_answers(
    emamba: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], start: int, batch: int
) -> tuple[Tensor, Tensor]:
    """
    What EMamba knows and would say along some answers.

    Returns:
        final hidden states `(N, D)` from the start token on, and EMamba's likeliest next tokens `(N,)`; after
        each answer a row with token -1, past which no head looks.
    """
    hidden, said = [], []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        sources = [tokenizer(format_source(row["question"], row.get("context") or None))["input_ids"] for row in some]
        answers = [tokenizer(row["answer"])["input_ids"] for row in some]
        texts = [torch.tensor([*source, start, *answer]) for source, answer in zip(sources, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # what follows an answer does not reach back
        states = emamba.base_model(ids).last_hidden_state  # (B, T, D)
        for states_of_row, source, answer in zip(states, sources, answers, strict=True):
            along = states_of_row[len(source) : len(source) + len(answer)]  # from the start token on
            tops = emamba.get_output_embeddings()(along).argmax(-1)
            hidden += [along, along[:1]]
            said += [tops, tops.new_full((1,), -1)]
    return torch.cat(hidden).float(), torch.cat(said)


def later(said: Tensor, heads: int) -> Tensor:
    """What is said i + 1 tokens after the next one, `(N, heads)`; -1 where the answer has ended."""
    columns, ended = [], said < 0
    for ahead in range(1, heads + 1):
        moved = torch.cat([said[ahead:], said.new_full((ahead,), -1)])
        ended = ended | (moved < 0)
        columns.append(moved.masked_fill(ended, -1))
    return torch.stack(columns, 1)


def fit(heads: LookAheadHeads, hidden: Tensor, labels: Tensor, epochs: int, batch: int, rate: float) -> None:
    """Train `heads` in place; `labels` `(N, H)` are rows of the candidates, -1 for what none of them is."""
    steps = epochs * -(-len(hidden) // batch)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for some in torch.randperm(len(hidden), generator=generator).split(batch):
            loss = F.cross_entropy(heads(hidden[some]).flatten(0, 1), labels[some].flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def share_right(heads: LookAheadHeads, hidden: Tensor, labels: Tensor) -> list[float]:
    """How often each head is right where something follows, `labels` `(N, H)` being token ids."""
    proposed = torch.cat([heads.tokens[heads(part).argmax(-1)] for part in hidden.split(4096)])  # (N, H)
    known = labels >= 0
    return ((proposed == labels) & known).sum(0).div(known.sum(0).clamp(min=1)).tolist()


def train_heads(
    model: MambaFormerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    heads: int = 3,
    candidates: int = 512,
    epochs: int = 4,
    batch: int = 1024,
    rate: float = 2e-3,
) -> list[float]:
    """
    Give `model` heads trained on `rows`; returns how often each is right on held-out rows.

    Raises:
        ValueError: for too few rows to hold any out.
    """
    if len(rows) < HELD_OUT:
        raise ValueError(f"{len(rows)} rows are too few to train heads on: give at least {HELD_OUT}.")
    kept = [row for at, row in enumerate(rows) if at % HELD_OUT]
    held_out = rows[::HELD_OUT]
    start = model.config.decoder_start_token_id
    parts = [read_answers(model.emamba, tokenizer, some, start, 16) for some in (kept, held_out)]
    (hidden, said), (hidden_out, said_out) = parts
    labels, labels_out = later(said, heads), later(said_out, heads)
    counts = said[said >= 0].bincount(minlength=model.config.vocab_size)
    trained = add_heads(model, heads, counts, candidates).float()
    row_of = torch.full((model.config.vocab_size + 1,), -1)
    row_of[trained.tokens] = torch.arange(len(trained.tokens))
    some = (labels >= 0).any(1)
    fit(trained, hidden[some], row_of[labels[some]], epochs, batch, rate)
    return share_right(trained, hidden_out, labels_out)


def main() -> None:
    """Parse arguments, train, save in place."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("model", type=Path, help="folder of a trained model, which receives the heads")
    parser.add_argument("--dataset", required=True, help="of questions, contexts and answers, as `load_qa` reads it")
    parser.add_argument("--rows", type=int, default=8000, help="of it, at most")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=512, help="tokens that the heads may propose")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--save_dtype", choices=("float32", "bfloat16"), help="of the saved weights; default as loaded"
    )
    arguments = parser.parse_args()
    rows = list(load_qa(arguments.dataset, limit=arguments.rows))
    model = MambaFormerForConditionalGeneration.from_pretrained(arguments.model).eval()
    dtype = next(model.parameters()).dtype
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    right = train_heads(model, tokenizer, rows, arguments.heads, arguments.candidates, arguments.epochs)
    model.look_ahead_heads.to(dtype)
    if arguments.save_dtype is not None:
        model.to(getattr(torch, arguments.save_dtype))
    model.save_pretrained(arguments.model)
    note_dtype(arguments.model / "config.json", str(dtype).removeprefix("torch."))
    print("right on held-out rows, by how far ahead: " + ", ".join(f"{share:.1%}" for share in right))


if __name__ == "__main__":
    main()
