# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What leaves for the Hub beside the weights: the model card, an Inference Endpoints handler and a Space.

The flat Python files are written by every `save_pretrained`; that code is in the lowest room, `configuration`, because
configuration, tokenizer and model all save.
"""

from __future__ import annotations

from ..configuration.flatten import flatten
from ..configuration.remote_code import write_remote_code

__all__ = ["flatten", "write_remote_code"]
