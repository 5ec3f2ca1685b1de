# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Training a tokenizer: it repeats itself exactly, spells everything and decodes to clean text."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from mambaformer.tokenizer.vocabulary_transfer import unspellable
from mambaformer.trainer.train_tokenizer import SMALLEST_VOCABULARY, main, train_tokenizer
from mambaformer.trainer.unigram_training import train_unigram

COMMON = (
    "brush your teeth twice daily with fluoride toothpaste plaque gums gingivitis enamel caries floss between molar"
)
RARER = "dentist crown implant saliva sugar acid bleeding swollen cleaning mouthwash sealant braces retainer cavity"
WORDS = [*COMMON.split(), *RARER.split()]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up text whose words are of very different frequency."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    return [
        " ".join(draw.choices(WORDS, weights, k=draw.randint(4, 12))).capitalize()
        + draw.choice([".", "?", " (2.5%)."])
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> MambaFormerTokenizer:
    return MambaFormerTokenizer(tokenizer_object=train_tokenizer(sentences(400), 700))


def test_layout_of_the_vocabulary(tokenizer: MambaFormerTokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<pad>", "</s>", "<unk>", "<0x00>", "<0xFF>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("Floss.")["input_ids"][-1] == 1
    assert len(tokenizer) <= 700


def test_frequent_words_are_single_tokens(tokenizer: MambaFormerTokenizer) -> None:
    """Also those that no other word contains, which a count over distinct words would miss."""
    assert tokenizer.tokenize("brush your teeth twice daily") == ["▁brush", "▁your", "▁teeth", "▁twice", "▁daily"]


def test_digits_and_punctuation_stand_alone(tokenizer: MambaFormerTokenizer) -> None:
    pieces = [piece.strip("▁") for piece in tokenizer.tokenize("teeth 1945, (30%)... 2.5mg")]
    assert [piece for piece in pieces if piece] == [
        *("teeth", "1", "9", "4", "5", ",", "(", "3", "0", "%", ")", ".", ".", ".", "2", ".", "5", "m", "g"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Don't brush at once: wait 30 minutes (pH < 5.5), the dentist's advice.",
        'A "deep" pocket is ≥ 4 mm; 12.5 ± 0.3 mg/L; β-lactam, 37 °C → 95% CI.',
        "Well-being, yes/no? Wait... done!",
        "日本語 and 😀 and Ω and œ are spelled as bytes",
        "2024-01-31: $5 & #3 @ 50%, [x] {y} a_b ~c^d |e\\f `g` * + =",
        "",
    ],
)
def test_decoding_gives_the_text_back(tokenizer: MambaFormerTokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_made_up_sentences_round_trip(tokenizer: MambaFormerTokenizer) -> None:
    texts = sentences(200, seed=9)
    ids = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == texts
    assert sum(map(len, ids)) < 2.5 * sum(len(text.split()) for text in texts)


def test_normalisation(tokenizer: MambaFormerTokenizer) -> None:
    def written(text: str) -> str:
        return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)

    assert written("  two \t spaces\nand\u00a0lines ") == "two spaces and lines"
    assert written("“curly” ‘quotes’ it’s") == "\"curly\" 'quotes' it's"
    assert written("ﬁlling, m², 5\u200b0, bro\u00adken") == "filling, m2, 50, broken"


def test_nothing_is_unspellable(tokenizer: MambaFormerTokenizer) -> None:
    assert unspellable(tokenizer, "<>±≥≤β°µ×{}\\^~|`é日😀\U0010ffff") == []


def test_written_byte_piece_is_text(tokenizer: MambaFormerTokenizer) -> None:
    assert tokenizer.decode(tokenizer("code <0x41> here")["input_ids"], skip_special_tokens=True) == "code <0x41> here"


COMMAND = """
import hashlib, sys
from test_train_tokenizer import sentences
from mambaformer.trainer.train_tokenizer import train_tokenizer
print(hashlib.sha256(train_tokenizer(sentences(400), 700).to_str().encode()).hexdigest())
"""


def test_same_text_gives_the_same_file_in_another_process() -> None:
    """Hash seeds differ between processes, so an order taken from a set or a hash map would show."""
    expected = hashlib.sha256(train_tokenizer(sentences(400), 700).to_str().encode()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip() == expected, done.stderr[-2000:]
    assert hashlib.sha256(train_tokenizer(sentences(399), 700).to_str().encode()).hexdigest() != expected


def test_command_writes_a_loadable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(300)), encoding="utf-8")
    for name in ("a", "b"):
        out = str(tmp_path / name)
        assert main(["--out", out, "--vocab-size", "600", "--max-length", "64", str(tmp_path / "text.txt")]) == 0
    assert "tokens written" in capsys.readouterr().out
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = MambaFormerTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.model_max_length == 64
    assert tokenizer.decode(tokenizer("Teeth, gums.")["input_ids"]) == "Teeth, gums.</s>"


def test_command_on_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "blank").write_text(" \n")
    for name, said in (("absent", "absent is not a file"), ("latin", "not UTF-8"), ("blank", "empty or blank")):
        assert main(["--out", str(tmp_path / "out"), str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=f"vocab_size=300.*at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(sentences(5), 300)


def test_unigram_pieces_and_scores() -> None:
    scores = train_unigram({"▁teeth": 90, "▁tooth": 60, "▁teething": 9, "qq": 1}, sorted("▁tehoingq"), 12)
    assert len(scores) == 12
    assert {"▁teeth", "▁tooth"} <= set(scores)
    assert all(score < 0 for score in scores.values())
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    with pytest.raises(ValueError, match="size=3"):
        train_unigram({"teeth": 1}, "teh ", 3)
