# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A batch of source texts, in the two arrangements that the experts want."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Sources:
    """
    Source tokens of a batch, as given (for ET5) and left-padded (for EMamba, whose state padding must never reach).

    Attributes:
        input_ids, attention_mask: `(B, S)` long, as the caller arranged them.
        left_ids, left_mask: `(B, S)` long, the same tokens pushed to the right end of each row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    left_ids: torch.Tensor
    left_mask: torch.Tensor

    @classmethod
    def build(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> Sources:
        """
        Check and arrange a batch.

        Raises:
            ValueError: for an empty source, ids outside the vocabulary, or a mask of another shape.
        """
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids has shape {shape}: give source tokens of shape (batch, length), length >= 1.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}: "
                "pass both as the tokenizer returned them."
            )
        check_ids("input_ids", input_ids, vocab_size)
        mask = attention_mask.long()
        if bool((mask.sum(-1) == 0).any()):
            raise ValueError("A row of attention_mask is all zeros: give every row at least one source token.")
        order = torch.argsort(mask, dim=-1, stable=True)  # (B, S), pads first, tokens in their order
        return cls(input_ids, mask, input_ids.gather(-1, order), mask.gather(-1, order))

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each source, `(B,)` long."""
        return self.attention_mask.sum(-1)

    def padded(self) -> bool:
        """Whether any row holds padding."""
        return bool((self.left_mask[:, 0] == 0).any())


def check_ids(name: str, ids: torch.Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Raise `ValueError` where `ids`, the argument `name`, are not ids of the vocabulary; `ignored` is let through."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} are {ids.dtype}: give token ids, torch.long.")
    known = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
    low, high = (int(value) for value in known.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} hold the id {low if low < 0 else high}, outside the vocabulary of {vocab_size}: tokenize with "
            "the tokenizer saved beside this model."
        )


def check_targets(decoder_ids: torch.Tensor, labels: torch.Tensor | None, rows: int, vocab_size: int) -> None:
    """Raise `ValueError` for decoder ids `(B, T)` or labels that do not fit `rows` sources or the vocabulary."""
    if labels is not None:
        check_ids("labels", labels, vocab_size, ignored=-100)
        if labels.shape != decoder_ids.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} but decoder_input_ids {tuple(decoder_ids.shape)}: give both "
                "alike, or labels alone."
            )
    if decoder_ids.ndim != 2 or decoder_ids.shape[0] != rows or decoder_ids.shape[1] == 0:
        raise ValueError(
            f"decoder_input_ids have shape {tuple(decoder_ids.shape)}: give at least one token, the start, for each "
            f"of the {rows} sources."
        )
    check_ids("decoder_input_ids", decoder_ids, vocab_size)
