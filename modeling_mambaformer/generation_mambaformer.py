# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
How transformers' `generate` drives a MambaFormer.

Sampling, beams, stopping and processors are transformers' own; plain greedy answers on a CPU take a shorter way
(`greedy_decoding`). The hooks below keep ET5's encoder from being run ahead of need, put one cache under
`past_key_values`, and attach the route trace to the result.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .cache_mambaformer import MambaFormerCache, RoutingRequest
from .greedy_decoding import decode_greedily, is_plain_greedy
from .look_ahead import LookAhead, check_look_ahead
from .sources import Sources


class RecordedStops(StoppingCriteriaList):
    """Stopping criteria that tell the cache which rows have ended, so that ET5 is not asked for what follows."""

    def __init__(self, criteria: StoppingCriteriaList, cache: MambaFormerCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.cache.finish(done, input_ids.shape[1])
        return done


class MambaFormerGenerationMixin:
    """Hooks for `GenerationMixin`; to be listed before it."""

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        """
        Generate as any encoder-decoder of transformers, with three more arguments.

        Args:
            routing (`str`, *optional*): `auto`, `et5`, `emamba` or `soft`, default `config.routing`.
            expert_budget (`float`, *optional*): largest share of new tokens that ET5 may write, default
                `config.expert_budget`. At most `floor(expert_budget * max_new_tokens)` tokens go to ET5, whatever the
                router says; within this, the calibrated threshold decides.
            look_ahead (`int`, *optional*): most tokens to propose at a time, from what source and answer said
                before or by the model's heads, for EMamba to read in one pass with the next one. Tokens and choices
                stay those of plain decoding. Default 0, none. For one row at a time, see `LookAhead`.

        Returns:
            as `GenerationMixin.generate`; with `return_dict_in_generate=True` the result has a `route_trace`, and with
            `look_ahead` its counts under that name, see `LookAheadCounts`.

        Raises:
            ValueError: for an empty source, a bad `routing`, `expert_budget` or `look_ahead`, or weights that are not
                finite.
        """
        kwargs["look_ahead"] = check_look_ahead(kwargs.get("look_ahead"))
        given = [kwargs, {} if generation_config is None else generation_config.to_dict()]
        if any(x.get("max_length") for x in given) and not any(x.get("max_new_tokens") for x in given):
            kwargs["max_new_tokens"] = None  # the caller's limit holds, not this model's default
        result = super().generate(inputs, generation_config, **kwargs)
        if isinstance(result, ModelOutput) and isinstance(result.get("past_key_values"), MambaFormerCache):
            cache = result.past_key_values
            new_tokens = result.sequences.shape[1] - cache.prompt_length
            result["route_trace"] = cache.trace(new_tokens, result.get("beam_indices"))
            if cache.look_ahead is not None:
                result["look_ahead"] = cache.look_ahead.counts
        return result

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        """Refuse what nobody takes; `look_ahead`, which is not one of `forward`'s arguments, is ours."""
        super()._validate_model_kwargs({name: x for name, x in model_kwargs.items() if name != "look_ahead"})

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict, model_input_name: str | None, generation_config
    ) -> dict:
        """Keep the source for both experts; run nothing yet."""
        for name in ("encoder_outputs", "past_key_values"):
            if model_kwargs.get(name) is not None:
                raise ValueError(f"{name} were given to generate: give input_ids instead, which EMamba reads too.")
        if model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = self._prepare_attention_mask_for_generation(
                inputs_tensor, generation_config, model_kwargs
            )
        vocab_size = self.config.vocab_size
        model_kwargs["encoder_outputs"] = Sources.build(inputs_tensor, model_kwargs["attention_mask"], vocab_size)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Expand the rows; the sources stay as they are, read once for all of their rows."""
        sources = model_kwargs.pop("encoder_outputs", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "encoder_outputs": sources, "prompt_length": input_ids.shape[1]}

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy decoding and sampling; rows end where any criterion says so."""
        cache, wants_dict = model_kwargs["past_key_values"], generation_config.return_dict_in_generate
        if not is_plain_greedy(
            self, cache, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus
        ):
            stops = RecordedStops(stopping_criteria, cache)
            return super()._sample(
                input_ids, logits_processor, stops, generation_config, synced_gpus, streamer, **model_kwargs
            )
        first = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]  # (B, V)
        pad = generation_config._pad_token_tensor
        sequences = decode_greedily(self, cache, input_ids, first, stopping_criteria, pad, streamer)
        return GenerateEncoderDecoderOutput(sequences=sequences, past_key_values=cache) if wants_dict else sequences

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """Make the one cache, and settle how this request is routed."""
        sources, prompt_length = model_kwargs.pop("encoder_outputs"), model_kwargs.pop("prompt_length")
        model_kwargs["encoder_outputs"] = BaseModelOutput()  # where `generate` looks for attentions
        beams = generation_config.num_beams
        expand = max(beams, generation_config.num_return_sequences)
        request = RoutingRequest.build(
            self.config,
            model_kwargs.pop("routing", None),
            model_kwargs.pop("expert_budget", None),
            generation_config.max_length - prompt_length,
            first_new=prompt_length - 1,
        )
        keep = generation_config.use_cache is not False
        cache = MambaFormerCache(sources, request, expand, beams, keep_states=keep)
        width = model_kwargs.pop("look_ahead", 0)
        if width:
            ends = generation_config.eos_token_id
            ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
            cache.look_ahead = LookAhead(width, cache, generation_config.max_length, ends)
        model_kwargs["past_key_values"] = cache
