# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The shipped DentalQA: its sources, its files, its lexicon."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest

from mambaformer.dental_qa import data_dir, load_dental_qa
from mambaformer.dental_qa.check import all_problems, compare_with_reference
from mambaformer.dental_qa.fact_checks import check_facts
from mambaformer.dental_qa.lexicon import counts, load_lexicon, log_odds
from mambaformer.dental_qa.lexicon import main as write_lexicon
from mambaformer.dental_qa.loading import load_concepts
from mambaformer.dental_qa.reference_text import missing
from mambaformer.dental_qa.schema import SPLITS, Problem


@pytest.fixture(scope="module")
def sources():
    return load_concepts()


def test_sources_follow_the_schema(sources) -> None:
    concepts, problems = sources
    assert list(map(str, problems)) == []
    assert len(concepts) >= 400 and len({concept.field for concept in concepts}) >= 16
    assert all(len(concept.aspects) >= 5 for concept in concepts)


def test_facts_keep_to_the_rules(sources) -> None:
    assert list(map(str, check_facts(sources[0]))) == []


def test_facts_share_no_8_words_with_other_text_and_are_spelt_well(sources, shared_data) -> None:
    if missing(shared_data):
        pytest.skip("MedQuAD or PubMedQA is absent")
    assert list(map(str, compare_with_reference(sources[0], shared_data))) == []


def test_absent_reference_text_is_said(sources, tmp_path) -> None:
    (line,) = compare_with_reference(sources[0], tmp_path)
    assert str(line).startswith("skipped overlap and spelling")


def test_shipped_data_loads_from_any_folder(tmp_path) -> None:
    from datasets import load_dataset

    shutil.copytree(data_dir(), tmp_path / "elsewhere")
    data = load_dataset(str(tmp_path / "elsewhere"), cache_dir=str(tmp_path / "cache"))
    sizes = {split: len(data[split]) for split in data}
    assert sum(sizes.values()) >= 4000 and set(sizes) == set(SPLITS)
    card = (data_dir() / "README.md").read_text(encoding="utf-8")
    assert all(f"| {split} | {size:,} |" in card for split, size in sizes.items())
    assert sum(path.stat().st_size for path in data_dir().iterdir()) < 6e6


def test_shipped_splits_keep_concepts_and_texts_apart() -> None:
    """By plain sets; near-duplicates are looked for in the slow test below."""
    data = {split: load_dental_qa(split)[:] for split in SPLITS}
    unseen = set(data["test_concept"]["concept"])
    for split in ("train", "validation", "test_phrasing"):
        assert unseen.isdisjoint(data[split]["concept"])
    for part in ("question", "answer"):
        owner = Counter(text for split in SPLITS for text in {text.lower() for text in data[split][part]})
        assert [text for text, count in owner.items() if count > 1] == []


@pytest.mark.slow
def test_shipped_data_passes_every_check() -> None:
    """Builds the data set again, compares, looks for leaks and near-duplicates."""
    assert [str(problem) for problem in all_problems() if isinstance(problem, Problem)] == []


def test_log_odds_by_hand() -> None:
    """Equal rates weigh 0, swapped texts change the sign, and the formula is the documented one."""
    dental, general = counts(["gum gum gum the the"]), counts(["heart heart heart the the"])
    weights = log_odds(dental, general)
    assert weights["the"] == 0
    assert weights["gum"] == pytest.approx(
        math.log((3 + 1) / (5 + 3 - 3 - 1)) - math.log((0 + 1) / (5 + 3 - 0 - 1)), abs=5e-4
    )
    assert log_odds(general, dental)["heart"] == weights["gum"]
    assert "heart" not in weights  # never in the first text, and too rare in the second
    with pytest.raises(ValueError, match="5 and 0"):
        log_odds(dental, Counter())


def test_more_sightings_weigh_more_and_numbers_are_left_out() -> None:
    general = counts(["word " * 1000])
    weights = log_odds(counts(["gum " * 50 + "pulp " * 2 + "word " * 50 + "5 5 5"]), general)
    assert weights["gum"] > weights["pulp"] > 0 > weights["word"]
    assert "5" not in weights


def test_shipped_lexicon_tells_dental_words() -> None:
    lexicon = load_lexicon()
    assert 2000 < len(lexicon) < 10000
    assert min(lexicon[word] for word in ("tooth", "gum", "caries", "enamel", "dentine")) > 2
    assert max(lexicon[word] for word in ("gene", "cancer", "your")) < -1
    assert abs(lexicon["of"]) < 1
    assert all(round(weight, 3) == weight for weight in lexicon.values())


def test_lexicon_without_its_text_says_what_is_missing(tmp_path, capsys) -> None:
    assert write_lexicon(["--reference", str(tmp_path), "--out", str(tmp_path / "x.json")]) == 1
    assert "medquad.jsonl.xz does not exist" in capsys.readouterr().err
