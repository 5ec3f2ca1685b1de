# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Who takes part in the latency benchmark, at which sizes, and which tokens ET5 writes.

An engine is a model loaded in a process of its own; a contestant is an engine and how it is asked, so that several
contestants may share one process. Nothing heavy is imported here: an engine's process loads its own packages only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

VOCAB = 32128
SHARE = 0.038  # of all tokens, the paper's
OPEN = 0.25  # of the sequences, where the gate decides
BURST = 8  # tokens in a row that ET5 writes, about

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "true": {
        "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
        "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        "flan-t5-base": {
            "d_model": 768,
            "d_ff": 2048,
            "num_layers": 12,
            "num_heads": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        "none": {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 1},
        "mamba-130m": {"hidden_size": 768, "num_hidden_layers": 24},
    },
    "tiny": {
        "t5-large": {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 3, "num_heads": 4},
        "t5-base": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        "flan-t5-base": {
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        "none": {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 1},
        "mamba-130m": {"hidden_size": 32, "num_hidden_layers": 2},
    },
}
"""Configurations by name; `none` stands where ET5 is never asked. All have the vocabulary `vocabulary(sizes)`."""


def vocabulary(sizes: str) -> int:
    """Rows of every contestant's vocabulary: T5's, which a composed model's experts share."""
    return VOCAB if sizes == "true" else 256


@dataclass(frozen=True)
class Engine:
    """`module` and `name` of the class to run, its `options`, and the `packages` without which it cannot be."""

    module: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    attention: str | None = None  # the size whose attention needs memory that grows with the square of the source

    def working_bytes(self, sizes: str, length: int) -> int:
        """About how much memory an answer needs beside the weights: activations, and some copies of T5's scores."""
        heads = SIZES[sizes][self.attention]["num_heads"] if self.attention else 0
        return 2**30 + 2**16 * length + 3 * 4 * heads * length**2


@dataclass(frozen=True)
class Contestant:
    """What is asked of which engine: `scenario` goes to its `answer`."""

    label: str
    engine: str
    scenario: dict[str, Any] = field(default_factory=dict)


def our_engine(weights: str, decode: str = "float32", et5: str = "none") -> Engine:
    """A MambaFormer whose EMamba holds `weights` and decodes with `decode`."""
    options = {"weights": weights, "decode": decode, "et5": et5}
    return Engine("latency_ours", "OurMambaFormer", options, attention=None if et5 == "none" else et5)


def llama_engine(weights: str) -> Engine:
    """llama.cpp on a file of `weights`."""
    return Engine("latency_engines", "LlamaCpp", {"weights": weights}, ("xllamacpp", "gguf"))


def t5_engines(size: str) -> dict[str, Engine]:
    """The two engines that run a T5 of this size."""
    options, packages = {"size": size}, ("ctranslate2",)
    return {
        size: Engine("latency_peers", "TransformersT5", options, attention=size),
        f"ctranslate2-{size}": Engine("latency_engines", "CTranslate2T5", options, packages, attention=size),
    }


ENGINES: dict[str, Engine] = {
    **t5_engines("t5-large"),
    **t5_engines("t5-base"),
    "t5-large-bfloat16": Engine(
        "latency_peers", "TransformersT5", {"size": "t5-large", "dtype": "bfloat16"}, attention="t5-large"
    ),
    "mamba": Engine("latency_peers", "TransformersMamba"),
    "llama-q8_0": llama_engine("q8_0"),
    "llama-q4_0": llama_engine("q4_0"),
    "emamba-float32": our_engine("float32"),
    "emamba-packed": our_engine("float32", "int8"),
    "emamba-int8": our_engine("int8"),
    "emamba-int4": our_engine("int4"),
    "mambaformer": our_engine("int8", et5="flan-t5-base"),
}

CONTESTANTS: dict[str, Contestant] = {
    "t5-large": Contestant("T5-Large, transformers, float32", "t5-large"),
    "t5-large-bfloat16": Contestant("T5-Large, transformers, bfloat16", "t5-large-bfloat16"),
    "t5-base": Contestant("T5-base, transformers, float32", "t5-base"),
    "ctranslate2-t5-large": Contestant("T5-Large, CTranslate2, int8", "ctranslate2-t5-large"),
    "ctranslate2-t5-base": Contestant("T5-base, CTranslate2, int8", "ctranslate2-t5-base"),
    "mamba": Contestant("Mamba-130m, transformers, float32", "mamba"),
    "llama-q8_0": Contestant("Mamba-130m, llama.cpp, q8_0", "llama-q8_0"),
    "llama-q4_0": Contestant("Mamba-130m, llama.cpp, q4_0", "llama-q4_0"),
    "emamba-float32": Contestant("EMamba alone, float32", "emamba-float32", {"routing": "emamba"}),
    "emamba-packed": Contestant("EMamba alone, float32 source, int8 decoding", "emamba-packed", {"routing": "emamba"}),
    "emamba-int8": Contestant("EMamba alone, int8", "emamba-int8", {"routing": "emamba"}),
    "emamba-int4": Contestant("EMamba alone, int4", "emamba-int4", {"routing": "emamba"}),
    "closed": Contestant("MambaFormer int8, gate closed", "mambaformer", {"open_rows": 0}),
    "quarter": Contestant(
        f"MambaFormer int8, gate open, {SHARE / OPEN:.1%} in bursts",
        "mambaformer",
        {"share": SHARE / OPEN, "burst": BURST},
    ),
    "bursts": Contestant(f"MambaFormer int8, gate open, {SHARE:.1%} in bursts", "mambaformer", {"burst": BURST}),
    "independent": Contestant(f"MambaFormer int8, gate open, {SHARE:.1%} independent", "mambaformer", {"burst": 1}),
}
MIXTURE = "mixture"
MIXTURE_LABEL = f"MambaFormer int8, gate open for {OPEN:.0%}, {SHARE:.1%} of all tokens in bursts"


def source_ids(length: int, vocab: int, rows: int = 1) -> list[list[int]]:
    """Random sources, `rows` of `length` tokens each, the same at every call; the last is the end token."""
    draw = random.Random(length)
    return [[draw.randrange(3, vocab) for _ in range(length - 1)] + [1] for _ in range(rows)]


def routed_positions(new_tokens: int, share: float, burst: int, turn: int) -> list[int]:
    """
    The new tokens that ET5 writes in the `turn`-th answer, ascending.

    Their number is whole and differs by at most one between turns, so that over the turns the share is `share`. They
    stand in runs of about `burst` tokens at random places; with a `burst` of 1, each at a place of its own.
    """
    exact = share * new_tokens
    count = int((turn + 1) * exact + 1e-9) - int(turn * exact + 1e-9)
    draw = random.Random(f"{new_tokens} {burst} {turn}")
    if burst == 1:
        return sorted(draw.sample(range(new_tokens), count))
    runs = min(count, max(1, round(count / burst)))
    if not runs:
        return []
    lengths = [count // runs + (at < count % runs) for at in range(runs)]
    cuts = sorted(draw.randrange(new_tokens - count + 1) for _ in range(runs))  # tokens of EMamba before each run
    positions, written = [], 0
    for cut, run in zip(cuts, lengths, strict=True):
        positions += range(cut + written, cut + written + run)
        written += run
    return positions
