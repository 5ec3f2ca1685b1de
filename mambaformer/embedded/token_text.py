# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What the tokens of a fast tokenizer stand for in plain text, as bytes, whatever its spelling.

Two spellings are known: the byte-level alphabet of GPT-2 (each byte a visible character, a space is "Ġ") and the
SentencePiece one ("▁" is a space, `<0xE2>` a byte). A leading space is part of a token's text in both.
"""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerFast

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[int, str]:
    """Return byte -> character of the byte-level alphabet (Radford et al., 2019, section 2.2).

    Printable Latin-1 characters stand for themselves; the other bytes, in rising order, for the characters from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


class TokenText:
    """Both directions between a tokenizer's tokens and the bytes of the text they stand for.

    Args:
        tokenizer: a fast tokenizer.

    Attributes:
        texts: list over the ids from 0 to the largest one; None for special tokens and for ids without a token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        state = json.loads(self._backend.to_str())
        decoders = set(_types(state["decoder"]))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders or bool(state["model"].get("byte_fallback"))
        self._to_character = byte_level_alphabet()
        self._to_byte = {character: byte for byte, character in self._to_character.items()}
        added = self._backend.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.texts: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            if index not in special:
                self.texts[index] = token.encode() if index in added else self._read(token)
        self._added = {text: index for index in added if (text := self.texts[index]) is not None}
        self._bytes = {
            text: index for index, text in reversed(list(enumerate(self.texts))) if text is not None and len(text) == 1
        }

    def _read(self, token: str) -> bytes:
        """Return the bytes that one token of the model stands for."""
        if self._byte_level:
            if all(character in self._to_byte for character in token):
                return bytes(self._to_byte[character] for character in token)
            return token.encode()
        byte = BYTE_PIECE.fullmatch(token) if self._byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    def spell(self, text: bytes) -> list[int]:
        """Return the ids that spell `text` as it stands, without a space added before it or a special token.

        Ids whose text is unknown (the unknown token) are left out, so that the result is empty when nothing of `text`
        can be spelled.
        """
        if text in self._added:
            return [self._added[text]]
        if self._byte_level:
            written = "".join(self._to_character[byte] for byte in text)
        else:
            try:
                written = text.decode().replace(" ", "▁")
            except UnicodeDecodeError:
                return [self._bytes[bytes([byte])] for byte in text if bytes([byte]) in self._bytes]
        ids = [token.id for token in self._backend.model.tokenize(written)]
        return [index for index in ids if self.texts[index] is not None]


def _types(decoder: Any) -> list[str]:
    """Return the type names of a decoder's JSON, those within a sequence too."""
    if not isinstance(decoder, dict):
        return []
    return [decoder["type"], *(name for inner in decoder.get("decoders", []) for name in _types(inner))]
