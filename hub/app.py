# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
A Space that answers a question and shows which expert wrote each token.

It runs from the folder that holds the model, or with the model that the environment variable MODEL_ID names.
"""

from __future__ import annotations

import os
from pathlib import Path

LABELS = {"et5": "ET5", "emamba": "EMamba"}
COLOURS = {"ET5": "orange", "EMamba": "green"}


def highlights(route: list[dict]) -> list[tuple[str, str]]:
    """Return the pairs (text, expert) of one answer's `route` for `gradio.HighlightedText`, without silent tokens."""
    return [(entry["token"], LABELS[entry["expert"]]) for entry in route if entry["token"]]


def summary(result: dict) -> str:
    """Return one line about what an answer cost."""
    return f"ET5 wrote {result['et5_share']:.1%} of {len(result['route'])} tokens, in {result['et5_passes']} passes."


def build(model: str):
    """Return the `gradio.Blocks` of the Space for `model`, a folder or a Hub id."""
    import gradio
    from transformers import pipeline

    ask = pipeline("text2text-generation", model=model, trust_remote_code=True)

    def answer(question: str, context: str, budget: float, tokens: int) -> tuple[list, str]:
        try:
            result = ask(
                {"question": question, "context": context},
                expert_budget=budget,
                max_new_tokens=int(tokens),
                truncation=True,
                return_route=True,
            )[0]
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        return highlights(result["route"]), summary(result)

    with gradio.Blocks(title="MambaFormer") as space:
        gradio.Markdown("# MambaFormer\nTwo experts, one answer. Research software: **not medical advice**.")
        question = gradio.Textbox(label="Question")
        context = gradio.Textbox(label="Passage to answer from (optional)", lines=4)
        budget = gradio.Slider(0, 1, value=ask.model.config.expert_budget, label="Largest share of tokens for ET5")
        tokens = gradio.Slider(
            1, 256, value=ask.model.config.max_target_length, step=1, label="Longest answer, in tokens"
        )
        shown = gradio.HighlightedText(label="Answer", color_map=COLOURS, combine_adjacent=True, show_legend=True)
        cost = gradio.Markdown()
        gradio.Button("Ask").click(answer, [question, context, budget, tokens], [shown, cost])
    return space


if __name__ == "__main__":
    build(os.environ.get("MODEL_ID") or str(Path(__file__).resolve().parent)).launch()
