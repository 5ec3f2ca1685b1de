# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The pretraining loss of either expert: cross-entropy on target positions, computed without waste.

Two things keep a small model on one core from spending its time at the vocabulary: the head is applied to target
positions alone, never to the source or to padding, and head and cross-entropy are one function that turns the logits
into their own gradient in place.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from .pretrain_data import IGNORE


def target_hidden(model: nn.Module, expert: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states (N, D), scaled as the head expects them, and gold ids (N,) of a batch's N target tokens."""
    labels = batch["labels"]  # (B, T)
    wanted = labels != IGNORE
    if expert == "et5":
        encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        fed = torch.cat([start, labels[:, :-1]], dim=1)
        hidden = model.decoder(
            input_ids=fed.masked_fill(fed == IGNORE, model.config.pad_token_id),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state[wanted]  # (N, D)
        if model.config.scale_decoder_outputs:
            hidden = hidden * model.model_dim**-0.5
    else:
        hidden = model.backbone(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state  # (B, S + T, D)
        hidden = hidden[:, -labels.shape[1] :][wanted]  # (N, D)
    return hidden.to(model.lm_head.weight.dtype), labels[wanted]


class HeadCrossEntropy(torch.autograd.Function):
    """Weighted mean cross-entropy (nats) of `hidden @ weight.T` against `gold`, in float32; the logits exist once.

    Inputs: hidden (N, D), weight (V, D), gold (N,), share (N,), each token's part of the mean, summing to 1. The
    gradient is ready when forward returns, since it needs no more than the probabilities that the loss needs too.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, gold: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        logits = (hidden @ weight.t()).float()  # (N, V)
        logits -= logits.amax(dim=1, keepdim=True)
        chosen = logits.gather(1, gold[:, None])  # (N, 1)
        total = logits.exp_().sum(dim=1, keepdim=True)  # (N, 1)
        share = share[:, None]  # (N, 1)
        loss = ((total.log() - chosen) * share).sum()
        logits *= share / total  # softmax times share
        logits.scatter_add_(1, gold[:, None], -share)
        gradient = logits.to(weight.dtype)
        ctx.save_for_backward(gradient @ weight, gradient.t() @ hidden)
        return loss

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        for_hidden, for_weight = ctx.saved_tensors
        return for_hidden * grad_output, for_weight * grad_output, None, None


def token_shares(
    labels: torch.Tensor, sentence_ends: torch.Tensor, first_tokens: int = 0, first_weight: float = 1.0
) -> torch.Tensor:
    """
    Each target token's part (N,) of the mean loss, float32, summing to 1, in the order of `labels[labels != -100]`.

    The first `first_tokens` of every sentence weigh `first_weight`, the others 1: there a sentence says what it is
    about, and there an answer ends or goes on.

    Args:
        labels: (B, T) int64, -100 at padding.
        sentence_ends: ids of the tokens that end a sentence.
    """
    wanted = labels != IGNORE  # (B, T)
    starts = torch.zeros_like(wanted)
    starts[:, 0] = True
    starts[:, 1:] = torch.isin(labels[:, :-1], sentence_ends)
    early = torch.zeros_like(wanted)
    for distance in range(min(first_tokens, labels.shape[1])):
        early[:, distance:] |= starts[:, : labels.shape[1] - distance]
    weights = torch.where(early, first_weight, 1.0)[wanted]  # (N,)
    return weights / weights.sum()


def pretraining_loss(
    model: nn.Module, expert: str, batch: dict[str, torch.Tensor], shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean loss over the N target tokens of a batch, weighted by `shares` (N,); a scalar in float32, with a graph."""
    hidden, gold = target_hidden(model, expert, batch)
    if shares is None:
        shares = token_shares(batch["labels"], gold.new_empty(0))
    return HeadCrossEntropy.apply(hidden, model.lm_head.weight, gold, shares)


def fuse_activations(model: nn.Module) -> nn.Module:
    """Swap T5's tanh-GELU, written out in eight tensor operations, for PyTorch's single one; weights are untouched."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
