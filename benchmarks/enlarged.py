# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
A larger EMamba that says what a smaller one says, so that speed which depends on what is said can be measured at sizes
that no trained model here has.

Zeros stand beside the smaller one's weights, and the layers behind its own add nothing. A step reads and multiplies
all of them, for neither knows that they are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..configuration.configuration_mambaformer import MambaFormerConfig
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration


def pieces(name: str, old: MambaFormerConfig, new: MambaFormerConfig) -> list[tuple[int, int, int]]:
    """Where rows of a parameter of EMamba's mixers go that stand in several blocks: (from, to, how many) each."""
    before, after = old.emamba, new.emamba
    if name.endswith("in_proj.weight"):  # the channels and their gates
        inner = before.intermediate_size
        return [(0, 0, inner), (inner, after.intermediate_size, inner)]
    rank, states = before.time_step_rank, before.state_size
    return [(0, 0, rank), (rank, after.time_step_rank, 2 * states)]  # x_proj: step sizes, and B and C


@torch.no_grad()
def enlarged(
    model: MambaFormerForConditionalGeneration, hidden_size: int, layers: int
) -> MambaFormerForConditionalGeneration:
    """
    `model` with an EMamba of `hidden_size` and `layers`, logits and margins the same but for rounding, in float32.

    Raises:
        ValueError: for less than the model has.
    """
    old = model.config
    if hidden_size < old.emamba.hidden_size or layers < old.emamba.num_hidden_layers:
        raise ValueError(
            f"{hidden_size} x {layers} is less than the model's {old.emamba.hidden_size} x "
            f"{old.emamba.num_hidden_layers}: give at least these."
        )
    spread = (hidden_size / old.emamba.hidden_size) ** 0.5  # a mean over more values, of which the new ones are zero
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": old.emamba.expand * hidden_size,
        "time_step_rank": max(old.emamba.time_step_rank, -(-hidden_size // 16)),
        "layer_norm_epsilon": old.emamba.layer_norm_epsilon / spread**2,
    }
    fields = old.to_dict()
    fields["emamba"] = {**old.emamba.to_dict(), **sizes}
    new = MambaFormerConfig.from_dict(fields)
    larger = MambaFormerForConditionalGeneration(new).eval()
    larger.et5 = model.et5
    states = {name: weight for name, weight in larger.state_dict().items() if not name.startswith("et5.")}
    for weight in states.values():
        weight.zero_()
    for name, weight in model.state_dict().items():
        if name in states:
            place(name, weight, states[name], old, new, spread)
    larger.generation_config = model.generation_config
    return larger


def place(
    name: str, weight: Tensor, room: Tensor, old: MambaFormerConfig, new: MambaFormerConfig, spread: float
) -> None:
    """Copy a parameter into the larger model's."""
    if name.startswith("emamba.") and name.endswith(("in_proj.weight", "x_proj.weight")):
        for begin, to, rows in pieces(name, old, new):
            room[to : to + rows, : weight.shape[1]] = weight[begin : begin + rows]
    elif name == "look_ahead_heads.in_proj.weight":  # of a state and of sqrt(D) times an embedding
        state, token = weight.chunk(2, dim=1)
        room_of_state, room_of_token = room.chunk(2, dim=1)
        room_of_state[: len(state), : state.shape[1]] = state
        room_of_token[: len(token), : token.shape[1]] = token / spread
    else:
        norm = name.startswith("emamba.") and "norm" in name
        room[tuple(slice(length) for length in weight.shape)] = weight / spread if norm else weight
