# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
`MambaFormerTrainer`: transformers' `Seq2SeqTrainer` with the utility-guided multi-objective loss, stage by stage.

It adds what a stage needs (adapters, cached utilities, the price), sums and logs the loss terms, and keeps price and
threshold with each checkpoint. Calibration and merging after training are not its business: see `run.py`.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .adapter_folder import save_adapters
from .adapters import load_trainable, merge_adapters, prepare_stage, save_trainable
from .arguments import MambaFormerTrainingArguments
from .data import Collator
from .distillation import add_utilities, price_of
from .finite import FiniteLossMixin
from .losses import LOSS_TERMS, LossInputs, total_loss
from .stages import STAGE_INPUTS, RoutingState
from .utility import CallCosts, dual_ascent, oracle_gain, price_for_share, threshold_for_share

STATE_FILE = "routing_state.json"


class AdaptRouting(TrainerCallback):
    """After each optimizer step: move price, threshold and temperature."""

    def __init__(self, trainer: MambaFormerTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.adapt_routing()


def mean_length(rows) -> float:
    """Mean length of lists, in tokens."""
    return sum(map(len, rows)) / max(1, len(rows))


class MambaFormerTrainer(FiniteLossMixin, Seq2SeqTrainer):
    """
    Train one stage of a MambaFormer.

    Args:
        model (`MambaFormerForConditionalGeneration`): a composed model; what the stage does not train is frozen.
        args (`MambaFormerTrainingArguments`): the stage, the loss weights and all of transformers' own.
        train_dataset, eval_dataset (`datasets.Dataset`): rows of `data.tokenize_qa`. For `distil`, utilities are
            cached as columns first, where they are missing.
        processing_class (`PreTrainedTokenizerBase`): the shared tokenizer.

    Raises:
        ValueError: for a stage that has nothing to train or no loss term to train it by, or a model of another kind.

    Example::

        trainer = MambaFormerTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: MambaFormerTrainingArguments,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        **kwargs: Any,
    ):
        if getattr(model.config, "model_type", None) != "mambaformer":
            raise ValueError(f"model is a {type(model).__name__}: give a MambaFormerForConditionalGeneration.")
        if data_collator is None:
            if processing_class is None:
                raise ValueError("Neither data_collator nor processing_class was given: give the shared tokenizer.")
            data_collator = Collator(processing_class)
        self.weights = {name: getattr(args, f"w_{name}") for name in LOSS_TERMS}
        terms = [name for name, term in LOSS_TERMS.items() if args.stage in term.stages]
        if not any(self.weights[name] for name in terms):
            raise ValueError(f"Stage {args.stage!r} has no loss: give one of {[f'w_{n}' for n in terms]} a weight.")
        share = model.config.expert_budget if args.expert_budget is None else args.expert_budget
        self.routing = RoutingState(share=share, tau=args.tau)
        self.stage_inputs = STAGE_INPUTS[args.stage]
        prepare_stage(model, args)
        if args.stage == "distil":
            model.to(args.device)
            batch_size, folder = args.per_device_eval_batch_size, args.utility_folder
            progress = not args.disable_tqdm and args.local_process_index == 0
            train_dataset, eval_dataset = (
                None if rows is None else add_utilities(model, rows, data_collator, batch_size, folder, progress)
                for rows in (train_dataset, eval_dataset)
            )
            if train_dataset is not None:
                price, costs = price_of(train_dataset, share, model.config.cost_table, args.delta_clip)
                self.routing.price, self.routing.costs = price, costs
        else:
            labelled = "labels" in (getattr(train_dataset, "column_names", None) or ())
            length = mean_length(train_dataset["labels"]) if labelled else model.config.max_target_length / 2
            self.routing.costs = CallCosts.from_table(model.config.cost_table, share, length)
        if args.price != "auto":
            self.routing.price = float(args.price)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # for releases that do not know loss_is_scaled_for_ga
        self._logged: dict[str, dict[str, list]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step: dict[str, list] = defaultdict(list)  # of the micro-batches since the last optimizer step
        self.add_callback(AdaptRouting(self))

    # ---- the loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and the number of answer tokens in them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        tokens = sum((batch["labels"] != -100).sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(tokens).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The stage's weighted loss of a batch.

        A micro-batch counts by its share of the step's answer tokens, so that accumulation gives what one large batch
        would: the mean over tokens.
        """
        plain = self.accelerator.unwrap_model(model)
        known = self.stage_inputs(model, plain, inputs, self.routing, self.args)
        if known.margin is not None and self.routing.price is None:
            self._first_price(known)
            known.price = self.routing.price
        loss, terms = total_loss(known, self.args.stage, self.weights)
        self._record(known, terms, loss)
        if num_items_in_batch is not None:
            micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * known.mask.sum() * micro_batches / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; the router's gradients are averaged by hand where it runs outside the wrapped forward."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        outside = self.args.stage == "distil" and self.accelerator.num_processes > 1
        if outside and self.accelerator.sync_gradients:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """The stage's loss, and with `predict_with_generate` answers generated from the source alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        _, answers, _ = super().prediction_step(model, source, False, ignore_keys, **gen_kwargs)
        return loss, answers, inputs["labels"]

    # ---- price, threshold, temperature

    def _first_price(self, known: LossInputs) -> None:
        """Start the dual ascent at the price an oracle would need on the first batch."""
        price = price_for_share(known.delta, known.mask, self.routing.share, self.routing.costs)
        self.routing.price = float(self.accelerator.gather(torch.tensor([price], device=known.mask.device)).mean())

    def adapt_routing(self) -> None:
        """Move price (joint only), threshold and temperature by what the last step saw, the same on all processes."""
        routing, args = self.routing, self.args
        progress = self.state.global_step / max(1, self.state.max_steps)
        routing.tau = args.tau + (args.tau_final - args.tau) * min(1.0, progress)
        if not self._step["threshold"]:
            return
        seen = torch.tensor([sum(values) / len(values) for values in self._step.values()], device=args.device)
        seen = self.accelerator.gather(seen[None]).mean(0).tolist()
        step = dict(zip(self._step, seen, strict=True))
        self._step.clear()
        for name in ("threshold", "spent"):
            old = getattr(routing, name)
            new = step[name] if old is None else args.share_ema * old + (1 - args.share_ema) * step[name]
            setattr(routing, name, new)
        if args.stage == "joint":
            routing.price = dual_ascent(routing.price, routing.spent, routing.share, args.price_rate)
        self.accelerator.unwrap_model(self.model).config.router_threshold = routing.threshold

    # ---- what is logged

    @torch.no_grad()
    def _record(self, known: LossInputs, terms: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """
        Keep this batch's terms and routing figures, detached, until they are logged.

        `lambda` is in nats per average call, `expected_cost` in average calls a token; beside them, where a cost table
        was measured, the same per and in milliseconds. `share` and `soft_share` are of the answer's tokens; `passes`,
        `caught_up_tokens` and `encoder_calls` are per sequence; gains and `oracle_gap` in nats a token.
        """
        logged = self._logged["train" if self.model.training else "eval"]
        for name, value in terms.items():
            logged[f"loss_{name}"].append(value.float())
        if known.log_p_et5 is not None and self.args.stage == "adapt":
            logged["nll_et5"].append(-known.mean(known.log_p_et5))
            logged["nll_emamba"].append(-known.mean(known.log_p_emamba))
        if known.margin is None:
            return
        token = known.mask.bool()
        chosen, delta = known.choice[token], known.delta[token]
        routed = known.choice == 1  # (B, T)
        position = torch.arange(1, routed.shape[1] + 1, device=routed.device)
        best, won = oracle_gain(delta, chosen)
        spent = known.mean(torch.sigmoid(known.margin) * known.cost)
        figures = {
            "lambda": self.routing.price,
            "tau": self.routing.tau,
            "share": routed.sum() / token.sum(),
            "soft_share": known.mean(torch.sigmoid(known.margin)),
            "expected_cost": spent,
            "passes": routed.sum(-1).float().mean(),
            "caught_up_tokens": (routed * position).amax(-1).float().mean(),
            "encoder_calls": routed.any(-1).float().mean(),
            "oracle_gain": best,
            "router_gain": won,
            "oracle_gap": best - won,
        }
        unit = self.routing.costs.unit_ms
        if unit:
            figures.update({"expected_cost_ms": spent * unit, "lambda_per_ms": self.routing.price / unit})
        for name, value in figures.items():
            logged[name].append(torch.as_tensor(value, dtype=torch.float, device=token.device))
        if self.model.training:
            self._step["threshold"].append(threshold_for_share(known.margin[token], self.routing.share))
            self._step["spent"].append(float(spent))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every recorded figure since the last log, over micro-batches and processes."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._logged[mode].items():
            mean = torch.stack(values).mean()[None].to(self.args.device)
            logs[prefix + name] = float(self.accelerator.gather(mean).mean())
        self._logged[mode].clear()
        super().log(logs, *args, **kwargs)

    # ---- optimizer and checkpoints

    def create_optimizer(self, model=None):
        """The optimizer of the arguments, with router and gate at `router_learning_rate` where that is given."""
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        rate = self.args.router_learning_rate
        if rate is None or getattr(self, "_router_groups", False):
            return optimizer
        self._router_groups = True
        routers = {id(p) for part in (self.model.router, self.model.gate) for p in part.parameters()}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in routers]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in routers]
                rest = {name: value for name, value in group.items() if name not in ("params", "lr")}
                optimizer.add_param_group({**rest, "params": moved, "lr": rate})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        A checkpoint of the run (called from inside) holds what is trained; called by you, the whole model is written,
        its adapters merged, with the tokenizer, and training may go on.
        """
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            merged = copy.deepcopy(self.accelerator.unwrap_model(self.model))
            merge_adapters(merged)
            merged.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        return None

    def save_adapters(self, output_dir: str | None = None, et5: str | None = None, emamba: str | None = None) -> None:
        """
        Write adapters, router, rebuilt embeddings and tokenizer, without the bases' weights, into a folder that
        `from_pretrained` loads; see `adapter_folder.save_adapters`.
        """
        if self.args.should_save:
            plain = self.accelerator.unwrap_model(self.model)
            folder = output_dir or self.args.output_dir
            save_adapters(plain, folder, self.processing_class, et5=et5, emamba=emamba)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_trainable(self.accelerator.unwrap_model(self.model), folder, state_dict)
        (folder / STATE_FILE).write_text(json.dumps(self.routing.to_dict(), indent=1), encoding="utf-8")

    def take_up_ended(self, checkpoint: str) -> bool:
        """
        Where `checkpoint` is of the last step, take up weights, routing and log, and return True.

        transformers, resumed there, would train one step more, unless an epoch ends with it.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        plain = self.accelerator.unwrap_model(self.model if model is None else model)
        load_trainable(plain, resume_from_checkpoint)
        state = Path(resume_from_checkpoint) / STATE_FILE
        self.routing = RoutingState.from_dict(json.loads(state.read_text(encoding="utf-8")))
        if self.routing.threshold is not None:
            plain.config.router_threshold = self.routing.threshold

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
