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
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids hold the id {low if low < 0 else high}, outside the vocabulary of {vocab_size}: "
                "tokenize with the tokenizer saved beside this model."
            )
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
