# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Arguments of a training stage: those of `Seq2SeqTrainingArguments`, and what is our own."""

import os
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

STAGES = ("adapt", "distil", "joint")
EXPERTS = ("et5", "emamba")
INTRACTABLE = ("soft", "zero")


@dataclass
class MambaFormerTrainingArguments(Seq2SeqTrainingArguments):
    r"""
    Arguments of [`MambaFormerTrainer`].

    Everything of [`~transformers.Seq2SeqTrainingArguments`] holds. The fields below are our own; a loss term `name` of
    `losses.LOSS_TERMS` has its weight in `w_name`. Utilities and prices are in nats, shares are of answer tokens.

    Example::

        args = MambaFormerTrainingArguments(output_dir="out", stage="distil", max_steps=300, learning_rate=2e-3)

    Raises:
        ValueError: naming the value received, for an unknown stage or expert or a number out of its range.
    """

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not take."}
    )

    stage: str = field(
        default="adapt",
        metadata={
            "help": "adapt: LoRA on each expert alone. distil: the router and the gate learn from cached utilities. "
            "joint: adapters, router and gate together."
        },
    )

    w_task: float = field(default=1.0, metadata={"help": "Weight of the merged answer's negative log-likelihood."})
    w_expert: float = field(default=1.0, metadata={"help": "Weight of each expert's own negative log-likelihood."})
    w_util: float = field(default=1.0, metadata={"help": "Weight of the router's cross-entropy to the utility."})
    w_use: float = field(default=0.01, metadata={"help": "Weight of the utilisation relative to the target shares."})
    w_cost: float = field(default=0.0, metadata={"help": "Weight of the priced expected cost (adapted price: joint)."})
    w_burst: float = field(default=0.0, metadata={"help": "Weight of the expected number of switches a token."})
    w_z: float = field(default=1e-4, metadata={"help": "Weight of the mean squared margin."})
    w_gain: float = field(default=0.0, metadata={"help": "Weight of the negative expected utility, an alternative."})
    w_regress: float = field(default=0.0, metadata={"help": "Weight of regressing the margin on the benefit itself."})
    w_gate: float = field(default=0.5, metadata={"help": "Weight of the sequence gate's cross-entropy."})

    tau: float = field(default=0.5, metadata={"help": "Temperature of the utility targets at the start, in nats."})
    tau_final: float = field(default=0.2, metadata={"help": "Temperature at the end; it falls linearly."})
    delta_clip: float = field(default=5.0, metadata={"help": "The benefit of ET5 is clipped to +- this, in nats."})
    agreement_weight: float = field(
        default=0.05,
        metadata={"help": "Weight, in w_util, of tokens for which both experts have the same first choice."},
    )
    intractable: str = field(
        default="soft",
        metadata={"help": "Tokens that neither expert gets right: soft keeps the formula, zero sends them to EMamba."},
    )

    expert_budget: float | None = field(
        default=None, metadata={"help": "Target share of ET5's tokens in (0, 1); default the model's own."}
    )
    price: str = field(
        default="auto",
        metadata={"help": "Nats per unit of cost: a number, or auto: that at which an oracle meets the budget."},
    )
    price_rate: float = field(default=0.02, metadata={"help": "Step of the dual ascent on the price (joint)."})
    share_ema: float = field(default=0.9, metadata={"help": "Decay of the running threshold and running cost."})

    utility_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the experts' cached log-probabilities (distil); default utilities in output_dir. Runs "
            "with the same experts and rows may share one. none: in memory only."
        },
    )

    et5_lora_rank: int = field(default=8, metadata={"help": "LoRA rank on ET5; 0 leaves ET5 as it is."})
    et5_lora_alpha: float = field(default=16.0, metadata={"help": "LoRA alpha on ET5."})
    et5_lora_targets: list[str] = field(
        default_factory=lambda: ["q", "v"], metadata={"help": "Of q, k, v, o, wi, wo (wi means wi_0 and wi_1 too)."}
    )
    emamba_lora_rank: int = field(default=8, metadata={"help": "LoRA rank on EMamba; 0 leaves EMamba as it is."})
    emamba_lora_alpha: float = field(default=16.0, metadata={"help": "LoRA alpha on EMamba."})
    emamba_lora_targets: list[str] = field(
        default_factory=lambda: ["in_proj", "x_proj"],
        metadata={"help": "Of in_proj, x_proj (Mamba-2 has in_proj only)."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    train_embeddings: list[str] = field(
        default_factory=list,
        metadata={"help": "Experts whose embeddings and head are trained in full: et5, emamba. For rebuilt ones."},
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of router and gate; default learning_rate."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._one_of("stage", STAGES)
        self._one_of("intractable", INTRACTABLE)
        for name in self.train_embeddings:
            if name not in EXPERTS:
                raise ValueError(f"train_embeddings names {name!r}: choose from {list(EXPERTS)}.")
        for name in ("tau", "tau_final", "delta_clip"):
            self._require(getattr(self, name) > 0, name, "give a number above 0")
        for name in ("agreement_weight", "price_rate", "et5_lora_rank", "emamba_lora_rank"):
            self._require(getattr(self, name) >= 0, name, "give a number of 0 or more")
        self._require(0 <= self.share_ema < 1, "share_ema", "give a decay in [0, 1)")
        self._require(
            self.expert_budget is None or 0 < self.expert_budget < 1, "expert_budget", "give a share in (0, 1)"
        )
        if self.price != "auto":
            try:
                float(self.price)
            except ValueError:
                raise ValueError(f"price is {self.price!r}: give a number of nats, or 'auto'.") from None

    @property
    def utility_folder(self) -> str | None:
        """Folder of the cached log-probabilities; `None`: in memory."""
        if self.utility_cache == "none":
            return None
        return self.utility_cache or os.path.join(self.output_dir, "utilities")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        self._require(getattr(self, name) in values, name, f"choose one of {list(values)}")

    def _require(self, condition: bool, name: str, remedy: str) -> None:
        if not condition:
            raise ValueError(f"MambaFormerTrainingArguments.{name} is {getattr(self, name)!r}: {remedy}.")
