# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""transformers' own T5 and Mamba at the sizes of the latency benchmark: random weights, greedy, so many new tokens."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from .latency_contestants import SIZES, source_ids, vocabulary


class Clock(BaseStreamer):
    """When the prompt and each new token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


def timed_generate(
    model: PreTrainedModel, ids: list[list[int]], new_tokens: int, **options: Any
) -> tuple[dict[str, Any], Any]:
    """
    Answer `ids` with `new_tokens` tokens a row, without an early end.

    Returns:
        `seconds` in all, `first` until the first new token, `decode` from there to the last, and `tokens` a row; and
        what `generate` returned.
    """
    inputs = torch.tensor(ids, device=model.device)
    clock = Clock()
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        streamer=clock,
        return_dict_in_generate=True,
        **options,
    )
    end = time.perf_counter()
    prompt = 1 if model.config.is_encoder_decoder else inputs.shape[1]
    times = clock.times
    figures = {"seconds": end - start, "first": times[1] - start, "decode": times[-1] - times[1]}
    return {**figures, "tokens": output.sequences.shape[1] - prompt}, output


def t5_config(sizes: str, size: str) -> T5Config:
    """The configuration of a T5 of `SIZES`."""
    return T5Config(vocab_size=vocabulary(sizes), decoder_start_token_id=0, **SIZES[sizes][size])


def random_t5(sizes: str, size: str) -> T5ForConditionalGeneration:
    """A T5 of random weights, the same at every call."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(t5_config(sizes, size)).eval()


def random_mamba(sizes: str) -> MambaForCausalLM:
    """A Mamba of random weights, the same at every call."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=vocabulary(sizes), pad_token_id=0, eos_token_id=1, **SIZES[sizes]["mamba-130m"])
    return MambaForCausalLM(config).eval()


class TorchEngine:
    """
    A model that transformers' `generate` drives.

    Args:
        setup: `folder`, `sizes`, `threads`, `device`.
    """

    model: PreTrainedModel

    def __init__(self, setup: dict[str, Any]):
        self.setup, self.sizes, self.folder = setup, setup["sizes"], setup["folder"]
        torch.set_num_threads(setup["threads"])

    def place(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keep a loaded model, on its device; returns its size."""
        self.model = model.eval().to(self.setup["device"])
        return self.finish({"weight_bytes": sum(parameter.nbytes for parameter in self.model.parameters())})

    def ids(self, length: int, batch: int) -> list[list[int]]:
        """The sources of an answer."""
        return source_ids(length, self.model.config.vocab_size, batch)

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Add the peak of an accelerator's memory, which the process's own does not show."""
        if self.setup["device"].startswith("cuda"):
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return figures

    def answer(self, length: int, new_tokens: int, turn: int, batch: int = 1) -> dict[str, Any]:
        """One answer, timed."""
        figures, _ = timed_generate(self.model, self.ids(length, batch), new_tokens)
        return self.finish(figures)


class TransformersT5(TorchEngine):
    """transformers' T5. Args: `size`, one of `SIZES`; `dtype`, the name of the floats that it computes with."""

    def __init__(self, setup: dict[str, Any], size: str, dtype: str = "float32"):
        super().__init__(setup)
        self.size, self.dtype = size, dtype

    def prepare(self) -> None:
        """Write a checkpoint of random weights."""
        random_t5(self.sizes, self.size).save_pretrained(self.folder)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint."""
        return self.place(T5ForConditionalGeneration.from_pretrained(self.folder, dtype=getattr(torch, self.dtype)))


class TransformersMamba(TorchEngine):
    """transformers' Mamba in float32, with the loop over time that it has on a CPU."""

    def prepare(self) -> None:
        """Write a checkpoint of random weights."""
        random_mamba(self.sizes).save_pretrained(self.folder)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint."""
        return self.place(MambaForCausalLM.from_pretrained(self.folder, dtype=torch.float32))
