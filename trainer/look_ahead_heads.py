# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Train heads that propose tokens for look-ahead decoding, on a trained model, of which nothing else is changed.

    python -m mambaformer.trainer.look_ahead_heads my-model --dataset dental_qa

The data set has questions, contexts and answers. EMamba reads all once; the heads learn what it would say after a
token that follows, and after that one. A tenth of the rows is held out to tell how often they are right.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
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


def source_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> list[int]:
    """A row's question and context as the model reads them."""
    return tokenizer(format_source(row["question"], row.get("context") or None))["input_ids"]


@torch.no_grad()
def read_answers(
    emamba: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], start: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    What EMamba knows and would say along some answers.

    Returns:
        final hidden states `(N, D)` from the start token on, the tokens `(N,)` that follow in the answers, and
        EMamba's likeliest ones `(N,)`; after each answer a row with tokens -1, past which no head looks.
    """
    hidden, read, said = [], [], []
    sources = [source_ids(tokenizer, row) for row in rows]
    answers = [tokenizer(row["answer"])["input_ids"] for row in rows]
    order = sorted(range(len(rows)), key=lambda at: len(sources[at]) + len(answers[at]))  # so that little is padded
    for first in range(0, len(rows), batch):
        some = [(sources[at], answers[at]) for at in order[first : first + batch]]
        texts = [torch.tensor([*source, start, *answer]) for source, answer in some]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # what follows an answer does not reach back
        states = emamba.base_model(ids).last_hidden_state  # (B, T, D)
        for states_of_row, (source, answer) in zip(states, some, strict=True):
            along = states_of_row[len(source) : len(source) + len(answer)]  # from the start token on
            tops = emamba.get_output_embeddings()(along).argmax(-1)
            hidden += [along, along[:1]]
            read += [tops.new_tensor(answer), tops.new_full((1,), -1)]
            said += [tops, tops.new_full((1,), -1)]
    return torch.cat(hidden).float(), torch.cat(read), torch.cat(said)


def later(tokens: Tensor, heads: int) -> Tensor:
    """The tokens 1, 2, ... `heads` places on, `(N, heads)`; -1 where the answer has ended."""
    columns, ended = [], tokens < 0
    for ahead in range(1, heads + 1):
        moved = torch.cat([tokens[ahead:], tokens.new_full((ahead,), -1)])
        ended = ended | (moved < 0)
        columns.append(moved.masked_fill(ended, -1))
    return torch.stack(columns, 1)


@dataclass
class Lessons:
    """
    What heads learn from, with N places in answers.

    Attributes:
        hidden: `(N, D)`, EMamba's. read: `(N, H)` long, the tokens that follow.
        labels: `(N, H)` long, what EMamba says after each of these, -1 past the end of the answer.
    """

    hidden: Tensor
    read: Tensor
    labels: Tensor

    @classmethod
    def build(cls, found: tuple[Tensor, Tensor, Tensor], heads: int) -> Lessons:
        """Of what `read_answers` returns, where anything follows."""
        hidden, read, said = found
        follows = torch.stack([read, *later(read, heads - 1).unbind(1)], 1) if heads > 1 else read[:, None]
        labels = later(said, heads)
        some = (labels >= 0).any(1)
        return cls(hidden[some], follows[some].clamp(min=0), labels[some])


def fit(heads: LookAheadHeads, embeddings: nn.Module, lessons: Lessons, epochs: int, batch: int, rate: float) -> None:
    """Train `heads` in place, with a model's `embeddings`, which stay as they are."""
    row_of = torch.full((int(heads.tokens.max()) + 2,), -1)
    row_of[heads.tokens] = torch.arange(len(heads.tokens))
    labels = row_of[lessons.labels.clamp(max=len(row_of) - 1)]  # (N, H), rows; -1 where nothing or no candidate is
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for some in torch.randperm(len(labels), generator=generator).split(batch):
            logits = heads(lessons.hidden[some], embeddings(lessons.read[some]).detach())  # (N, H, R)
            loss = F.cross_entropy(logits.flatten(0, 1), labels[some].flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def share_right(heads: LookAheadHeads, embeddings: nn.Module, lessons: Lessons) -> list[float]:
    """How often each step is right where something follows, the tokens before it being those of the answer."""
    parts = zip(lessons.hidden.split(1024), lessons.read.split(1024), strict=True)
    proposed = torch.cat([heads.tokens[heads(hidden, embeddings(read)).argmax(-1)] for hidden, read in parts])
    known = lessons.labels >= 0
    return ((proposed == lessons.labels) & known).sum(0).div(known.sum(0).clamp(min=1)).tolist()


def train_heads(
    model: MambaFormerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    heads: int = 3,
    candidates: int = 2048,
    longest: int = 256,
    epochs: int = 5,
    batch: int = 1024,
    rate: float = 6e-3,
) -> list[float]:
    """
    Give `model` heads trained on `rows`; returns how often each step is right on held-out rows.

    Args:
        longest: in tokens; rows with longer sources are left out, for what is copied from these is looked up there.

    Raises:
        ValueError: for too few rows to hold any out.
    """
    rows = [row for row in rows if len(source_ids(tokenizer, row)) <= longest]
    if len(rows) < HELD_OUT:
        raise ValueError(
            f"{len(rows)} rows with sources of at most {longest} tokens are too few to train heads on: "
            f"give at least {HELD_OUT}."
        )
    kept = [row for at, row in enumerate(rows) if at % HELD_OUT]
    start, embeddings = model.config.decoder_start_token_id, model.emamba.get_input_embeddings()
    found = [read_answers(model.emamba, tokenizer, some, start, 16) for some in (kept, rows[::HELD_OUT])]
    learned, held_out = (Lessons.build(parts, heads) for parts in found)
    counts = learned.labels[learned.labels >= 0].bincount(minlength=model.config.vocab_size)
    trained = add_heads(model, heads, counts, candidates).float()
    fit(trained, embeddings, learned, epochs, batch, rate)
    return share_right(trained, embeddings, held_out)


def main() -> None:
    """Parse arguments, train, save in place."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("model", type=Path, help="folder of a trained model, which receives the heads")
    parser.add_argument("--dataset", required=True, help="of questions, contexts and answers, as `load_qa` reads it")
    parser.add_argument("--rows", type=int, default=16000, help="of it, at most")
    parser.add_argument("--heads", type=int, default=3, help="tokens to propose at a time, at most")
    parser.add_argument("--candidates", type=int, default=2048, help="tokens that the heads may propose")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a source; longer ones are left out")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--save_dtype", choices=("float32", "bfloat16"), help="of the saved weights; default as loaded"
    )
    arguments = parser.parse_args()
    rows = list(load_qa(arguments.dataset, limit=arguments.rows))
    model = MambaFormerForConditionalGeneration.from_pretrained(arguments.model).eval()
    dtype = next(model.parameters()).dtype
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    right = train_heads(
        model, tokenizer, rows, arguments.heads, arguments.candidates, arguments.longest, arguments.epochs
    )
    model.look_ahead_heads.to(dtype)
    if arguments.save_dtype is not None:
        model.to(getattr(torch, arguments.save_dtype))
    model.save_pretrained(arguments.model)
    note_dtype(arguments.model / "config.json", str(dtype).removeprefix("torch."))
    print("right on held-out rows, by how far ahead: " + ", ".join(f"{share:.1%}" for share in right))


if __name__ == "__main__":
    main()
