# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The sets of instructions that this processor has and the compiled code knows, each of which is tested."""

from __future__ import annotations

import os

from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY

VARIABLE = "MAMBAFORMER_ISA"


def instruction_sets() -> list[str]:
    """Values of `MAMBAFORMER_ISA` that lead to different code here, the best set first."""
    found: dict[str, str] = {}
    before = os.environ.get(VARIABLE)
    for wish in ("best", "avxvnni", "avx2", "portable"):
        os.environ[VARIABLE] = wish
        name = "none" if DECODE_LIBRARY is None else DECODE_LIBRARY.mambaformer_decode_isa().decode()
        found.setdefault(name, wish)
    os.environ.pop(VARIABLE)
    if before is not None:
        os.environ[VARIABLE] = before
    return list(found.values())
