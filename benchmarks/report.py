# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Fill the figures of README.md, model_card.md and docs/: nobody types a number there.

    python -m mambaformer.benchmarks.report            rewrite the marked blocks
    python -m mambaformer.benchmarks.report --check    exit code 1 where a block is not what the results say

A block stands between `<!-- begin: NAME -->` and `<!-- end -->`, or in YAML between `# begin: NAME` and `# end`. Its
text comes from the renderer registered as NAME below. A NAME without one is a table: `benchmarks/results/NAME.json`
(with underscores for hyphens) then has `columns` (a list of headings) and `rows` (lists of texts or numbers), perhaps
`note` (a sentence) and `command` (how it was measured). A block without results says how to measure them.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
EMBEDDED = ROOT / "mambaformer" / "embedded"
DOCUMENTS = ("README.md", "model_card.md", "docs/speed.md")
BLOCK = re.compile(
    r"(?P<begin>^(?:<!-- begin: (?P<html>[\w-]+) -->|# begin: (?P<yaml>[\w-]+))\n)(?P<body>.*?)"
    r"(?P<end>^(?:<!-- end -->|# end)$)",
    re.MULTILINE | re.DOTALL,
)
ROUTINGS = {"auto": "MambaFormer, routed", "emamba": "EMamba alone", "et5": "ET5 alone"}
CONTENT = {"right_concept": "On the right concept", "facts_found": "Facts found"}
README_ANSWERS = 5

Result = dict[str, Any]
RENDERERS: dict[str, tuple[str, Callable[[Result], str]]] = {}


def renders(name: str, result: str) -> Callable[[Callable[[Result], str]], Callable[[Result], str]]:
    """Register the renderer of the block `name`, which is given `benchmarks/results/<result>.json`."""

    def register(function: Callable[[Result], str]) -> Callable[[Result], str]:
        RENDERERS[name] = (result, function)
        return function

    return register


