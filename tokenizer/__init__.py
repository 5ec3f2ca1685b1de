# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The shared vocabulary: the tokenizer, the source format, vocabulary transfer and the domain lexicon."""
