# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
The `text2text-generation` pipeline for a MambaFormer: questions in, answers out, on request with who wrote each token.

transformers 5 removed that task together with its pipeline; this one keeps the removed one's form of results.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from .outputs_mambaformer import ENDED, ET5
from .source_inputs import source_ids, source_text

PREPROCESSING = ("truncation", "max_source_length")
POSTPROCESSING = ("clean_up_tokenization_spaces",)


class MambaFormerText2TextPipeline(Pipeline):
    """
    Answers questions, with `pipeline("text2text-generation", model=…)`.

    Example::

        ask = pipeline("text2text-generation", model="mambaformer/", trust_remote_code=True)
        ask("What is pulpitis?")
        # [{"generated_text": …}]
        ask({"question": "What is pulpitis?", "context": passage}, return_route=True, expert_budget=0.1)
        # [{"generated_text": …, "route": [{"token": …, "expert": "emamba"}, …], "et5_share": …, "et5_passes": …}]

    Whatever `generate` takes may be given here or per call: `routing`, `expert_budget`, `max_new_tokens` and so on.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    # Generation parameters go to `generate` as they are given, in every transformers 5.
    _pipeline_calls_generate = False

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        if model.config.model_type != "mambaformer":
            raise ValueError(
                f"this text2text-generation pipeline is MambaFormer's, and the model is {model.config.model_type!r}: "
                "give a MambaFormer, or call the tokenizer and `generate` of yours."
            )
        super().__init__(model, *args, **kwargs)

    def __call__(self, inputs: str | dict | Iterable, **kwargs: Any) -> list:
        """
        Answer one question or many.

        Args:
            inputs: a question (a string, or a dict with `question` and perhaps `context`), or a list, data set or
                generator of them. A string that starts with `question:` or `context:` is taken as it is.
            batch_size (`int`): questions per forward pass, default 1; an answer does not depend on it.
            return_route (`bool`): say who wrote each token.
            truncation (`bool`): cut a context that is too long at its end.
            max_source_length (`int`): longest source in tokens, default the tokenizer's `model_max_length`.
            clean_up_tokenization_spaces (`bool`): as in `tokenizer.decode`.
            kwargs: for `generate`.

        Returns:
            for one question a list of `{"generated_text": …}`, one for each of `num_return_sequences`; for a list of
            questions one such dict each, or one such list each where there are several sequences. With `return_route`
            each dict also has `route` (one `{"token", "token_id", "expert"}` for each token written, whose texts
            joined are the answer; `expert` is "et5" or "emamba"), `et5_share` (share of these tokens, 0 to 1) and
            `et5_passes` (ET5's decoder calls).

        Raises:
            ValueError: for a blank question or one that is too long, and as `generate`.
            TypeError: for an input that is no question.
        """
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                return []
            results = super().__call__(list(inputs), **kwargs)
            return [result[0] for result in results] if all(len(result) == 1 for result in results) else results
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, return_route: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Sort the parameters by the step that takes them."""
        before = {name: kwargs.pop(name) for name in PREPROCESSING if name in kwargs}
        after = {name: kwargs.pop(name) for name in POSTPROCESSING if name in kwargs}
        if return_route is not None:
            kwargs["return_route"] = return_route
        return before, kwargs, after

    def preprocess(
        self, inputs: str | dict, truncation: bool = False, max_source_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the `(1, S)` ids and mask of one question."""
        ids = torch.tensor([source_ids(source_text(inputs), self.tokenizer, max_source_length, truncation)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _forward(
        self, model_inputs: dict[str, torch.Tensor], return_route: bool = False, **generate_kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Generate; every tensor returned has the batch as its first axis, by which transformers takes it apart."""
        generate_kwargs["return_dict_in_generate"] = True
        rows = model_inputs["input_ids"].shape[0]
        output = self.model.generate(**model_inputs, **generate_kwargs)
        trace = output.route_trace
        start = output.sequences.shape[1] - trace.expert.shape[1]
        generated = {"sequences": output.sequences[:, start:]}
        if return_route:
            generated |= {"expert": trace.expert, "et5_passes": trace.et5_passes}
        return {name: value.reshape(rows, -1, *value.shape[1:]) for name, value in generated.items()}  # (B, N, …)

    def postprocess(
        self, model_outputs: dict[str, torch.Tensor], clean_up_tokenization_spaces: bool = False
    ) -> list[dict[str, Any]]:
        """Return one dict for each returned sequence of one question, from tensors of `(1, N, …)`."""
        answers = []
        for at, ids in enumerate(model_outputs["sequences"][0]):
            text = self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
            )
            answer = {"generated_text": text}
            if "expert" in model_outputs:
                expert = model_outputs["expert"][0, at]
                spoken = expert != ENDED
                texts = token_texts(self.tokenizer, ids[spoken].tolist())
                answer["route"] = [
                    {"token": token, "token_id": index, "expert": "et5" if wrote == ET5 else "emamba"}
                    for token, index, wrote in zip(texts, ids[spoken].tolist(), expert[spoken].tolist(), strict=True)
                ]
                answer["et5_share"] = float((expert == ET5).sum() / spoken.sum().clamp(min=1))
                answer["et5_passes"] = int(model_outputs["et5_passes"][0, at])
            answers.append(answer)
        return answers

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and tokenizer, which write the pipeline's files and its place in `config.json` too."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    Return what each token adds to the text, so that the texts joined are the decoded answer.

    Special tokens add nothing; where several tokens spell one character, the last of them adds it.
    """
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if end < len(ids) and text.endswith("\N{REPLACEMENT CHARACTER}"):
            text = shown
        texts.append(text[len(shown) :])
        shown = text
    return texts


__all__ = ["MambaFormerText2TextPipeline"]
