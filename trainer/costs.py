# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The cost table: what an ET5 call and an EMamba step take on the present device, measured in milliseconds.

It is kept as `cost_table` of the model's configuration. Training and calibration use its proportions only, in units of
an average call (`utility.CallCosts`), so that a recipe means the same on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ..modeling_mambaformer.emamba_stream import head_logits, read_on, read_source
from ..modeling_mambaformer.lazy_et5 import LazyET5State
from ..modeling_mambaformer.sources import Sources

CAUGHT_UP = 16
"""Positions of the longer of the two decoder passes from which the cost of a pass and of a position are told apart."""


@torch.no_grad()
def measure_costs(
    model: nn.Module, source_length: int = 64, target_length: int = 32, repeats: int = 20
) -> dict[str, float]:
    """
    Least milliseconds, one sequence at a time, of a decoder pass (`pass`), a position computed in it (`token`), an
    encoder run (`encoder`) and an EMamba step with its head (`emamba`). The least, since whatever else runs on the
    machine only adds to it. Compiled code runs where it would in generation.

    Args:
        source_length, target_length: in tokens, of a typical question and of the answer before the call.
        repeats: of each measurement.

    Returns:
        milliseconds, 0 or more, under `pass`, `token`, `encoder` and `emamba`: the fields of `config.cost_table`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ids, answer = (
        torch.arange(length, device=device)[None] % (model.config.vocab_size - 3) + 3
        for length in (source_length, target_length + CAUGHT_UP)
    )
    sources = Sources.build(ids, None, model.config.vocab_size)
    state = LazyET5State(sources, torch.zeros(1, dtype=torch.long, device=device))

    def encode() -> None:
        state.encoded.clear()
        state.encode(model.et5, [0], model.et5_encoder)

    def decode(positions: int) -> None:
        state.reached = [target_length]
        end = target_length + positions
        state.decode(model.et5, answer, [0], end, end - 1, model.et5_decoder)

    encoder = least_ms(encode, repeats, device)
    state.decode(model.et5, answer, [0], target_length, target_length - 1, model.et5_decoder)
    short = least_ms(lambda: decode(1), repeats, device)
    long = least_ms(lambda: decode(CAUGHT_UP), repeats, device)
    cache, _ = read_source(model.emamba, sources)

    def step() -> None:
        if model.emamba_decoder.step(model.emamba, cache, answer[:, :1]) is None:
            head_logits(model.emamba, read_on(model.emamba, cache, answer[:, :1]))

    emamba = least_ms(step, repeats, device)
    model.train(was_training)
    token = max(0.0, (long - short) / (CAUGHT_UP - 1))
    return {"pass": max(short - token, 0.0), "token": token, "encoder": encoder, "emamba": emamba}


def least_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Least milliseconds of `run()`, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return min(times[2:])
