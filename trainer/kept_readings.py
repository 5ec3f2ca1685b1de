# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
EMamba's reading of each source and answer, made once and kept in memory.

Experts stand still while a router is trained on them, so that a row reads the same in every epoch, and for every
router of a comparison. `KeptReadings.route` takes the place of `router_pass.run_router`: only the router is run again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..modeling_mambaformer.router import RouterState
from ..modeling_mambaformer.router_features import RouterInputs
from .router_pass import Reading, RouterPass, inputs_of, judge, read_answers

ALONG = ("entropy", "top_probability", "embedding_distance", "token_domain", "answer_domain")
"""Fields of `RouterInputs` with a value a position."""
STATE = tuple(field.name for field in fields(RouterState) if field.name != "position")


@dataclass
class KeptRow:
    """
    One row of T positions: final hidden states `(T, D)`, the fields `ALONG` as `(T, 5)`, the hidden state at the
    source's end `(D,)`, its length and domain `(2,)`, and the router's state before the first position.
    """

    hidden: torch.Tensor
    along: torch.Tensor
    at_source_end: torch.Tensor
    scalars: torch.Tensor
    state: dict[str, torch.Tensor]


class KeptReadings:
    """
    Readings by content: a row is known again by its source's and its answer's tokens, whatever batch it comes in.

    They hold for one EMamba, one set of domain weights and one pair of length maxima: make another where these change.
    It takes 4 bytes times the hidden size for each position: 180 MB for 4,000 answers of 45 tokens at a width of 256.

    Attributes:
        rows: what is kept. read: how many rows EMamba has read.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, KeptRow] = {}
        self.read = 0

    def route(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        threshold: float,
        ended: torch.Tensor | None = None,
    ) -> RouterPass:
        """
        As `router_pass.run_router`, by `model.router` and `model.gate` as they are now.

        Args:
            ended: `(B, T)` bool, positions after each answer's last; what the result says there means nothing.
        """
        longest = decoder_input_ids.shape[1]
        lengths = [longest] * len(input_ids) if ended is None else (~ended).sum(1).tolist()
        keys = [
            row_key(ids[mask.bool()], answer[:length])
            for ids, mask, answer, length in zip(input_ids, attention_mask, decoder_input_ids, lengths, strict=True)
        ]
        missing = [at for at, key in enumerate(keys) if key not in self.rows]
        if missing:
            some = input_ids[missing], attention_mask[missing], decoder_input_ids[missing]
            found = read_rows(model, *some, [lengths[at] for at in missing])
            self.rows.update(zip((keys[at] for at in missing), found, strict=True))
            self.read += len(missing)
        reading, inputs = gathered(model, [self.rows[key] for key in keys], longest)
        return judge(model, reading, decoder_input_ids, threshold, ended, inputs)


def row_key(source: torch.Tensor, answer: torch.Tensor) -> bytes:
    """Tokens of a source `(S,)` and of an answer `(T,)`, with the place of the border between them."""
    ids = torch.cat([torch.tensor([len(source)]), source.cpu(), answer.cpu()])
    return ids.to(torch.int32).numpy().tobytes()


@torch.no_grad()
def read_rows(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    decoder_input_ids: torch.Tensor,
    lengths: list[int],
) -> list[KeptRow]:
    """Let EMamba read B rows, of which `lengths` positions are kept each."""
    reading = read_answers(model, input_ids, attention_mask, decoder_input_ids)
    inputs = inputs_of(model, reading, decoder_input_ids)
    along = torch.stack([getattr(inputs, name) for name in ALONG], dim=-1)  # (B, T, 5)
    scalars = torch.stack(reading.scalars, dim=-1)  # (B, 2)
    return [
        KeptRow(
            reading.hidden[at, :length].clone(),
            along[at, :length].clone(),
            reading.at_source_end[at].clone(),
            scalars[at],
            {name: getattr(reading.state, name)[at] for name in STATE},
        )
        for at, length in enumerate(lengths)
    ]


def gathered(model: nn.Module, rows: list[KeptRow], longest: int) -> tuple[Reading, RouterInputs]:
    """B kept rows as one batch of `longest` positions, padded with zeros, and what `model.router` sees of them."""
    hidden = padded([row.hidden for row in rows], longest)  # (B, T, D)
    along = padded([row.along for row in rows], longest)  # (B, T, 5)
    scalars = torch.stack([row.scalars for row in rows])  # (B, 2)
    state = RouterState(**{name: torch.stack([row.state[name] for row in rows]) for name in STATE})
    dtype = model.router.hidden_proj.weight.dtype
    inputs = RouterInputs(
        projected=model.router.hidden_proj(hidden.to(dtype)),
        source_length=scalars[:, 0].to(dtype),
        position=(torch.arange(longest, device=hidden.device) / model.config.max_target_length).to(dtype),
        source_domain=scalars[:, 1].to(dtype),
        **dict(zip(ALONG, along.unbind(-1), strict=True)),
    )
    at_source_end = torch.stack([row.at_source_end for row in rows])  # (B, D)
    no_logits = hidden.new_empty(*hidden.shape[:2], 0)  # entropy and largest probability are in the inputs
    return Reading(hidden, no_logits, at_source_end, state, (scalars[:, 0], scalars[:, 1])), inputs


def padded(rows: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Rows `(T_i, ...)` as `(B, longest, ...)`."""
    batch = pad_sequence(rows, batch_first=True)
    missing = longest - batch.shape[1]
    return nn.functional.pad(batch, (0, 0, 0, missing)) if missing else batch
