# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""A loss or gradient that is not a finite number ends training before it reaches the weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

EXIT_CODE = 3
"""Of a command whose training ended so."""


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient is NaN or infinite; says in which step, and from which rows."""


class FiniteLossMixin(Trainer):
    """
    For a `Trainer`: raise `NonFiniteLoss` at a loss that is not finite, and at gradients before they are applied.

    Batches may carry `row` `(B,)` long, the numbers of their rows in the training data; they are told in the error.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_rows: list[int] = []  # of the micro-batches since the last optimizer step
        self.add_callback(FiniteGradients(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; its loss must be finite."""
        rows = inputs["row"].tolist() if "row" in inputs else []
        self._step_rows += rows
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            self.stop_at(f"the loss is {float(loss)}", rows)
        return loss

    def stop_at(self, what: str, rows: list[int]) -> None:
        """Raise `NonFiniteLoss` for the present step."""
        process = f" on process {self.args.process_index}" if self.args.world_size > 1 else ""
        named = ", ".join(map(str, rows)) if rows else "unknown, since the batches carry none"
        raise NonFiniteLoss(
            f"{what} in optimizer step {self.state.global_step + 1}{process}; rows of the batch: {named} (counted "
            f"from 0 in the training data). The weights were not changed and checkpoints up to step "
            f"{self.state.global_step} stay in {self.args.output_dir}. Look at these rows, lower learning_rate or "
            "max_grad_norm, avoid float16, and resume."
        )


class FiniteGradients(TrainerCallback):
    """Before each optimizer step: clipping makes NaN of an infinite gradient, and NaN would spread to all weights."""

    def __init__(self, trainer: FiniteLossMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module | None = None, **kwargs):
        rows, self.trainer._step_rows = self.trainer._step_rows, []
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if not gradients or self.trainer.accelerator.scaler is not None:  # float16's scaler skips such steps itself
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded by FSDP
        if not torch.isfinite(norm):
            self.trainer.stop_at(f"the gradients' norm is {float(norm)}", rows)
