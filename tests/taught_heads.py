# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Heads for look-ahead decoding that know some answers by heart."""

from __future__ import annotations

import torch
from tiny_experts import VOCAB
from transformers import PreTrainedModel

from mambaformer.modeling_mambaformer.look_ahead_heads import add_heads
from mambaformer.trainer.look_ahead_heads import Lessons, fit


def teach_answers(model: PreTrainedModel, taught: list[tuple[torch.Tensor, torch.Tensor]], epochs: int = 60) -> None:
    """Give `model` heads that know what follows in these answers `(1, T)` to sources `(1, S)`, whoever wrote it."""
    add_heads(model, 3, torch.arange(VOCAB), VOCAB)
    lessons = []
    for source, answer in taught:
        with torch.no_grad():
            states = model.emamba.base_model(torch.cat([source, answer], 1)).last_hidden_state  # (1, S + T, D)
        follows = torch.cat([answer[0, 1:], torch.tensor([-1])])
        lessons.append((states[0, -answer.shape[1] :].float(), follows, follows))
    hidden, read, said = (torch.cat(parts) for parts in zip(*lessons, strict=True))
    learned = Lessons.build((hidden, read, said), heads=3)
    heads = model.look_ahead_heads.float()
    fit(heads, model.emamba.get_input_embeddings(), learned, epochs=epochs, batch=64, rate=1e-2)
