# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Inference Endpoints: lies beside the weights as `handler.py` and needs nothing but what lies there."""

from __future__ import annotations

from typing import Any

from transformers import pipeline


class EndpointHandler:
    """
    Answers requests of the form `{"inputs": …, "parameters": {…}}`.

    Args:
        path: the folder of the model repository.
    """

    def __init__(self, path: str = "."):
        self.ask = pipeline("text2text-generation", model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list:
        """
        Answer one request.

        Args:
            data: `inputs` is a question, a dict with `question` and perhaps `context`, or a list of these;
                `parameters` go to the pipeline: `routing`, `expert_budget`, `max_new_tokens` and so on.

        Returns:
            what the pipeline returns, ready for JSON.

        Raises:
            ValueError: for a request of another form, and as the pipeline does.
        """
        parameters = data.get("parameters") or {}
        if "inputs" not in data or not isinstance(parameters, dict):
            raise ValueError(
                f'a request was received with {sorted(data)}: send {{"inputs": question, "parameters": {{…}}}}, where '
                "parameters are optional."
            )
        return self.ask(data["inputs"], **parameters)
