# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The text2text-generation pipeline: what goes in, what comes out, and that batching and padding change nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import tiny_et5
from tiny_tokenizer import tiny_tokenizer
from transformers import pipeline

from mambaformer.pipelines.pipeline_mambaformer import MambaFormerText2TextPipeline, token_texts
from mambaformer.pipelines.source_inputs import source_ids, source_text
from mambaformer.tokenizer.source_format import format_source

QUESTIONS = ["What is plaque?", "Why do the gums bleed after flossing?", "teeth"]
OPTIONS = {"max_new_tokens": 10, "expert_budget": 0.5}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def ask(model, tokenizer) -> MambaFormerText2TextPipeline:
    return pipeline("text2text-generation", model=model, tokenizer=tokenizer)


def answer_by_hand(ask, text: str, **options) -> str:
    ids = ask.tokenizer(text, return_tensors="pt")
    return ask.tokenizer.decode(ask.model.generate(**ids, **OPTIONS, **options)[0], skip_special_tokens=True)


def test_the_task_is_back_for_objects_and_folders(ask, model, tokenizer, tmp_path) -> None:
    assert type(ask) is MambaFormerText2TextPipeline
    ask.save_pretrained(tmp_path)
    reloaded = pipeline("text2text-generation", model=str(tmp_path))
    assert type(reloaded) is MambaFormerText2TextPipeline
    assert reloaded(QUESTIONS[0], **OPTIONS) == ask(QUESTIONS[0], **OPTIONS)


def test_forms_of_a_question(ask) -> None:
    by_hand = answer_by_hand(ask, "question: What is plaque?")
    for form in (
        "What is plaque?",
        " what is  plaque? ",
        "question: What is plaque?",
        {"question": "What is plaque?"},
    ):
        assert ask(form, **OPTIONS) == [{"generated_text": by_hand}]
    with_context = answer_by_hand(ask, "context: a film of bacteria question: What is plaque?")
    given = {"question": "What is plaque?", "context": "a film of bacteria"}
    assert ask(given, **OPTIONS) == [{"generated_text": with_context}]
    assert ask("context: a film of bacteria question: What is plaque?", **OPTIONS)[0]["generated_text"] == with_context
    assert ask([given, QUESTIONS[0]], **OPTIONS) == [{"generated_text": with_context}, {"generated_text": by_hand}]
    assert ask([]) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_change_no_answer(ask, side: str) -> None:
    alone = [ask(question, return_route=True, **OPTIONS)[0] for question in QUESTIONS]
    ask.tokenizer.padding_side = side
    assert ask(QUESTIONS, batch_size=2, return_route=True, **OPTIONS) == alone
    assert [result[0] for result in ask((question for question in QUESTIONS), return_route=True, **OPTIONS)] == alone


def test_routing_is_passed_to_generate(ask) -> None:
    for routing, share in (("et5", 1.0), ("emamba", 0.0)):
        found = ask(QUESTIONS[1], routing=routing, max_new_tokens=10, return_route=True)[0]
        assert found["generated_text"] == answer_by_hand(ask, f"question: {QUESTIONS[1]}", routing=routing)
        assert {entry["expert"] for entry in found["route"]} == {routing}
        assert found["et5_share"] == share and (found["et5_passes"] > 0) == (routing == "et5")


def test_route_spells_the_answer(ask) -> None:
    results = ask(QUESTIONS, return_route=True, max_new_tokens=10, expert_budget=0.5)
    experts = [entry["expert"] for result in results for entry in result["route"]]
    assert set(experts) == {"et5", "emamba"}
    for question, found in zip(QUESTIONS, results, strict=True):
        ids = ask.tokenizer(format_source(question), return_tensors="pt")
        output = ask.model.generate(**ids, return_dict_in_generate=True, max_new_tokens=10, expert_budget=0.5)
        assert "".join(entry["token"] for entry in found["route"]) == found["generated_text"]
        assert [entry["token_id"] for entry in found["route"]] == output.sequences[0, 1:].tolist()
        assert found["et5_share"] == pytest.approx(output.route_trace.et5_share().item())
        assert found["et5_passes"] == output.route_trace.et5_passes.item()


def test_several_sequences_are_lists_of_lists(ask) -> None:
    torch.manual_seed(0)
    beams = {"num_beams": 3, "num_return_sequences": 2, "return_route": True, **OPTIONS}
    assert len(ask(QUESTIONS[0], **beams)) == 2
    batched = ask(QUESTIONS, batch_size=3, **beams)
    assert [len(result) for result in batched] == [2, 2, 2]
    assert batched == [ask(question, **beams) for question in QUESTIONS]
    assert batched[0][0]["generated_text"] == answer_by_hand(ask, "question: What is plaque?", num_beams=3)


def test_options_given_at_construction(model, tokenizer) -> None:
    ask = pipeline("text2text-generation", model=model, tokenizer=tokenizer, max_new_tokens=4, return_route=True)
    assert len(ask(QUESTIONS[0])[0]["route"]) <= 4
    assert len(ask(QUESTIONS[0], max_new_tokens=2, return_route=False)[0]) == 1


@pytest.mark.parametrize("blank", ["", "  \n", "question:", "context: a passage question: ", {"question": " "}])
def test_a_blank_question_is_refused(ask, blank) -> None:
    with pytest.raises(ValueError, match="empty or blank.*pass a question"):
        ask(blank)


@pytest.mark.parametrize(
    "wrong, error",
    [({"query": "x"}, ValueError), ({}, ValueError), (3, TypeError), ("context: a passage", ValueError)],
)
def test_what_is_no_question_is_refused(wrong, error) -> None:
    with pytest.raises(error, match="question"):
        source_text(wrong)


def test_a_long_source_is_refused_or_loses_context(tokenizer) -> None:
    text = format_source("what is plaque", "a film of bacteria " * 20)
    whole, alone = tokenizer(text)["input_ids"], tokenizer(format_source("what is plaque"))["input_ids"]
    with pytest.raises(ValueError, match=f"{len(whole)} tokens, 40 are allowed.*truncation=True.*max_source_length"):
        source_ids(text, tokenizer, 40)
    cut = source_ids(text, tokenizer, 40, truncation=True)
    assert len(cut) == 40 and cut[-len(alone) :] == alone and cut[: 40 - len(alone)] == whole[: 40 - len(alone)]
    assert source_ids(text, tokenizer, len(whole)) == whole
    with pytest.raises(ValueError, match=f"{len(alone)} tokens, 3 are allowed: shorten the question"):
        source_ids(format_source("what is plaque"), tokenizer, 3, truncation=True)


def test_texts_of_tokens_that_share_a_character(shared_data) -> None:
    from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer

    tokenizer = MambaFormerTokenizer.from_pretrained(shared_data / "gptneox_tokenizer")
    ids = tokenizer("naïve 🦷 teeth")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "naïve 🦷 teeth" and "" in texts and len(texts) == len(ids)


def test_another_model_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="MambaFormer's, and the model is 't5'"):
        pipeline("text2text-generation", model=tiny_et5(), tokenizer=tokenizer)
