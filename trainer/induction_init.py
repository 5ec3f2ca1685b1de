# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Initial weights with which a T5 copies from its source from the first steps on.

Copying takes a circuit of two heads in a row: one in the encoder that notes at each token which token stood before it,
and one in the cross-attention that looks for the token just written among those notes and reads out what follows
(induction heads: Olsson et al. 2022, "In-context learning and induction heads"). Each half is worthless without the
other, so gradient descent finds the pair late: of the few million tokens on which a tiny T5 can be trained on a CPU,
never. Set out roughly at the start, as random low-rank projections that work together (mimetic initialisation:
Trockman and Kolter 2023), it is refined by training at once. All of it stays trainable, and an ordinary T5 results.
"""

from __future__ import annotations

import torch
from transformers import T5ForConditionalGeneration

BIAS = 6.0
"""Relative position bias, in logits, of the heads that look one or two tokens back."""
SHARPNESS = 0.15
"""Scale of the induction heads' queries; a match of d_kv unit components gives a logit of SHARPNESS * d_kv."""
MATCHING = 0.06
"""Scale of the queries of the encoder's matching heads, at which a token looks for its like."""


def random_rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix `(size, size)`."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


@torch.no_grad()
def initialise_induction(model: T5ForConditionalGeneration, seed: int = 0) -> None:
    """
    Set heads 0, 1 and 2 of `model`'s attentions, in place.

    Encoder, first layer: heads 0 and 1 write the tokens one and two places back into a subspace of `d_kv` dimensions.
    Encoder, other layers: head 2 looks for other places of the same token and writes what is there. Decoder, first
    layer: head 0 writes the token before. Cross-attention, other layers: head 0 attends where the token before is the
    one just written, head 1 where the token two places back is the one written before it, and both copy what stands
    there, each layer another `d_kv` of its dimensions; where a token occurs often, the two vote.

    Args:
        seed: of the random projections.

    Raises:
        ValueError: fewer than three heads, or `d_model` below `4 * d_kv`.
    """
    config = model.config
    d_kv, width = config.d_kv, config.d_model
    if config.num_heads < 3 or width < 4 * d_kv:
        raise ValueError(
            f"num_heads is {config.num_heads}, d_model {width} and d_kv {d_kv}: induction heads need 3 heads or more "
            "and d_model >= 4 * d_kv."
        )
    generator = torch.Generator().manual_seed(seed)
    basis = random_rotation(width, generator)
    noted = basis[:d_kv]  # (K, D), reads what identifies a token
    one, two, own = (random_rotation(d_kv, generator) @ noted for _ in range(3))  # (K, D), where notes are written
    heads = [slice(head * d_kv, (head + 1) * d_kv) for head in range(3)]

    first = model.encoder.block[0].layer[0].SelfAttention
    for head, back in ((0, one), (1, two)):
        first.relative_attention_bias.weight[head + 1, head] = BIAS  # bucket n: n tokens back
        first.q.weight[heads[head]] = 0.0
        first.v.weight[heads[head]], first.o.weight[:, heads[head]] = noted, back.T
    for block in model.encoder.block[1:]:
        attention = block.layer[0].SelfAttention
        likeness = random_rotation(width, generator)
        attention.q.weight[heads[2]], attention.k.weight[heads[2]] = MATCHING * likeness[:d_kv], likeness[:d_kv]
        attention.v.weight[heads[2]] = likeness[d_kv : 2 * d_kv]
        attention.o.weight[:, heads[2]] = 0.5 * likeness[2 * d_kv : 3 * d_kv].T

    first = model.decoder.block[0].layer[0].SelfAttention
    first.relative_attention_bias.weight[1, 0] = BIAS
    first.q.weight[heads[0]] = 0.0
    first.v.weight[heads[0]], first.o.weight[:, heads[0]] = noted, own.T
    for number, block in enumerate(model.decoder.block[1:]):
        attention = block.layer[1].EncDecAttention
        part = 1 + number % (width // d_kv - 1)
        copied = basis[part * d_kv : (part + 1) * d_kv]  # (K, D)
        for head, asked, note in ((0, noted, one), (1, own, two)):
            attention.q.weight[heads[head]], attention.k.weight[heads[head]] = SHARPNESS * asked, note
            attention.v.weight[heads[head]], attention.o.weight[:, heads[head]] = copied, copied.T
