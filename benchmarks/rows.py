# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Which questions a benchmark asks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

Row = TypeVar("Row")


def sampled(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """`count` of the rows, or all if there are no more, in an order that `seed` sets."""
    rows = list(rows)
    return random.Random(seed).sample(rows, min(count, len(rows)))
