# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
MambaFormer: a pretrained T5 and a pretrained Mamba that share one vocabulary and one answer (arXiv 2601.01260).

EMamba carries the state and is run for every token; ET5 is asked only for the tokens that the router sends it, and
then catches up on those it skipped in one decoder pass. This file composes the parts; each part has a file of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from ..configuration.configuration_mambaformer import MambaFormerConfig
from ..configuration.remote_code import OwnRemoteCodeMixin
from .adapter_checkpoint import is_adapter_checkpoint, load_adapter_checkpoint
from .cache_mambaformer import MambaFormerCache, RoutingRequest
from .checkpoint_loading import check_finite, reading_weights
from .composition import compose_experts
from .emamba_decoder import DEFAULT_DECODE, EMambaDecoder
from .emamba_prefill import read_sources
from .emamba_stream import read_on, read_together
from .et5_encoder import compiled_parts
from .generation_mambaformer import MambaFormerGenerationMixin
from .lazy_et5 import decode_together
from .look_ahead_heads import LookAheadHeads, make_heads
from .mamba_mixer import use_selective_scan
from .outputs_mambaformer import MambaFormerOutput
from .quantized_experts import restore_experts, round_experts
from .quantized_modules import refuse_training
from .quantizer_mambaformer import quantize_loaded
from .relative_bias import use_distance_bias
from .router import SequenceGate, TokenRouter
from .router_inputs import first_state, source_scalars
from .routing_pass import ask_et5, choose, merge_experts
from .sources import Sources, check_targets


