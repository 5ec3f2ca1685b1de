# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What a MambaFormer returns: the merged logits, and the trace that says which expert wrote each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

EMAMBA, ET5, ENDED = 0, 1, -1
"""Values of `RouteTrace.expert`."""


@dataclass
class RouteTrace(ModelOutput):
    """
    Which expert wrote each token, and what ET5 really cost.

    Args:
        expert (`torch.LongTensor` of shape `(batch, new_tokens)`): 0 EMamba, 1 ET5, -1 after the end of the answer.
        margin (`torch.FloatTensor` of shape `(batch, new_tokens)`): the router's `z_ET5 - z_EMamba`, NaN where the
            router was not asked (forced routing, or after the end).
        gap (`torch.LongTensor` of shape `(batch, new_tokens)`): decoder positions since ET5 last spoke, that is what a
            call has to catch up; 1 where it spoke just before.
        log_p_emamba, log_p_et5 (`torch.FloatTensor` of shape `(batch, new_tokens)`): each expert's log-probability, in
            nats, of the likeliest token of the merged distribution; NaN where that expert was not run.
        et5_passes (`torch.LongTensor` of shape `(batch,)`): ET5 decoder calls in which the row took part.
        et5_tokens (`torch.LongTensor` of shape `(batch,)`): decoder positions computed for it in those calls.
        encoder_calls (`torch.LongTensor` of shape `(batch,)`): ET5 encoder runs for its source.
    """

    expert: torch.LongTensor | None = None
    margin: torch.FloatTensor | None = None
    gap: torch.LongTensor | None = None
    log_p_emamba: torch.FloatTensor | None = None
    log_p_et5: torch.FloatTensor | None = None
    et5_passes: torch.LongTensor | None = None
    et5_tokens: torch.LongTensor | None = None
    encoder_calls: torch.LongTensor | None = None

    def et5_share(self) -> torch.Tensor:
        """Share of each answer's tokens that ET5 wrote, `(batch,)`, 0 for an empty answer."""
        spoken = (self.expert != ENDED).sum(-1).clamp(min=1)
        return (self.expert == ET5).sum(-1) / spoken


@dataclass
class MambaFormerOutput(ModelOutput):
    """
    Output of [`MambaFormerForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor`, *optional*): mean cross-entropy of the merged logits, in nats a token.
        logits (`torch.FloatTensor` of shape `(batch, kept, vocab)`): the merged prediction. Where a single expert
            speaks these are its own logits, otherwise log-probabilities.
        past_key_values (`MambaFormerCache`, *optional*): returned with `use_cache=True`.
        route_trace (`RouteTrace`): of the positions in `logits`.
        margin (`torch.FloatTensor` of shape `(batch, positions)`): the router's margins, differentiable.
        gate_logit (`torch.FloatTensor` of shape `(batch,)`): the sequence gate, from the source alone.
        emamba_logits, et5_logits (`torch.FloatTensor` of shape `(batch, kept, vocab)`, *optional*): each expert's own
            logits, with `output_experts=True`.
        encoder_last_hidden_state, encoder_*, decoder_*, cross_attentions: where transformers looks for them in an
            encoder-decoder's output; always `None` here, ET5 being run for some rows or none.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    route_trace: RouteTrace | None = None
    margin: torch.FloatTensor | None = None
    gate_logit: torch.FloatTensor | None = None
    emamba_logits: torch.FloatTensor | None = None
    et5_logits: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_attentions: tuple | None = None
    encoder_hidden_states: tuple | None = None
    decoder_attentions: tuple | None = None
    decoder_hidden_states: tuple | None = None
    cross_attentions: tuple | None = None
