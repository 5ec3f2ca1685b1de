# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Compose a MambaFormer from two pretrained checkpoints, one weight copy in memory at a time."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..configuration.configuration_mambaformer import MAMBA_FAMILY, T5_FAMILY, MambaFormerConfig
from ..tokenizer.vocabulary_transfer import plan_transfer, transfer_vocabulary
from .checkpoint_loading import check_finite, reading_weights
from .mamba_mixer import use_selective_scan
from .relative_bias import use_distance_bias
from .router import SequenceGate, TokenRouter

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
"""Any of these holds a tokenizer's vocabulary."""


def compose_experts(
    cls: type[PreTrainedModel],
    et5: str,
    emamba: str,
    tokenizer: object | None = None,
    *,
    emamba_tokenizer: object | None = None,
    et5_revision: str | None = None,
    emamba_revision: str | None = None,
    dtype: torch.dtype | None = None,
    **router_fields,
) -> PreTrainedModel:
    """
    Load two experts, give EMamba the shared vocabulary, and put a fresh router between them.

    The experts' weights are loaded once and held, not copied: peak memory is the sum of both and the largest of their
    tensors. The report of the vocabulary transfer is left in `model.vocabulary_report`.

    Args:
        cls: the model class to make.
        et5, emamba: Hub ids or folders of checkpoints of the T5 and Mamba families.
        tokenizer: the shared tokenizer, default ET5's own.
        emamba_tokenizer: EMamba's own tokenizer, default the one beside its checkpoint; needed only where its
            vocabulary differs from the shared one.
        et5_revision, emamba_revision: pinned revisions, kept in the configuration.
        dtype: of all weights, default float32.
        router_fields: any further field of `MambaFormerConfig`.

    Returns:
        the model, in evaluation mode.

    Raises:
        OSError: for a checkpoint that cannot be found or read.
        ValueError: for a checkpoint of another family, a missing tokenizer, or weights that are not finite.
    """
    et5, emamba = os.fspath(et5), os.fspath(emamba)
    dtype = torch.float32 if dtype is None else dtype
    configs = {}
    for name, source, revision, family in (
        ("et5", et5, et5_revision, T5_FAMILY),
        ("emamba", emamba, emamba_revision, MAMBA_FAMILY),
    ):
        try:
            configs[name] = AutoConfig.from_pretrained(source, revision=revision)
        except OSError as error:
            raise OSError(
                f"{name}={source!r} is neither a folder with a config.json nor a checkpoint that could be fetched "
                f"from the Hub: check the spelling and the connection ({error})."
            ) from error
        if configs[name].model_type not in family:
            raise ValueError(
                f"{name}={source!r} has model_type {configs[name].model_type!r}: give a checkpoint of one of "
                f"{list(family)}."
            )
    if getattr(configs["emamba"], "rescale_prenorm_residual", False):
        # Made for initialisation, but transformers 5.23 divides the output projections by it again at every load.
        configs["emamba"].rescale_prenorm_residual = False
    rows = configs["et5"].vocab_size
    if emamba_tokenizer is None and has_tokenizer(emamba, emamba_revision):
        emamba_tokenizer = load_tokenizer(emamba, emamba_revision, "emamba_tokenizer")
    if tokenizer is None and emamba_tokenizer is not None:
        tokenizer = load_tokenizer(et5, et5_revision, "tokenizer")

    emamba_model = load_expert(AutoModelForCausalLM, emamba, emamba_revision, dtype, configs["emamba"])
    plan = None
    if emamba_tokenizer is not None:
        plan = plan_transfer(emamba_tokenizer, tokenizer, rows)
        transfer_vocabulary(emamba_model, plan)
    elif emamba_model.config.vocab_size != rows:
        raise ValueError(
            f"emamba={emamba!r} has {emamba_model.config.vocab_size} vocabulary rows, the shared vocabulary {rows}, "
            "and no tokenizer lies beside EMamba's checkpoint: pass emamba_tokenizer=…"
        )
    et5_model = load_expert(AutoModelForSeq2SeqLM, et5, et5_revision, dtype, configs["et5"])

    et5_model.config._name_or_path, emamba_model.config._name_or_path = portable_name(et5), portable_name(emamba)
    eos = et5_model.config.eos_token_id
    pad = et5_model.config.pad_token_id
    start = et5_model.config.decoder_start_token_id
    fields = {
        "et5_name_or_path": portable_name(et5),
        "et5_revision": et5_revision,
        "emamba_name_or_path": portable_name(emamba),
        "emamba_revision": emamba_revision,
        "pad_token_id": pad,
        "eos_token_id": eos,
        "decoder_start_token_id": pad if start is None else start,
        **router_fields,
    }
    config = MambaFormerConfig(et5=et5_model.config, emamba=emamba_model.config, **fields)
    model = assemble(cls, config, et5_model, emamba_model, dtype)
    model.expert_sources = {"et5": et5, "emamba": emamba}
    model.vocabulary_report = None if plan is None else plan.describe()
    return model


def assemble(
    cls: type[PreTrainedModel],
    config: MambaFormerConfig,
    et5: PreTrainedModel,
    emamba: PreTrainedModel,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A model of `cls` around two loaded experts, which are not copied, and a fresh router; in evaluation mode."""
    with torch.device("meta"):
        model = cls(config)  # no weights yet: the loaded experts take their places
    model.et5, model.emamba = et5, emamba
    use_selective_scan(model.emamba)
    use_distance_bias(model.et5)
    model.router, model.gate = TokenRouter(config), SequenceGate(config)
    for part in (model.router, model.gate):
        part.apply(model._init_weights).to(dtype)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.generation_config.max_new_tokens = config.max_target_length
    return model.eval()


def load_expert(
    auto_class: Any, source: str, revision: str | None, dtype: torch.dtype, config: PreTrainedConfig
) -> PreTrainedModel:
    """
    The checkpoint `source`, whole and finite.

    Raises:
        ValueError: naming the weights that are missing, which transformers would fill at random, or not finite.
    """
    with reading_weights(source):
        model, info = auto_class.from_pretrained(
            source, revision=revision, dtype=dtype, config=config, output_loading_info=True
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source!r} lacks {len(missing)} weights, the first {missing[0]!r}: fetch or save the checkpoint again."
        )
    check_finite(model, source)
    return model


def load_tokenizer(source: str, revision: str | None, argument: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint `source`; `ValueError` naming `argument` where there is none."""
    cause = None
    if has_tokenizer(source, revision):  # without its files transformers would make up an empty one
        try:
            return AutoTokenizer.from_pretrained(source, revision=revision)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            cause = error
    reason = "" if cause is None else f" ({type(cause).__name__})"
    raise ValueError(
        f"No tokenizer could be read beside {source!r}{reason}: save one there or pass {argument}=…"
    ) from cause


def has_tokenizer(source: str, revision: str | None) -> bool:
    """Whether a tokenizer lies beside the checkpoint `source`."""
    return any(
        cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
        for name in TOKENIZER_FILES
    )


def portable_name(source: str) -> str:
    """A Hub id as it is, a folder as its last name: a path of one machine helps nobody else."""
    return os.path.basename(os.path.normpath(source)) if os.path.isdir(source) else source