class MambaFormerPreTrainedModel(OwnRemoteCodeMixin, PreTrainedModel):
    """Loading, saving and initialisation."""

    config: MambaFormerConfig
    config_class = MambaFormerConfig
    base_model_prefix = "mambaformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ["TokenRouter", "SequenceGate"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args, **kwargs) -> MambaFormerPreTrainedModel:
        """
        Load a saved model as every class of transformers does, or one saved as adapters on named bases, merged.

        Raises:
            ImportError: for adapters where PEFT is not installed.
            OSError: for a checkpoint that cannot be found, or a file of it that is damaged or cut short.
            ValueError: for weights that are not finite or do not fit `config.json`, or an impossible configuration.
        """
        if "state_dict" not in kwargs and is_adapter_checkpoint(pretrained_model_name_or_path, **kwargs):
            return load_adapter_checkpoint(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        with reading_weights(pretrained_model_name_or_path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_finite(model, pretrained_model_name_or_path)
        if model.config.emamba_decode != DEFAULT_DECODE:
            model.emamba_decoder.prepare(model.emamba)
        return loaded

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        `False`, so that modules missing from a checkpoint are initialised as transformers' own would be.

        `_init_weights` below uses only `transformers.initialization`, which leaves loaded parameters alone; treated as
        custom code, the experts' attention would be filled with standard deviation 1.
        """
        return False

    # trf-ignore: TRF018
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=max(module.in_features, 1) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, TokenRouter):
            init.zeros_(module.domain_weight)
        elif isinstance(module, LookAheadHeads):
            for tensor in (module.out_proj.weight, module.rows.weight, module.tokens):
                init.zeros_(tensor)


class MambaFormerForConditionalGeneration(MambaFormerPreTrainedModel, MambaFormerGenerationMixin, GenerationMixin):
    """
    Two language models, one answer, a router between them.

    `model.et5` and `model.emamba` are transformers' own classes; their checkpoints' keys stand under these prefixes.

    Example::

        model = MambaFormerForConditionalGeneration.from_experts_pretrained(
            "google/flan-t5-base", "state-spaces/mamba-130m-hf"
        )
        output = model.generate(**tokenizer("question: What is pulpitis?", return_tensors="pt"),
                                return_dict_in_generate=True)
        output.route_trace.expert  # (1, new_tokens): which expert wrote each token
    """

    def __init__(self, config: MambaFormerConfig):
        super().__init__(config)
        self.et5 = AutoModelForSeq2SeqLM.from_config(config.et5)
        self.emamba = AutoModelForCausalLM.from_config(config.emamba)
        self.router = TokenRouter(config)
        self.gate = SequenceGate(config)
        use_selective_scan(self.emamba)
        use_distance_bias(self.et5)
        self.emamba_decoder = EMambaDecoder(config.emamba_decode)
        self.et5_encoder, self.et5_decoder = compiled_parts(config.et5_decode)
        self.look_ahead_heads = make_heads(config)
        self.post_init()

    @classmethod
    def from_experts_pretrained(
        cls, et5: str, emamba: str, tokenizer: object | None = None, **kwargs
    ) -> MambaFormerForConditionalGeneration:
        """
        Compose two pretrained experts; see `compose_experts` for the arguments, the steps and the errors.

        Example::

            model = MambaFormerForConditionalGeneration.from_experts_pretrained("flan-t5-base/", "mamba-130m-hf/")
            model.save_pretrained("mambaformer/")
        """
        return compose_experts(cls, et5, emamba, tokenizer, **kwargs)

    @classmethod
    def from_adapters_pretrained(
        cls, pretrained_model_name_or_path: str, et5: str | None = None, emamba: str | None = None, **kwargs
    ) -> MambaFormerForConditionalGeneration:
        """
        Put saved adapters on their bases; see `load_adapter_checkpoint` for the arguments and the errors.

        Example::

            model = MambaFormerForConditionalGeneration.from_adapters_pretrained("adapters/", emamba="mamba-130m-hf/")
        """
        return load_adapter_checkpoint(cls, pretrained_model_name_or_path, et5, emamba, **kwargs)

    def pack_emamba(self, weight_format: str) -> MambaFormerForConditionalGeneration:
        """
        Choose the weights that EMamba reads and decodes with on a CPU, and pack them now; returns the model.

        The parameters stay as they are, for training and saving. Where the compiled step does not apply
        (another device or family, hooks, unmerged adapters, no library), the modules are run, as one log line says.

        Args:
            weight_format: `float32`, the exact values; `bfloat16` or `int8`, a rounded copy that is read
                faster; or `off`, always the modules.

        Raises:
            ValueError: for an unknown `weight_format`.

        Example::

            model = MambaFormerForConditionalGeneration.from_pretrained("mambaformer/").pack_emamba("int8")
        """
        self.emamba_decoder = EMambaDecoder(weight_format)
        self.config.emamba_decode = weight_format
        self.emamba_decoder.prepare(self.emamba)
        return self

    def pack_et5(self, weight_format: str) -> MambaFormerForConditionalGeneration:
        """
        Choose the weights of ET5's compiled decoder pass on a CPU, as `pack_emamba` for EMamba; returns the model.

        Args:
            weight_format: `float32`; `int8`, a rounded copy beside the parameters, for the decoder alone; or `off`,
                always the modules.

        Raises:
            ValueError: for an unknown `weight_format`.
        """
        self.et5_encoder, self.et5_decoder = compiled_parts(weight_format)
        self.config.et5_decode = weight_format
        return self

    def quantize(self, weights: str | None = "int8", et5: str | None = None) -> MambaFormerForConditionalGeneration:
        """
        Hold matrices as rounded numbers only, for sources, decoding and saving alike; returns the model.

        The same as loading with `quantization_config=MambaFormerQuantizationConfig(weights, et5)`. What
        `save_pretrained` then writes is loaded again as it is. `dequantize()` makes float weights of its values again.

        Args:
            weights, et5: formats of EMamba and ET5, see `MambaFormerQuantizationConfig`; `None` leaves one float.

        Raises:
            ValueError: for another format, an EMamba that is not of the family `mamba`, or weights rounded already.

        Example::

            model.quantize("int8", et5="int8").save_pretrained("mambaformer-int8/")
        """
        quantize_loaded(self, weights, et5)
        return self.eval()

    def train(self, mode: bool = True) -> MambaFormerForConditionalGeneration:
        """As `nn.Module.train`. Raises `ValueError` for `mode=True` where an expert's weights are rounded."""
        if mode:
            refuse_training(self)  # before any module is switched
        return super().train(mode)

    def _round_weights(self, weights: str | None, et5: str | None = None) -> None:
        round_experts(self, weights, et5)

    def _restore_weights(self, dtype: torch.dtype) -> None:
        restore_experts(self, dtype)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """ET5's encoder; `generate` does not run it unless a token is routed."""
        return self.et5.get_encoder()

    def get_input_embeddings(self) -> nn.Module:
        """ET5's embeddings, whose tokenizer defines the shared vocabulary."""
        return self.et5.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """ET5's head."""
        return self.et5.get_output_embeddings()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Resize both experts to `new_num_tokens` rows, so that they keep sharing one vocabulary."""
        if new_num_tokens is not None:
            self.emamba.resize_token_embeddings(new_num_tokens, *args, **kwargs)
            self.et5.resize_token_embeddings(new_num_tokens, *args, **kwargs)
            old = self.router.domain_weight
            kept = min(old.shape[0], new_num_tokens)
            self.router.domain_weight = F.pad(old[:kept], (0, new_num_tokens - kept))
        return self.get_input_embeddings()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder input of `labels` `(B, T)`: the start token, then the labels, ignored ones (-100) as padding."""
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        encoder_outputs: tuple | None = None,
        past_key_values: MambaFormerCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        expert_budget: float | None = None,
        output_experts: bool = False,
        route_teacher: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> MambaFormerOutput:
        """
        Predict the next token at each decoder position.

        Args:
            input_ids, attention_mask: `(B, S)` long, the source, padded on either side; not needed with
                `past_key_values`.
            decoder_input_ids: `(B, T)` long, starting with `config.decoder_start_token_id`; with `past_key_values`
                only those that it has not seen. Made from `labels` when absent.
            decoder_attention_mask: `(B, T)`, zeros on padded targets; not with a cache.
            encoder_outputs: ET5's encoder states `(B, S, D)` first, where the caller already has them.
            labels: `(B, T)` long, -100 is ignored, not shifted here.
            use_cache: return a cache; default `config.use_cache` in inference without labels.
            routing: `auto`, `et5`, `emamba` or `soft`; default `soft` in training, else `config.routing`.
            expert_budget: moves the threshold for this call, see `RoutingRequest`.
            output_experts: return each expert's own logits, run at every position; without a cache only.
            route_teacher: `(B, T)` long, choices (0 or 1) that the router takes for its past; without a cache only.
            logits_to_keep: compute only the last so many positions, 0 for all. ET5 is asked only for these.

        Raises:
            ValueError: for an empty source, ids outside the vocabulary, or arguments that contradict each other.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("Neither decoder_input_ids nor labels were given: give one, or call `generate`.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training and not output_experts
        if past_key_values is None:
            sources = Sources.build(input_ids, attention_mask, self.config.vocab_size)
            request = RoutingRequest.build(
                self.config, "soft" if routing is None and self.training else routing, expert_budget
            )
            cache = MambaFormerCache(sources, request) if use_cache else None
        else:
            if not isinstance(past_key_values, MambaFormerCache):
                raise ValueError(
                    f"past_key_values is a {type(past_key_values).__name__}: give what an earlier call of this model "
                    "returned, or nothing."
                )
            cache = past_key_values
        if cache is None or cache.get_seq_length() == 0:
            rows = sources.input_ids.shape[0] if cache is None else len(cache.row_source)
            check_targets(decoder_input_ids, labels, rows, self.config.vocab_size)
        states = encoder_outputs[0] if encoder_outputs is not None and len(encoder_outputs) else None
        if cache is not None:
            if output_experts or route_teacher is not None:
                raise ValueError("output_experts and route_teacher need whole targets: pass use_cache=False.")
            if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
                raise ValueError(
                    "decoder_attention_mask has zeros: padded targets need a forward call with use_cache=False, and "
                    "`generate` prompts of one length."
                )
            output = self._incremental(cache, decoder_input_ids, states, logits_to_keep)
        else:
            output = self._parallel(
                sources,
                request,
                decoder_input_ids,
                decoder_attention_mask,
                states,
                output_experts,
                route_teacher,
                logits_to_keep,
            )
        if labels is not None:
            gold = labels[:, -logits_to_keep:].to(output.logits.device)  # (B, K)
            output.loss = F.cross_entropy(output.logits.flatten(0, 1).float(), gold.flatten())
        return output

    def _parallel(
        self,
        sources: Sources,
        request: RoutingRequest,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        states: torch.Tensor | None,
        output_experts: bool,
        teacher: torch.Tensor | None,
        keep: int,
    ) -> MambaFormerOutput:
        """One differentiable pass over whole targets `ids` `(B, T)`, without a cache."""
        hidden = state = scalars = gate_logit = None
        if request.routing != "et5" or output_experts:
            hidden, at_source_end = read_together(self.emamba, sources, ids, mask)  # (B, T, D), (B, D)
            state = first_state(self.emamba, self.router, sources)
            scalars = source_scalars(self.router, self.config, sources)  # (B,), (B,)
            gate_logit = self._gate_logits(at_source_end, scalars)  # (B,)
        ended = torch.zeros_like(ids, dtype=torch.bool)
        choice = choose(self, request, ids, ended, hidden, state, scalars, gate_logit, teacher)
        asked = choice.asked[:, -keep:].any(1) | output_experts  # (B,)
        calls = asked.long()
        encoder_calls = calls if states is None else torch.zeros_like(calls)
        et5_logits = None
        if bool(asked.any()):
            rows = asked.nonzero().flatten()  # (R,)
            said, states = decode_together(self.et5, sources, rows, ids, mask, keep, states)  # (R, K, V)
            et5_logits = (
                said
                if rows.numel() == len(ids)
                else said.new_zeros(len(ids), *said.shape[1:]).index_copy(0, rows, said)
            )
        logits, trace = merge_experts(self, request, choice, et5_logits, keep)
        trace.et5_passes, trace.et5_tokens, trace.encoder_calls = calls, calls * ids.shape[1], encoder_calls
        output = MambaFormerOutput(logits=logits, route_trace=trace, gate_logit=gate_logit, margin=choice.margin)
        if output_experts:
            output.emamba_logits, output.et5_logits = choice.emamba_logits[:, -keep:], et5_logits
        return output

    def _incremental(
        self, cache: MambaFormerCache, ids: torch.Tensor, states: torch.Tensor | None, keep: int
    ) -> MambaFormerOutput:
        """Read `ids` `(B, T)` on from `cache`, which is updated; ET5 runs only for rows and positions routed to it."""
        if not cache.keep_states:
            cache.rewind()
        request, before = cache.request, cache.get_seq_length()
        if states is not None:
            cache.et5.adopt(states)
        choice = None if cache.look_ahead is None else cache.look_ahead.choose(self, cache, ids)
        if choice is None:
            hidden = emamba_logits = None
            if request.routing != "et5":
                if cache.emamba is None:
                    self._read_source(cache)
                stepped = self.emamba_decoder.step(self.emamba, cache.emamba, ids)
                # (B, T, D), (B, T, V) or None
                hidden, emamba_logits = stepped or (read_on(self.emamba, cache.emamba, ids), None)
            gate_logit = None if cache.gate_logit is None else cache.gate_logit[cache.row_source]  # (B,)
            ended, scalars = cache.ended(ids), cache.row_scalars()
            choice = choose(
                self, request, ids, ended, hidden, cache.router, scalars, gate_logit, emamba_logits=emamba_logits
            )
        cache.router = choice.state
        cache.decoder_ids = torch.cat([cache.decoder_ids, ids], dim=1)  # (B, t + T)
        keep = keep or ids.shape[1]
        asked = choice.asked[:, -keep:]  # (B, K)
        et5_logits = None
        if bool(asked.any()):
            et5_logits = ask_et5(self, cache, asked, before + ids.shape[1] - keep)  # (B, K, V)
        elif choice.emamba_logits is None:  # forced to ET5, and every answer has ended
            et5_logits = torch.zeros(len(ids), keep, self.config.vocab_size, device=ids.device)
        logits, trace = merge_experts(self, request, choice, et5_logits, keep)
        if before == 0 and not bool(logits.isfinite().all()):
            raise ValueError(
                f"The first logits are not finite in {logits.dtype}: the weights hold NaN, or overflow in this "
                "precision; load the checkpoint again, in bfloat16 or float32."
            )
        trace.et5_passes, trace.et5_tokens, trace.encoder_calls = cache.counts()
        if cache.get_seq_length() >= cache.prompt_length:  # a prompt may be read in several chunks
            cache.steps.append({name: trace[name][:, -1:] for name in cache.STEP_FIELDS})
        gate_logit = None if cache.gate_logit is None else cache.gate_logit[cache.row_source]  # (B,)
        return MambaFormerOutput(
            logits=logits, past_key_values=cache, route_trace=trace, gate_logit=gate_logit, margin=choice.margin
        )

    def _gate_logits(self, at_source_end: torch.Tensor, scalars: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The sequence gate's logits `(B,)` from EMamba's hidden states at the last source tokens, `(B, D)`."""
        dtype = self.gate.hidden_proj.weight.dtype
        return self.gate(at_source_end.detach().to(dtype), scalars[0].to(dtype), scalars[1].to(dtype))

    def _read_source(self, cache: MambaFormerCache) -> None:
        """Let EMamba read each source once, and give every row its source's state."""
        cache.emamba, at_source_end = read_sources(self.emamba_decoder, self.emamba, cache.sources)
        cache.source_scalars = source_scalars(self.router, self.config, cache.sources)
        cache.gate_logit = self._gate_logits(at_source_end, cache.source_scalars)
        cache.router = first_state(self.emamba, self.router, cache.sources)
        if len(cache.row_source) != len(cache.sources.input_ids):
            cache.emamba.reorder_cache(cache.row_source)
            cache.router = cache.router.select(cache.row_source)


__all__ = ["MambaFormerForConditionalGeneration", "MambaFormerPreTrainedModel"]
