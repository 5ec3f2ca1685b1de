# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What the documents say is so: files, commands, names, versions, and no figure that a run did not write."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import mambaformer
from mambaformer.benchmarks import report
from mambaformer.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "model_card.md", "docs/speed.md", "CONTRIBUTING.md", "CHANGELOG.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"\d[\d.,]*\s?(?:ms|milliseconds|seconds|minutes|MB|GB|%|×|tokens/s|parameters|times)(?!\w)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str, language: str | None = None) -> list[str]:
    return [body for kind, body in FENCE.findall(read(name)) if language is None or kind == language]


def commands() -> list[str]:
    lines = [line for name in DOCUMENTS for body in fences(name, "") for line in body.splitlines()]
    return [line.split(" #")[0].strip() for line in lines]


def test_every_file_in_the_tree_exists():
    tree = next(body for body in fences("README.md") if body.startswith("mambaformer/ "))
    room = ""
    for line in tree.splitlines():
        names = re.match(r"( *)([\w./-]+(?:, [\w./-]+)*) ", line)
        assert names, line
        if not names[1]:
            room = names[2]
            assert (ROOT / room).is_dir(), room
        else:
            missing = [name for name in names[2].split(", ") if not (ROOT / room / name).exists()]
            assert missing == [], room


def test_the_tree_has_every_room():
    tree = next(body for body in fences("README.md") if body.startswith("mambaformer/ "))
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^(\w+)/", tree, re.MULTILINE))


def test_commands_of_ours_parse():
    ours = [shlex.split(line)[1:] for line in commands() if line.startswith("mambaformer ")]
    ours = [arguments for arguments in ours if "-> " not in arguments and not arguments[0].startswith(("#", "/"))]
    assert len(ours) >= 5
    for arguments in ours:
        build_parser().parse_args(arguments)


def test_modules_and_files_in_commands_exist():
    modules = {word for line in commands() for word in re.findall(r"-m mambaformer\.([\w.]+)", line)}
    assert modules
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    paths = {
        word for line in commands() for word in line.split() if re.fullmatch(r"[\w/.-]+/[\w.-]+\.(?:py|yaml)", word)
    }
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_make_targets_exist():
    wanted = {
        word for name in DOCUMENTS for word in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", read(name), re.MULTILINE)
    }
    defined = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    assert {"setup", "demo", "test", "test-slow", "bench", "style"} <= defined
    assert wanted <= defined


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_are_python_and_use_public_names(name):
    for body in fences(name, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module == "mambaformer":
                assert {alias.name for alias in node.names} <= set(mambaformer.__all__)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#]+)\)", read(name))
    missing = [
        target for target in targets if "://" not in target and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_no_figure_stands_outside_of_the_blocks(name):
    text = FENCE.sub("", report.BLOCK.sub("", read(name)))
    assert FIGURE.findall(text) == []


def test_the_blocks_say_what_the_results_say():
    assert [path.name for path, _ in report.stale()] == []


def test_the_card_has_metadata_for_the_hub():
    _, header, body = read("model_card.md").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == "apache-2.0"
    assert card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "text2text-generation"
    assert "Not medical advice" in body


def test_versions_agree():
    version = mambaformer.__version__
    assert re.search(rf'^version = "{re.escape(version)}"$', read("pyproject.toml"), re.MULTILINE)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert f"## {version}" in read("CHANGELOG.md")


def test_every_direct_dependency_is_pinned():
    text = read("pyproject.toml")
    sections = re.findall(r"^(?:dependencies|demo|train|dev) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    needed = {name.lower() for part in sections for name in re.findall(r'"([\w-]+)(?:[><=~]|")', part)}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))
    assert len(sections) == 4
    assert {name for name in needed if name not in {key.lower() for key in pinned}} == {"mambaformer"} & needed
    assert pinned["torch"] == "2.13.0"


# ---- the report itself


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_a_table_is_filled_from_its_result_and_the_rest_is_kept(results):
    text = "before\n<!-- begin: some-table -->\nold | 9\n<!-- end -->\nafter\n"
    (results / "some_table.json").write_text('{"columns": ["what", "ms"], "rows": [["a|b", 12.345], ["c", 2]]}')
    filled = report.fill(text)
    assert "| what | ms |\n| --- | ---: |\n| a/b | 12.3 |\n| c | 2 |\n" in filled
    assert filled.startswith("before\n<!-- begin: some-table -->\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled) == filled


def test_a_block_without_results_claims_nothing(results):
    text = "<!-- begin: embedded-scores -->\n| 0.99 |\n<!-- end -->\n# begin: model-index\nmodel-index: 1\n# end\n"
    filled = report.fill(text)
    assert "0.99" not in filled and "Not measured in this checkout" in filled
    assert "# begin: model-index\n# end\n" in filled


def test_scores_and_answers_of_the_embedded_model(results):
    result = {
        "machine": {"date": "2026-01-02", "processor": "P", "cores": 2, "python": "3.11", "versions": {"torch": "2"}},
        "split": "test_phrasing",
        "rows": 3,
        "seed": 0,
        "et5_share": 0.04,
        "passes_per_answer": 1.5,
        "et5_tokens_per_answer": 20.25,
        "encoder_calls_per_answer": 0.5,
        "token_f1": {"auto": 0.5, "emamba": 0.4, "et5": 0.6},
        "content": {name: {"right_concept": 0.9, "facts_found": 0.25} for name in ("auto", "emamba", "et5")},
        "seconds_median": {"auto": 0.1, "emamba": 0.05, "et5": 0.2},
        "answers": [{"question": "Why?", "answer": "Because.", "gold": "So.", "share": 0.0}],
    }
    (results / "embedded_answers.json").write_text(json.dumps(result))
    scores = report.render("embedded-scores")
    assert (
        "| MambaFormer, routed | 0.500 | 90% | 25% | 100 ms |" in scores
        and "4.0%" in scores
        and "2026-01-02" in scores
    )
    assert "> **Why?** Because." in report.render("embedded-answers")
    index = yaml.safe_load(report.render("model-index"))["model-index"][0]["results"][0]
    assert [metric["value"] for metric in index["metrics"]] == [0.5, 0.4, 0.6]
