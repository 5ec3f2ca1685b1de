# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""DentalQA: an open dental question-answering data set, its sources, its builder and its checks."""

from __future__ import annotations

from .dataset import data_dir, load_dental_qa, probe_rows

__all__ = ["data_dir", "load_dental_qa", "probe_rows"]
