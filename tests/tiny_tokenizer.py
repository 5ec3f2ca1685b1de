# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A tokenizer for the tiny experts: as many pieces as they have rows, enough to spell any question in English."""

from __future__ import annotations

import string

from tiny_experts import VOCAB
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer


def tiny_tokenizer() -> MambaFormerTokenizer:
    """A Unigram tokenizer of exactly `VOCAB` pieces, lower case, most of them single characters."""
    words = ["▁question", "▁context", "▁what", "▁is", "▁the", "▁teeth", "▁gums", "▁floss", "▁caries", "▁plaque"]
    pieces = ["<pad>", "</s>", "<unk>", *words, "▁", *string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces += [f"▁{letter}" for letter in string.ascii_lowercase]
    scores = [(piece, -1.0 * (len(piece) == 1) - 1.0) for piece in pieces[:VOCAB]]
    backend = Tokenizer(models.Unigram(scores, unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(pieces[:3])
    assert backend.get_vocab_size() == VOCAB
    return MambaFormerTokenizer(tokenizer_object=backend)
