# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The DentalQA builder on a small made-up set of concepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_dental_qa import documents, write

from mambaformer.dental_qa import load_dental_qa
from mambaformer.dental_qa.build import main as build
from mambaformer.dental_qa.compose import Composer
from mambaformer.dental_qa.dataset import build_rows, read_rows
from mambaformer.dental_qa.loading import load_concepts
from mambaformer.dental_qa.row_checks import check_rows
from mambaformer.dental_qa.schema import COLUMNS, SPLITS
from mambaformer.dental_qa.splitting import choose_held_out, mentions, plan


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    found, problems = load_concepts(write(tmp_path_factory.mktemp("concepts")))
    assert problems == []
    return found


@pytest.fixture(scope="module")
def held_out(concepts) -> list[str]:
    return choose_held_out(concepts)


@pytest.fixture(scope="module")
def rows(concepts, held_out):
    return build_rows(concepts, held_out)[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    assert build(["--concepts", str(write(folder / "concepts")), "--out", str(folder / "data")]) == 0
    return folder / "data"


def test_rows_pass_every_check(concepts, rows, held_out) -> None:
    assert list(map(str, check_rows(concepts, rows, held_out))) == []


def test_every_split_has_rows(rows) -> None:
    assert set(Counter(row.split for row in rows)) == set(SPLITS)


def test_training_asks_each_fact_alone_in_several_wordings(concepts, rows, held_out) -> None:
    asked = Counter(
        (row.concept, row.aspect) for row in rows if row.split == "train" and row.length_class == "short_simple"
    )
    for concept in concepts:
        for aspect in concept.aspects:
            if concept.id not in held_out:
                assert asked[concept.id, aspect] >= 5, (concept.id, aspect)


def test_building_twice_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build(["--concepts", str(built.parent / "concepts"), "--out", str(tmp_path)])
    for path in built.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_load_dataset_needs_no_script(built: Path, rows, tmp_path: Path) -> None:
    from datasets import load_dataset

    data = load_dataset(str(built), cache_dir=str(tmp_path))
    assert set(data) == set(SPLITS)
    assert tuple(data["train"].column_names) == COLUMNS
    assert {split: len(data[split]) for split in SPLITS} == Counter(row.split for row in rows)


def test_what_is_read_is_what_was_built(built: Path, rows) -> None:
    assert read_rows(built) == rows
    assert load_dental_qa("test_long", built)[0]["context"]


def test_unknown_split_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dev' does not exist"):
        load_dental_qa("dev")
    with pytest.raises(FileNotFoundError, match=r"dental_qa\.build"):
        load_dental_qa("train", tmp_path)


def test_a_new_concept_moves_no_other_rows(concepts, rows, held_out) -> None:
    """Except by its facts in other concepts' passages."""
    fewer = build_rows(concepts[:-1], held_out)[0]
    gone = concepts[-1].id
    assert [row for row in fewer if not row.context] == [r for r in rows if r.concept != gone and not r.context]


def test_reserved_compositions_do_not_meet(concepts) -> None:
    chosen = plan(concepts[0], held_out=False)
    pairs = [pair for split in chosen.pairs.values() for pair in split]
    assert len(pairs) == len(set(pairs)) > 10
    assert set(chosen.triples["train"]).isdisjoint(chosen.triples["test_phrasing"])


def test_held_out_concepts_are_named_by_nobody(concepts, held_out) -> None:
    named = mentions(concepts)
    assert held_out and len({concept.field for concept in concepts if concept.id in held_out}) == 2
    assert all(named[concept_id] <= set(held_out) for concept_id in held_out)


def test_held_out_choice_is_kept(concepts, held_out) -> None:
    other = next(c.id for c in concepts if c.id not in held_out and not mentions(concepts)[c.id])
    assert other in choose_held_out(concepts, keep=[other])


def test_probe_asks_training_facts_in_test_wordings(concepts, rows, held_out) -> None:
    probes = Composer(concepts, held_out).probe(20)
    trained = {row.answer for row in rows if row.split == "train"}
    assert len(probes) == 20 and all(row.answer in trained for row in probes)
    assert {row.question for row in probes}.isdisjoint(row.question for row in rows if row.split == "train")


def broken(change) -> dict:
    content = documents()
    change(content["northern"]["concepts"])
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[2].update(id="Not Snake"), "not snake_case"),
        (lambda c: c[2].update(colour="red"), "unknown key 'colour'"),
        (lambda c: c[2].update(plural="no"), "plural is 'no'"),
        (lambda c: c[2].update(aliases="gum"), "aliases is 'gum'"),
        (lambda c: c[2]["facts"].update(cost=["It is dear."]), "unknown aspect 'cost'"),
        (lambda c: c[2]["facts"].update(causes="one"), "list of one or two sentences"),
        (lambda c: c[2]["facts"].pop("definition"), "no definition"),
        (lambda c: [c[2]["facts"].pop(a) for a in ("causes", "symptoms")], "at least 5"),
        (lambda c: c[2].update(id=c[3]["id"]), "already used"),
        (lambda c: c[2].update(neighbour="nobody"), "'nobody' is no concept"),
        (lambda c: c[2].update(aliases=c[3]["aliases"]), "it asks two questions"),
    ],
)
def test_a_wrong_concept_is_reported(tmp_path: Path, capsys, change, message: str) -> None:
    folder = write(tmp_path / "concepts", broken(change))
    _, problems = load_concepts(folder)
    assert any(message in str(problem) for problem in problems), problems
    assert build(["--concepts", str(folder), "--out", str(tmp_path / "data"), "--strict"]) == 1
    assert message in capsys.readouterr().err


def test_an_unreadable_file_is_reported_and_the_others_are_built(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "northern.yaml").write_text("concepts: [", encoding="utf-8")
    concepts, problems = load_concepts(folder)
    assert {concept.field for concept in concepts} == {"southern"}
    assert "northern.yaml: is not readable YAML" in str(problems[0])


def test_a_handful_of_concepts_is_enough(tmp_path: Path) -> None:
    content = documents()
    concepts, _ = load_concepts(
        write(tmp_path, {"southern": {**content["southern"], "concepts": content["southern"]["concepts"][2:5]}})
    )
    rows, _ = build_rows(concepts, [])
    assert list(check_rows(concepts, rows, [])) == []
    assert {row.split for row in rows} == set(SPLITS) - {"test_concept"}


def test_no_concept_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no \\*.yaml"):
        load_concepts(tmp_path)
