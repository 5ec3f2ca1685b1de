# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The configuration of a MambaFormer: what inference needs, nothing that only training needs."""

from numbers import Real
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .remote_code import RemoteCodeConfigMixin

ROUTING_MODES = ("auto", "et5", "emamba", "soft")
MERGERS = ("select", "mix", "complement")
DECODE_FORMATS = ("off", "float32", "bfloat16", "int8")
ET5_DECODE_FORMATS = ("off", "float32", "int8")
T5_FAMILY = ("t5", "mt5", "umt5")
MAMBA_FAMILY = ("mamba", "falcon_mamba", "mamba2")
COSTS = ("pass", "token", "encoder", "emamba")
"""What `MambaFormerConfig.cost_table` may price."""
DEFAULT_BUDGET = 0.038
"""The share of tokens that the paper sends to ET5 (arXiv 2601.01260: 96.2 % of the tokens go to EMamba)."""


class MambaFormerConfig(RemoteCodeConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`MambaFormerForConditionalGeneration`]: two whole language models that share one vocabulary, and
    the router that decides, token by token, which of them speaks (arXiv 2601.01260).

    Args:
        et5 (`T5Config`, `dict`, *optional*):
            Configuration of the encoder-decoder expert, any of `t5` (also flan-t5), `mt5`, `umt5`.
        emamba (`MambaConfig`, `dict`, *optional*):
            Configuration of the state-space expert, `mamba`, `mamba2` or `falcon_mamba`.
        et5_name_or_path, emamba_name_or_path (`str`, *optional*):
            The checkpoints the experts came from, with `et5_revision` and `emamba_revision`.
        router_features (`list[str]`, *optional*):
            Feature groups the router sees, of `complexity`, `length`, `domain`, `past` (paper, section on routing).
        router_rank (`int`): width of the low-rank projection of EMamba's hidden state.
        router_hidden_size (`int`): width of the router's hidden layer.
        max_source_length, max_target_length (`int`): tokens by which lengths are normalised; a longer source is
            accepted by the model, whose experts decide what they can read.
        expert_budget (`float`): largest share of a request's tokens that ET5 may write, in [0, 1].
        router_threshold (`float`): a token goes to ET5 where its margin exceeds this (calibrated after training).
        threshold_table (`list[list[float]]`, *optional*): pairs `[share, threshold]`, ascending in the share, as
            measured on validation generations; it lets a call ask for another budget.
        gate_threshold (`float`, *optional*): the sequence gate opens where its logit exceeds this;
            `None`: always open.
        merger (`str`): how a routed token's two distributions are merged: `select`, `mix` or `complement`.
        complement_weight (`float`): kappa of the `complement` merger.
        routing (`str`): the default of a call's `routing`: `auto`, `et5`, `emamba` or `soft`.
        emamba_decode (`str`): weights of EMamba's compiled code on a CPU: `float32` (the exact values), `bfloat16` or
            `int8` (a rounded copy, faster), or `off`.
        et5_decode (`str`): the same of the compiled pass of ET5's decoder: `float32`, `int8` or `off`, which
            keeps its encoder to the modules too.
        look_ahead_heads (`int`): the most tokens that the heads for look-ahead decoding propose at a time, 0 for no
            heads; `look_ahead_candidates` (`int`) is how many different tokens they may propose.
        cost_table (`dict[str, float]`, *optional*): measured milliseconds of one ET5 decoder pass (`pass`), one
            caught-up token (`token`), one encoder run (`encoder`) and one EMamba step (`emamba`).

    Raises:
        ValueError: naming the value received, where a field is impossible or the experts' vocabularies differ.
    """

    model_type = "mambaformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults = {
        "et5": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
        "emamba": SubConfigSpec(config_class=AutoConfig, model_type="mamba"),
    }

    et5: dict | PreTrainedConfig | None = None
    emamba: dict | PreTrainedConfig | None = None
    et5_name_or_path: str | None = None
    et5_revision: str | None = None
    emamba_name_or_path: str | None = None
    emamba_revision: str | None = None
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    router_features: list[str] | None = None
    router_rank: int = 32
    router_hidden_size: int = 64
    max_source_length: int = 512
    max_target_length: int = 128
    expert_budget: float = DEFAULT_BUDGET
    router_threshold: float = 0.0
    threshold_table: list[list[float]] | None = None
    gate_threshold: float | None = None
    merger: str = "select"
    complement_weight: float = 0.25
    routing: str = "auto"
    emamba_decode: str = "float32"
    et5_decode: str = "float32"
    look_ahead_heads: int = 0
    look_ahead_candidates: int = 2048
    cost_table: dict[str, float] | None = None

    def __post_init__(self, **kwargs: Any):
        if self.et5 is None and self.emamba is None:  # the library's own defaults disagree on the vocabulary's size
            self.et5 = {"model_type": "t5", "vocab_size": 32128}
            self.emamba = {"model_type": "mamba", "vocab_size": 32128}
        for name in ("et5", "emamba"):
            if not isinstance(getattr(self, name), (dict, PreTrainedConfig, type(None))):
                raise ValueError(
                    f"MambaFormerConfig.{name} is {getattr(self, name)!r}: give a configuration or its fields."
                )
        if self.router_features is None:
            self.router_features = ["complexity", "length", "domain", "past"]
        super().__post_init__(**kwargs)
        # The experts share one vocabulary, and T5 ties by what its own checkpoint says: nothing to tie up here.
        self.is_encoder_decoder = True
        self.tie_word_embeddings = True
        check_fields(self)

    @property
    def vocab_size(self) -> int:
        """Rows of the shared vocabulary, which both experts' embeddings and heads have."""
        return self.et5.vocab_size

    def get_text_config(self, decoder=None, encoder=None):
        """The sub-configuration that `generate` asks for layer counts: ET5's."""
        return self.et5

    def threshold_for(self, budget: float) -> float:
        """
        Margin above which a token is routed so that ET5 writes about `budget` of all tokens.

        Interpolates linearly in `threshold_table`; outside the measured shares the nearest entry holds, and a budget
        of 1 or more needs no threshold. Without a table (a router that was never calibrated) it is `router_threshold`.
        """
        if budget >= 1:
            return float("-inf")
        if not self.threshold_table:
            return self.router_threshold
        table = self.threshold_table
        if budget <= table[0][0]:
            return table[0][1]
        for (low, at_low), (high, at_high) in zip(table, table[1:], strict=False):
            if budget <= high:
                return at_low + (at_high - at_low) * (budget - low) / max(high - low, 1e-12)
        return table[-1][1]


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, and not NaN."""
    return isinstance(value, Real) and value == value


def check_fields(config: MambaFormerConfig) -> None:
    """Raise `ValueError` on the first impossible field of `config`, naming the value received and the remedy."""

    def require(condition: bool, field: str, remedy: str) -> None:
        if not condition:
            raise ValueError(f"MambaFormerConfig.{field} is {getattr(config, field)!r}: {remedy}.")

    for name, family in (("et5", T5_FAMILY), ("emamba", MAMBA_FAMILY)):
        model_type = getattr(config, name).model_type
        if model_type not in family:
            raise ValueError(
                f"MambaFormerConfig.{name} has model_type {model_type!r}: choose a checkpoint of {list(family)}."
            )
    if config.et5.vocab_size != config.emamba.vocab_size:
        raise ValueError(
            f"The experts must share one vocabulary, but et5 has {config.et5.vocab_size} rows and emamba "
            f"{config.emamba.vocab_size}: compose them with `MambaFormerForConditionalGeneration."
            "from_experts_pretrained` or `mambaformer compose`, which transfer EMamba's vocabulary."
        )
    require(config.merger in MERGERS, "merger", f"choose one of {list(MERGERS)}")
    require(config.routing in ROUTING_MODES, "routing", f"choose one of {list(ROUTING_MODES)}")
    require(config.et5_decode in ET5_DECODE_FORMATS, "et5_decode", f"choose one of {list(ET5_DECODE_FORMATS)}")
    require(config.emamba_decode in DECODE_FORMATS, "emamba_decode", f"choose one of {list(DECODE_FORMATS)}")
    budget, kappa = config.expert_budget, config.complement_weight
    require(is_number(budget) and 0 <= budget <= 1, "expert_budget", "give a share of tokens between 0 and 1")
    require(is_number(kappa) and kappa >= 0, "complement_weight", "give a number of 0 or more")
    for field in ("router_rank", "router_hidden_size", "max_source_length", "max_target_length"):
        value = getattr(config, field)
        require(isinstance(value, int) and value >= 1, field, "give a whole number of 1 or more")
    require(is_number(config.router_threshold), "router_threshold", "give a number, or calibrate the router again")
    gate = config.gate_threshold
    require(gate is None or is_number(gate), "gate_threshold", "give a number, or calibrate the router again")
    table = config.threshold_table
    if table is not None:
        pairs = all(isinstance(row, (list, tuple)) and len(row) == 2 and all(map(is_number, row)) for row in table)
        ordered = pairs and all(a[0] < b[0] for a, b in zip(table, table[1:], strict=False))
        require(bool(table) and ordered, "threshold_table", "give [share, threshold] pairs, ascending in the share")
    for field, optional in (("pad_token_id", True), ("eos_token_id", True), ("decoder_start_token_id", False)):
        value = getattr(config, field)
        ids = value if isinstance(value, list) else [value]
        fit = optional if value is None else all(isinstance(x, int) and 0 <= x < config.vocab_size for x in ids)
        require(fit, field, f"give an id below vocab_size {config.vocab_size}")
    costs = config.cost_table
    known = costs is None or all(name in COSTS and is_number(cost) and cost >= 0 for name, cost in costs.items())
    require(known, "cost_table", f"give milliseconds, 0 or more, for some of {list(COSTS)}")


__all__ = ["MambaFormerConfig"]
