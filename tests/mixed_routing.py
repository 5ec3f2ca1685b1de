# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Models that route in earnest, and instruments that see what ran: the tests' own measure of routing."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from tiny_experts import VOCAB, random_batch

from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

EMAMBA, ET5, ENDED = 0, 1, -1


def mixed_model(et5_folder, emamba_folder, seed: int = 3, **fields) -> MambaFormerForConditionalGeneration:
    """A composed model whose threshold lies amid its margins, uncapped: about half of the tokens go to ET5."""
    torch.manual_seed(seed)
    model = MambaFormerForConditionalGeneration.from_experts_pretrained(
        str(et5_folder), str(emamba_folder), **{"expert_budget": 1.0, **fields}
    )
    with torch.no_grad():
        model.router.score.weight.mul_(8)
        model.router.hidden_proj.weight.mul_(0.04)  # as large as the other features
        model.router.domain_weight.normal_()
        batch = random_batch([9, 4, 12, 6, 7, 3], seed=seed)
        output = model(**batch, decoder_input_ids=random_targets(6, 12), routing="soft", use_cache=False)
        margins = output.margin.flatten().float().sort().values
        middle = margins[len(margins) // 3 : 2 * len(margins) // 3]
        widest = int(middle.diff().argmax())  # in a gap, so that rounding cannot turn a choice
        model.config.router_threshold = float(middle[widest : widest + 2].mean()) + 1e-6
    return model


def random_targets(rows: int, length: int, seed: int = 9) -> torch.Tensor:
    """Decoder inputs `(rows, length)`: the start token, then anything."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One source of a batch, without its padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def after_end(tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Which of the `tokens` `(B, T)` come after one of the ids `ends`, `(B, T)` bool."""
    is_end = torch.isin(tokens, torch.tensor(ends)).long()
    return is_end.cumsum(1) - is_end > 0


class Meter:
    """What ET5's encoder and decoder were really asked: one entry a call."""

    def __init__(self):
        self.encoder_rows: list[int] = []
        self.decoder_rows: list[int] = []
        self.decoder_tokens: list[int] = []  # rows times positions
        self.decoder_sources: list[int] = []  # different sources among the rows

    def on_encoder(self, module, args, kwargs):
        self.encoder_rows.append(kwargs["input_ids"].shape[0])

    def on_decoder(self, module, args, kwargs):
        rows, positions = kwargs["input_ids"].shape
        self.decoder_rows.append(rows)
        self.decoder_tokens.append(rows * positions)
        self.decoder_sources.append(len(kwargs["encoder_hidden_states"].flatten(1).unique(dim=0)))


@contextmanager
def metered(model):
    """Count ET5's calls by hooks on its own modules."""
    meter = Meter()
    hooks = [
        model.et5.encoder.register_forward_pre_hook(meter.on_encoder, with_kwargs=True),
        model.et5.decoder.register_forward_pre_hook(meter.on_decoder, with_kwargs=True),
    ]
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()
