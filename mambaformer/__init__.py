# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""MambaFormer: token-level routing between a pretrained T5 and a pretrained Mamba, native to the Hugging Face Hub."""

__version__ = "0.1.0"
