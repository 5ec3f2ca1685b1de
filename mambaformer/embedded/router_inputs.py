# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""From tokens and EMamba's hidden states to what the router sees; everything here is known before ET5 is touched."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .configuration_mambaformer import MambaFormerConfig
from .router import RouterState, TokenRouter
from .router_features import RouterInputs, distribution_scalars
from .sources import Sources


def source_scalars(
    router: TokenRouter, config: MambaFormerConfig, sources: Sources
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised length and mean domain weight of each source, both `(B,)` float."""
    mask = sources.attention_mask
    lengths = mask.sum(-1)  # (B,)
    weights = router.domain_weight[sources.input_ids].float() * mask  # (B, S)
    return lengths / config.max_source_length, weights.sum(-1) / lengths


def first_state(emamba: PreTrainedModel, router: TokenRouter, sources: Sources) -> RouterState:
    """The router's state before the first decoder position of each source, B rows."""
    mask = sources.attention_mask
    embeddings = emamba.get_input_embeddings()(sources.input_ids).detach().float()  # (B, S, D)
    zeros = mask.new_zeros(mask.shape[0], dtype=torch.float32)
    return RouterState(
        previous=zeros,
        since=mask.new_zeros(mask.shape[0]),
        spent=mask.new_zeros(mask.shape[0]),
        domain_sum=zeros,
        embedding_sum=(embeddings * mask[..., None]).sum(1),
        seen=mask.sum(-1),
    )


def router_inputs(
    emamba: PreTrainedModel,
    router: TokenRouter,
    config: MambaFormerConfig,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    state: RouterState,
    scalars: tuple[torch.Tensor, torch.Tensor],
) -> tuple[RouterInputs, RouterState]:
    """
    Features of decoder positions `ids` `(B, T)` after `state`, and the state with these positions' context added.

    The router reads EMamba and does not train it: hidden states `(B, T, D)`, logits `(B, T, V)` and embeddings are
    detached.

    Args:
        scalars: of the rows' sources, see `source_scalars`, both `(B,)`.
    """
    dtype = router.hidden_proj.weight.dtype
    steps = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    embeddings = emamba.get_input_embeddings()(ids).detach().float()  # (B, T, D)
    before = state.embedding_sum[:, None] + embeddings.cumsum(1) - embeddings  # (B, T, D)
    mean = before / (state.seen[:, None, None] + steps[:, None])  # (B, T, D), of the context before each token
    weights = router.domain_weight[ids].float()  # (B, T)
    position = state.position + steps
    entropy, top_probability = distribution_scalars(logits.detach())
    inputs = RouterInputs(
        projected=router.hidden_proj(hidden.detach().to(dtype)),
        entropy=entropy.to(dtype),
        top_probability=top_probability.to(dtype),
        embedding_distance=(1 - F.cosine_similarity(embeddings, mean, dim=-1)).to(dtype),
        source_length=scalars[0].to(dtype),
        position=(position / config.max_target_length).to(dtype),
        token_domain=weights.to(dtype),
        source_domain=scalars[1].to(dtype),
        answer_domain=((state.domain_sum[:, None] + weights.cumsum(1)) / (position + 1)).to(dtype),
    )
    state = replace(
        state,
        domain_sum=state.domain_sum + weights.sum(1),
        embedding_sum=state.embedding_sum + embeddings.sum(1),
        seen=state.seen + ids.shape[1],
        position=state.position + ids.shape[1],
    )
    return inputs, state
