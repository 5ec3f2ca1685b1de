# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What goes beside the weights: the card, the Inference Endpoints handler, the Space."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_tokenizer import tiny_tokenizer

from mambaformer.hub.app import highlights, summary
from mambaformer.hub.bundle import write_endpoint, write_space
from mambaformer.hub.cards import read_facts, write_model_card

FACTS = {
    "name": "tiny",
    "description": "Two tiny experts.",
    "base_model": ["somebody/et5", "somebody/emamba"],
    "datasets": ["somebody/dental"],
    "tags": ["dental"],
    "training": {"stages": 2},
    "limits": "English only; see 5 $ of text.",
    "results": [{"dataset": "DentalQA", "split": "test", "metric": "rougeL", "value": 0.123456}],
}


def test_card_holds_facts_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
    more = {"results": [{"dataset": "DentalQA", "metric": "seconds", "value": 2}], "limits": "English only."}
    (tmp_path / "more.json").write_text(json.dumps(more), encoding="utf-8")
    card = ModelCard.load(write_model_card(tmp_path, read_facts(tmp_path / "facts.json", tmp_path / "more.json")))
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text2text-generation" and data["base_model"] == FACTS["base_model"]
    assert data["datasets"] == FACTS["datasets"] and {"dental", "mambaformer"} <= set(data["tags"])
    assert [result.metric_value for result in card.data.eval_results] == [0.123456, 2]
    assert "| DentalQA | test | rougeL | 0.1235 |" in card.text and "| EMamba | `somebody/emamba` |" in card.text
    assert "English only." in card.text and "not medical advice" in card.text and "$" not in card.text


def test_card_without_results_says_so(tmp_path: Path) -> None:
    facts = {name: value for name, value in FACTS.items() if name not in ("results", "training")}
    text = write_model_card(tmp_path, facts).read_text(encoding="utf-8")
    assert "None were measured" in text and "model-index" not in text and "5 $ of text" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"limits": ""}, "needs limits"),
        ({"results": [{"dataset": "x", "metric": "y", "value": "0.5"}]}, "a number as value"),
        ({"results": [{"dataset": "x", "value": 1}]}, "is incomplete"),
    ],
)
def test_card_refuses_what_is_no_fact(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_model_card(tmp_path, FACTS | change)


def test_handler_answers_from_its_folder(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    handler, requirements = write_endpoint(tmp_path)
    assert "transformers<" in requirements.read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("handler", handler)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.EndpointHandler(str(tmp_path))
    data = {"inputs": {"question": "What is plaque?"}, "parameters": {"max_new_tokens": 4, "return_route": True}}
    [result] = json.loads(json.dumps(answer(data)))
    assert (
        result["generated_text"]
        == answer({"inputs": "What is plaque?", "parameters": {"max_new_tokens": 4}})[0]["generated_text"]
    )
    assert (
        summary(result).startswith("ET5 wrote ")
        and "".join(text for text, _ in highlights(result["route"])) == (result["generated_text"])
    )
    for wrong in ({}, {"inputs": "x", "parameters": [1]}):
        with pytest.raises(ValueError, match="send"):
            answer(wrong)


def test_space_needs_no_package(tmp_path: Path) -> None:
    app, requirements = write_space(tmp_path / "space")
    assert "gradio" in requirements.read_text(encoding="utf-8")
    assert "mambaformer" not in app.read_text(encoding="utf-8").replace("MambaFormer", "")
    assert highlights([{"token": "a", "expert": "et5"}, {"token": "", "expert": "emamba"}]) == [("a", "ET5")]
