# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Train the shared tokenizer of experts of one's own: a Unigram model with Metaspace, as T5's is.

    python -m mambaformer.trainer.train_tokenizer --out DIR --vocab-size 8000 FILE [FILE ...]

Unlike T5's, every text can be spelled: characters that the training text has too rarely are written as UTF-8 bytes.
Numbers are spelled digit by digit, and the same text always gives the same `tokenizer.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..tokenizer.tokenization_mambaformer import DEFAULT_MODEL_MAX_LENGTH, MambaFormerTokenizer
from .unigram_training import train_unigram

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Characters that always get a piece of their own, seen in the training text or not.
WORD_BOUNDARY = "▁"
PRINTABLE_ASCII = "".join(chr(code) for code in range(33, 127))
CLINICAL_CHARACTERS = "±≤≥°×·–—•→αβγμ"
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(BYTE_PIECES) + 2 * (len(PRINTABLE_ASCII) + 1)

# A piece never crosses one of these: an English contraction's tail, or a character that is neither letter nor mark
# (a digit, a punctuation mark, a symbol), each together with the word boundary before it.
ISOLATED = r"['](?:s|t|re|ve|ll|d|m)(?!\p{L})|▁?[^\p{L}\p{M}▁]"
QUOTES = (("[\u2018\u2019\u201b\u2032]", "'"), ("[\u201c\u201d\u201f\u2033]", '"'))


def untrained_tokenizer() -> Tokenizer:
    """Return the text pipeline around a Unigram model that has no pieces yet.

    Normaliser: NFKC, straight quotes, no invisible characters. Pre-tokenizer: words at white space, marked with "▁";
    digits, punctuation and symbols one by one. Decoder: bytes back to characters, "▁" back to a space.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\p{Cf}"), ""),
            normalizers.Replace(Regex(r"[\p{Cc}\p{Zs}]"), " "),
            *(normalizers.Replace(Regex(fancy), plain) for fancy, plain in QUOTES),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(ISOLATED), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_character_count: int = 20) -> Tokenizer:
    """Train the tokenizer.

    Args:
        texts: the training text, in pieces of any length; read once.
        vocab_size: number of tokens: the three special ones, 256 bytes, single characters and trained pieces. A text
            with too few different words gives a smaller vocabulary.
        min_character_count: a character seen less often is spelled as bytes and gets no piece.

    Returns:
        The tokenizer with pad 0, eos 1, unk 2, bytes 3 to 258 and the pieces after them from frequent to rare; it
        puts `</s>` after every text. Equal texts in equal order give equal files.

    Raises:
        ValueError: if `vocab_size` is too small to spell anything, or if there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for words beside bytes and characters; "
            f"use at least {SMALLEST_VOCABULARY} (8000 suits a small model)."
        )
    tokenizer = untrained_tokenizer()
    normalised = [tokenizer.normalizer.normalize_str(text) for text in texts]
    counts = Counter(character for text in normalised for character in text)
    counts.pop(" ", None)
    if not counts:
        raise ValueError("the training text is empty or blank; pass at least one text with words.")
    room = vocab_size - len(SPECIAL_TOKENS) - len(BYTE_PIECES)
    words = Counter(word for text in normalised for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    scores = train_unigram(words, _alphabet(counts, min_character_count, most=room // 2), room)
    tokenizer.model = _unigram_with_bytes(scores)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _alphabet(counts: Counter[str], minimum: int, most: int) -> set[str]:
    """Choose the characters that get a piece: the required ones, then the seen ones from frequent to rare."""
    required = dict.fromkeys(WORD_BOUNDARY + PRINTABLE_ASCII)
    seen = sorted(((-count, character) for character, count in counts.items() if count >= minimum))
    wanted = [*required, *CLINICAL_CHARACTERS, *(character for _, character in seen)]
    return set(list(dict.fromkeys(wanted))[:most])


def _unigram_with_bytes(scores: Mapping[str, float]) -> models.Unigram:
    """Return the model: special tokens, byte pieces that no other piece ever loses to, then the pieces."""
    lowest = min(scores.values()) - 10.0
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    vocabulary = [*((token, 0.0) for token in SPECIAL_TOKENS), *((piece, lowest) for piece in BYTE_PIECES), *pieces]
    return models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index("<unk>"), byte_fallback=True)


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the lines of UTF-8 text files, blank ones left out.

    Raises:
        FileNotFoundError: if a file does not exist; the message names it.
        ValueError: if a file is not UTF-8.
    """
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; name plain text files, one text a line.")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
        yield from (line for line in lines if line.strip())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 after a message on bad input."""
    parser = argparse.ArgumentParser(description="Train a shared tokenizer on plain text files, one text a line.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text, one text a line")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=8000, help="number of tokens (default 8000)")
    parser.add_argument("--max-length", type=int, default=DEFAULT_MODEL_MAX_LENGTH, help="longest source in tokens")
    options = parser.parse_args(arguments)
    try:
        backend = train_tokenizer(read_texts(options.files), options.vocab_size)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer = MambaFormerTokenizer(tokenizer_object=backend, model_max_length=options.max_length)
    tokenizer.save_pretrained(options.out)
    print(f"{len(tokenizer)} tokens written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