def table(columns: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; numbers stand to the right."""
    numeric = [all(isinstance(row[at], int | float) for row in rows) for at in range(len(columns))]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def provenance(result: Result) -> str:
    """The sentence that says where and when a result was measured."""
    machine = result.get("machine")
    if not machine:
        return ""
    versions = machine.get("versions", {})
    by = f" with `{result['command']}`" if result.get("command") else ""
    vectors = f"{machine['vectors']}, " if machine.get("vectors") else ""
    return (
        f"\nMeasured on {machine['date']}{by}: {machine['processor']}, {vectors}{machine['cores']} cores, Python "
        f"{machine['python']}, torch {versions.get('torch', '?')}, transformers {versions.get('transformers', '?')}.\n"
    )


def any_table(result: Result) -> str:
    """A result that brings its own `columns` and `rows`."""
    note = f"\n{result['note']}\n" if result.get("note") else ""
    return table(result["columns"], result["rows"]) + note + provenance(result)


def answers(result: Result, number: int | None = None) -> str:
    """Questions with the model's answer, in the order of the sample: nothing is picked."""
    lines = []
    for item in result["answers"][:number]:
        lines.append(f"> **{item['question'].strip()}** {item['answer'].strip()}\n")
    return (
        f"The first {len(lines)} of a random sample of the split `{result['split']}` (seed {result['seed']}), not "
        "picked by hand:\n\n" + ">\n".join(lines)
    )


@renders("embedded-answers", "embedded_answers")
def first_answers(result: Result) -> str:
    """A few answers, for the README."""
    return answers(result, README_ANSWERS)


@renders("embedded-answers-all", "embedded_answers")
def all_answers(result: Result) -> str:
    """All answers that the result keeps, for the card."""
    return answers(result)


@renders("embedded-scores", "embedded_answers")
def scores(result: Result) -> str:
    """Quality, time and what ET5 cost, by routing."""
    rows: list[list[object]] = [
        [
            name,
            f"{result['token_f1'][routing]:.3f}",
            *(f"{result['content'][routing][kind]:.0%}" for kind in CONTENT),
            f"{1000 * result['seconds_median'][routing]:.0f} ms",
        ]
        for routing, name in ROUTINGS.items()
        if routing in result["token_f1"]
    ]
    cost = (
        f"\n{result['rows']} questions of the split `{result['split']}`. Routed, ET5 wrote {result['et5_share']:.1%} "
        f"of the tokens. An answer took {result['passes_per_answer']:.2f} of its decoder passes, over "
        f"{result['et5_tokens_per_answer']:.1f} positions, and {result['encoder_calls_per_answer']:.2f} encoder "
        "calls.\n"
    )
    return (
        table(["Answers by", "Token F1", *CONTENT.values(), "Median time an answer"], rows) + cost + provenance(result)
    )


def part_of(part: str) -> Callable[[Result], str]:
    """Renders the table that stands as `part` in a result, beside its first one."""
    return lambda result: any_table({**result[part], "machine": result["machine"], "command": result["command"]})


for latency_part in ("targets", "parts", "et5", "throughput", "scaling"):
    renders(f"latency-{latency_part}", "latency")(part_of(latency_part))
    renders(f"latency-long-{latency_part}", "latency_long")(part_of(latency_part))
    renders(f"latency-avx2-{latency_part}", "latency_avx2")(part_of(latency_part))


@renders("model-index", "embedded_answers")
def model_index(result: Result) -> str:
    """The card's machine-readable scores, as YAML."""
    lines = ["model-index:", "- name: mambaformer-embedded", "  results:", "  - task:"]
    lines += ["      type: text2text-generation", "    dataset:", "      name: DentalQA", "      type: dental_qa"]
    lines += [f"      split: {result['split']}", "    metrics:"]
    for routing, name in ROUTINGS.items():
        if routing in result["token_f1"]:
            lines += [
                f"    - name: Token F1 ({name})",
                "      type: token_f1",
                f"      value: {result['token_f1'][routing]:.4f}",
            ]
    return "\n".join(lines) + "\n"


def embedded_size(folder: Path = EMBEDDED) -> str | None:
    """Parameters and size of the embedded model, read from its files; `None` where it is not there."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return None
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    sizes = {"et5": 0, "emamba": 0, "router": 0, "look_ahead_heads": 0}
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] != "I64":  # ids
            part = name.split(".")[0]
            sizes[part if part in sizes else "router"] += prod(tensor["shape"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    rows: list[list[object]] = [
        ["ET5", f"T5, {config['et5']['num_layers']} encoder and {config['et5']['num_decoder_layers']} decoder layers"],
        ["EMamba", f"Mamba, {config['emamba']['num_hidden_layers']} layers"],
        ["Router and sequence gate", "small multi-layer perceptrons"],
        ["Look-ahead heads", "a small recurrent network, for `look_ahead` alone"],
    ]
    for row, part in zip(rows, sizes, strict=True):
        row.append(f"{sizes[part]:,}")
    return (
        table(["Part", "What it is", "Parameters"], [row for row in rows if row[-1] != "0"])
        + f"\nThe folder takes {total / 1e6:.1f} MB; the shared vocabulary has {config['et5']['vocab_size']:,} rows.\n"
    )


def render(name: str) -> str:
    """
    The text of the block `name`.

    Raises:
        KeyError: the result file lacks a field that the block shows.
    """
    if name == "embedded-size":
        return embedded_size() or "The embedded model is not in this checkout.\n"
    stem, renderer = RENDERERS.get(name, (name.replace("-", "_"), any_table))
    path = RESULTS / f"{stem}.json"
    if not path.exists():
        return (
            ""
            if name == "model-index"
            else f"Not measured in this checkout: `python -m mambaformer.benchmarks.{stem}`.\n"
        )
    return renderer(json.loads(path.read_text(encoding="utf-8")))


def fill(text: str) -> str:
    """`text` with every block rewritten; all else stays as it is."""
    return BLOCK.sub(lambda block: block["begin"] + render(block["html"] or block["yaml"]) + block["end"], text)


def stale() -> Iterator[tuple[Path, str]]:
    """The documents whose blocks are not what the results say, each with its right text."""
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            yield path, filled


def main() -> int:
    """Rewrite the documents, or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fill the figures of README.md, model_card.md and docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where a block is stale")
    check = parser.parse_args().check
    changed = list(stale())
    for path, text in changed:
        print(f"{path.name} {'is stale: run make report' if check else 'rewritten'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
