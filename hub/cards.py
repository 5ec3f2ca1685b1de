# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The model card, filled from facts.

    python -m mambaformer.hub.cards FOLDER FACTS.json…

No number of a card is written by hand: results come from the JSON files that the evaluation and the benchmarks write.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TAGS = ["mambaformer", "mamba", "t5", "mixture-of-experts", "token-level-routing"]
REQUIRED = ("name", "description", "base_model", "limits")
ABSENT = "None were measured for this checkpoint."


def read_facts(*files: str | os.PathLike) -> dict:
    """
    Return the facts of several JSON files as one dict; lists of the same name are joined, else the last file counts.

    Raises:
        ValueError: for a file that does not hold a JSON object.
    """
    facts: dict = {}
    for file in files:
        try:
            read = json.loads(Path(file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}): write it again.") from error
        if not isinstance(read, dict):
            raise ValueError(f"{file} holds a {type(read).__name__}: facts are a JSON object.")
        for name, value in read.items():
            facts[name] = facts[name] + value if isinstance(value, list) and name in facts else value
    return facts


def write_model_card(folder: str | os.PathLike, facts: dict) -> Path:
    """
    Write `README.md` with its metadata into `folder`.

    Args:
        folder: of the saved model.
        facts: `name`, `description`, `base_model` (the experts' checkpoints, ET5's first) and `limits` are needed.
            Optional are `repo_id` (default `name`), `question` (an example), `language` (default "en"), `license`
            (default "apache-2.0"), `datasets`, `tags`, `training` (a dict, shown as a table) and `results`: a list of
            `{"dataset", "metric", "value"}` with perhaps `split` and `dataset_id`, numbers as they were measured.

    Returns:
        the path of the card.

    Raises:
        ValueError: for facts that are missing, or a result that is no number.
    """
    missing = [name for name in REQUIRED if not facts.get(name)]
    if missing:
        raise ValueError(f"the model card needs {', '.join(missing)}: add them to the JSON file of facts.")
    results = facts.get("results", [])
    for result in results:
        if not isinstance(result.get("value"), (int, float)) or not {"dataset", "metric"} <= set(result):
            raise ValueError(f"the result {result} is incomplete: give dataset, metric and a number as value.")
    metadata = ModelCardData(
        language=facts.get("language", "en"),
        license=facts.get("license", "apache-2.0"),
        library_name="transformers",
        pipeline_tag="text2text-generation",
        base_model=list(facts["base_model"]),
        datasets=facts.get("datasets"),
        metrics=sorted({result["metric"] for result in results}) or None,
        tags=sorted({*TAGS, *facts.get("tags", [])}),
        model_name=facts["name"],
        eval_results=[_evaluation(result) for result in results] or None,
    )
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=facts["name"],
        description=facts["description"],
        repo_id=facts.get("repo_id", facts["name"]),
        question=facts.get("question", "How often should I floss?"),
        experts=_rows(zip(("ET5", "EMamba"), (f"`{base}`" for base in facts["base_model"]), strict=False)),
        results=_results(results) if results else ABSENT,
        training=_table(("setting", "value"), facts["training"].items()) if facts.get("training") else "Not recorded.",
        limits=facts["limits"],
    )
    card = Path(folder) / "README.md"
    card.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}", encoding="utf-8", newline="\n")
    return card


def _evaluation(result: dict) -> EvalResult:
    return EvalResult(
        task_type="text2text-generation",
        dataset_type=result.get("dataset_id", result["dataset"]),
        dataset_name=result["dataset"],
        dataset_split=result.get("split"),
        metric_type=result["metric"],
        metric_value=result["value"],
    )


def _results(results: Sequence[dict]) -> str:
    rows = [(r["dataset"], r.get("split", ""), r["metric"], f"{r['value']:.4g}") for r in results]
    return _table(("data set", "split", "metric", "value"), rows)


def _table(head: Sequence[str], rows) -> str:
    return f"{_rows([head, ['---'] * len(head)])}\n{_rows(rows)}"


def _rows(rows) -> str:
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


if __name__ == "__main__":
    print(write_model_card(sys.argv[1], read_facts(*sys.argv[2:])))
