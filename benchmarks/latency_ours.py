# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
MambaFormer in the latency benchmark, routed as asked for: random weights would route at random.

Gate and router are computed as ever, by their own code and at their own cost. Only what follows from them is set: the
gate is open for the rows that it shall be open for, and the threshold on the margin is so low or so high at each
position that the tokens of a given list go to ET5 and no others do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configuration.configuration_mambaformer import MambaFormerConfig
from ..modeling_mambaformer.cache_mambaformer import RoutingRequest
from ..modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from ..modeling_mambaformer.quantized_modules import RoundedLinear
from .latency_contestants import SHARE, routed_positions
from .latency_peers import TorchEngine, random_mamba, t5_config, timed_generate

ALWAYS, NEVER = float("-inf"), float("inf")  # thresholds
LINEAR = (nn.Linear, RoundedLinear)
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class PartClock:
    """
    Seconds that passed inside a function, since `seconds` was last set to 0.

    It wraps calls and hangs no hooks on modules, whose compiled passes would step aside for them.
    """

    def __init__(self, device: str):
        self.seconds = 0.0
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `seconds`."""

        @functools.wraps(function)
        def call(*given: Any, **options: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = function(*given, **options)
            self.wait()
            self.seconds += time.perf_counter() - start
            return result

        return call


@dataclass
class ScheduledRequest(RoutingRequest):
    """A request whose threshold sends the tokens after `positions` to ET5, and no others."""

    positions: frozenset[int] = frozenset()

    def threshold_at(self, position: int) -> float:
        return ALWAYS if position in self.positions else NEVER


class ScheduledMambaFormer(MambaFormerForConditionalGeneration):
    """A MambaFormer whose gate is open for the first `open_rows` sources, and which routes `positions` to ET5."""

    open_rows: int = 0
    positions: frozenset[int] = frozenset()
    clocks: dict[str, PartClock] | None = None  # `encoder_seconds` and `pass_seconds`, of ET5

    def _gate_logits(self, at_source_end, scalars):
        computed = super()._gate_logits(at_source_end, scalars)  # (B,)
        wanted = torch.arange(len(computed), device=computed.device) < self.open_rows  # (B,)
        return torch.where(wanted, computed.abs() + 1, -computed.abs() - 1)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *rest):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        cache = model_kwargs["past_key_values"]
        cache.request = ScheduledRequest(**vars(cache.request), positions=self.positions)
        if self.clocks:
            cache.et5.encode = self.clocks["encoder_seconds"].timed(cache.et5.encode)
            cache.et5.decode = self.clocks["pass_seconds"].timed(cache.et5.decode)


class OurMambaFormer(TorchEngine):
    """
    A composed MambaFormer.

    Args:
        weights: in which EMamba is held, `float32`, `int8` or `int4`; with the latter two an ET5 that is asked is held
            in int8. decode: what EMamba decodes with on a CPU, see `pack_emamba`. et5: the size of ET5; `none` for a
            contestant that never asks it.
    """

    model: ScheduledMambaFormer

    def __init__(self, setup: dict[str, Any], weights: str, decode: str, et5: str):
        super().__init__(setup)
        self.weights, self.decode, self.et5 = weights, decode, et5

    def prepare(self) -> None:
        """Compose random experts, EMamba being the Mamba of the other contestants, and write the checkpoint."""
        emamba = random_mamba(self.sizes)
        config = MambaFormerConfig(
            et5=t5_config(self.sizes, self.et5).to_dict(), emamba=emamba.config.to_dict(), gate_threshold=0.0
        )
        model = MambaFormerForConditionalGeneration(config).eval()
        model.emamba.load_state_dict(emamba.state_dict())
        if self.weights != "float32":
            model.quantize(self.weights, et5=None if self.et5 == "none" else "int8")
        model.save_pretrained(self.folder)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint; returns sizes too, from which the least possible time follows."""
        figures = self.place(ScheduledMambaFormer.from_pretrained(self.folder))
        model = self.model
        if self.decode != "float32":
            model.pack_emamba(self.decode)
        packed = model.emamba_decoder.prepare(model.emamba)
        self.clocks = model.clocks = {
            "encoder_seconds": PartClock(self.setup["device"]),
            "pass_seconds": PartClock(self.setup["device"]),
        }
        layers = [getattr(block.mixer, name) for block in model.emamba.base_model.layers for name in PROJECTIONS]
        encoder = [x for x in model.et5.encoder.modules() if isinstance(x, LINEAR)]
        attentions = [block.layer[1].EncDecAttention for block in model.et5.decoder.block]
        of_source = {projection for x in attentions for projection in (x.k, x.v)}  # made once, beside the encoder
        decoder = [x for x in model.et5.decoder.modules() if isinstance(x, LINEAR) and x not in of_source]
        inner = model.et5.config.num_heads * model.et5.config.d_kv
        return {
            **figures,
            "step_bytes": packed.step_bytes if packed else None,
            "rounded": self.weights != "float32",
            "source_products": sum(x.in_features * x.out_features for x in layers),
            "encoder_products": sum(x.in_features * x.out_features for x in (*encoder, *of_source)),
            "encoder_pair_products": 2 * inner * model.et5.config.num_layers,
            "pass_bytes": sum(parameter.nbytes for x in (*decoder, model.et5.lm_head) for parameter in x.parameters()),
        }

    def answer(
        self,
        length: int,
        new_tokens: int,
        turn: int,
        batch: int = 1,
        routing: str = "auto",
        share: float = SHARE,
        burst: int = 1,
        open_rows: int | None = None,
    ) -> dict[str, Any]:
        """
        One answer, timed, with what ET5 did for it.

        Args:
            share, burst, turn: which tokens ET5 writes, see `routed_positions`. open_rows: the first so many rows may
                ask it; default all.

        Raises:
            RuntimeError: where ET5 did not write just these tokens.
        """
        model = self.model
        positions = routed_positions(new_tokens, share, burst, turn)
        model.open_rows = batch if open_rows is None else open_rows
        model.positions = frozenset(positions)
        for clock in self.clocks.values():
            clock.seconds = 0.0
        figures, output = timed_generate(
            model, self.ids(length, batch), new_tokens, routing=routing, expert_budget=1.0
        )
        trace, cache = output.route_trace, output.past_key_values
        for clocked in ("encode", "decode"):  # which hold the object that holds them, and its memory with it
            vars(cache.et5).pop(clocked, None)
        asked = model.open_rows if routing == "auto" else 0
        wanted = [positions if row < asked else [] for row in range(batch)]
        if (found := [row.nonzero().flatten().tolist() for row in trace.expert == 1]) != wanted:
            raise RuntimeError(f"ET5 wrote the tokens {found} where {wanted} were asked of it")
        parts = [part for layer in cache.emamba.layers for part in (layer.conv_states, layer.recurrent_states)]
        states = [state for part in parts for state in part.values()]
        figures["state_bytes"] = sum(state.nbytes for state in states) // batch
        figures["et5_share"] = trace.et5_share().mean().item()
        for name in ("et5_passes", "et5_tokens", "encoder_calls"):
            figures[name] = trace[name].sum().item()
        figures.update({name: clock.seconds for name, clock in self.clocks.items()})
        return self.finish(figures)
