# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
ET5 on demand: its encoder runs at most once a source, its decoder only for the rows that ask.

Rows of a batch reach different positions. A call for some rows runs those rows only, from the smallest position that
they have reached, in one multi-token decoder pass that catches up what they skipped.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from .et5_encoder import ET5Encoder
from .et5_pass import MOST_TOKENS, BoundET5, ET5Decoder, PackedET5, PassMemory, head_scale, run_pass
from .et5_source import read_sources
from .sources import Sources
from .weight_arena import large_zeros


def head_logits(et5: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """ET5's logits `(R, T, V)` from final decoder states `(R, T, D)`."""
    scale = head_scale(et5)
    return et5.lm_head(hidden if scale == 1.0 else hidden * scale)


class LazyET5State:
    """
    ET5's memory for the sources and rows of one request.

    Args:
        sources: the B0 source texts.
        row_source: `(B,)` long, the source of each row; several rows may share one (beams, returned sequences).

    Which rows and sources have come how far is known outside of the device, so that nobody waits for it to tell.
    """

    def __init__(self, sources: Sources, row_source: torch.Tensor):
        self.sources = sources
        self.row_source = row_source
        self.source_of: list[int] = row_source.tolist()
        self.encoder_states: torch.Tensor | None = None  # (B0, S, D)
        self.encoded: set[int] = set()  # sources that the encoder has read
        self.crossed: set[int] = set()  # those whose keys and values are in `cross`
        self.cross: list[tuple[torch.Tensor, torch.Tensor]] = []  # per layer (B0, H, S, K)
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []  # per layer (B, H, capacity, K)
        self.memory: PassMemory | None = None  # `own` and `cross` for compiled passes, while nobody replaces them
        self.reached = [0] * len(self.source_of)  # decoder positions done, per row

    def rewind(self) -> None:
        """Forget all decoding; what the encoder has read stays."""
        self.own, self.memory = [], None
        self.reached = [0] * len(self.reached)

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep `rows` `(B',)`, which may repeat or reorder."""
        self.row_source = self.row_source[rows]
        order = rows.tolist()
        self.source_of, self.reached = ([kept[row] for row in order] for kept in (self.source_of, self.reached))
        self.own, self.memory = [(keys[rows], values[rows]) for keys, values in self.own], None

    def adopt(self, states: torch.Tensor) -> None:
        """Take encoder states `(B0, S, D)` that the caller already has."""
        self.encoder_states = states
        self.encoded = set(range(len(states)))

    def encode(self, et5: PreTrainedModel, wanted: Iterable[int], encoder: ET5Encoder | None = None) -> list[int]:
        """
        Run the encoder for those of the sources `wanted` that it has not read; returns which.

        Args:
            encoder: runs it in compiled code where it can; `None` runs the modules.
        """
        missing = sorted(set(wanted) - self.encoded)
        if not missing:
            return missing
        mask = self.sources.attention_mask[missing]  # (n, S)
        columns = mask.any(0).nonzero().flatten()
        low, high = int(columns[0]), int(columns[-1]) + 1  # what only other rows pad is not read
        ids, mask = self.sources.input_ids[missing, low:high], mask[:, low:high]
        states = None if encoder is None else encoder.encode(et5, ids, mask)  # (n, high - low, D)
        if states is None:
            states = et5.encoder(input_ids=ids, attention_mask=mask)[0]
        self.encoded.update(missing)
        size = self.sources.input_ids.shape
        if states.shape[:2] == size:  # all sources, in their order
            self.encoder_states = states
            return missing
        if self.encoder_states is None:
            self.encoder_states = states.new_zeros(*size, states.shape[-1])  # (B0, S, D)
        self.encoder_states[missing, low:high] = states
        return missing

    def decode(
        self,
        et5: PreTrainedModel,
        decoder_ids: torch.Tensor,
        rows: list[int],
        end: int,
        keep_from: int,
        decoder: ET5Decoder | BoundET5 | None = None,
    ) -> tuple[torch.Tensor, int]:
        """
        One decoder pass for the R `rows` over the positions they have not reached, up to `end` (exclusive).

        Args:
            decoder_ids: `(B, end or more)` long, all decoder input so far.
            keep_from: first position whose logits are wanted.
            decoder: runs the pass in compiled code where it can; `None` runs the modules.

        Returns:
            logits `(R, end - keep_from, V)`, and the number of positions computed for each of the rows.
        """
        start = min(self.reached[row] for row in rows)
        source = [self.source_of[row] for row in rows]
        crossed = self.crossed.issuperset(source)
        if decoder is not None and len(rows) * (end - start) <= MOST_TOKENS:
            packed = decoder.packed(et5, check=not crossed) if self.memory or self._is_plain() else None
            if packed is not None:
                return self._decode_compiled(packed, decoder_ids, rows, start, end, keep_from), end - start
        past = DynamicCache(config=et5.decoder.config)
        if start:
            for layer, (keys, values) in enumerate(self.own):
                past.update(keys[rows, :, :start], values[rows, :, :start], layer)
        cross = DynamicCache(config=et5.decoder.config)
        if crossed:
            for layer, (keys, values) in enumerate(self.cross):
                cross.update(keys[source], values[source], layer)
        cache = EncoderDecoderCache(past, cross)
        hidden = et5.decoder(
            input_ids=decoder_ids[rows, start:end],
            encoder_hidden_states=self.encoder_states[source],
            encoder_attention_mask=self.sources.attention_mask[source],
            past_key_values=cache,
            use_cache=True,
        )[0]  # (R, end - start, D)
        self._keep(cache, rows, source, start, end)
        return head_logits(et5, hidden[:, keep_from - start :]), end - start

    def _is_plain(self) -> bool:
        """Whether all that is kept is float32 memory of a CPU."""
        kept = [self.encoder_states, *(x for pair in self.own + self.cross for x in pair)]
        return all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in kept)

    def _read_sources(self, packed: PackedET5, missing: list[int]) -> None:
        """Make what all layers look at in the sources `missing`."""
        if not self.cross:
            model, (count, length) = packed.model, self.encoder_states.shape[:2]
            shape = (len(packed.layers), 2, count, model.heads, length, model.width)  # (L, 2, B0, H, S, K)
            # In one piece: pieces for each layer would leave holes, in all half as large as what is kept.
            self.cross = [(keys, values) for keys, values in large_zeros(shape)]
        read_sources(packed, self.encoder_states, self.sources.attention_mask, missing, self.cross)
        self.crossed.update(missing)

    def _decode_compiled(
        self, packed: PackedET5, decoder_ids: torch.Tensor, rows: list[int], start: int, end: int, keep_from: int
    ) -> torch.Tensor:
        """Logits `(R, end - keep_from, V)`, the pass being one over the positions from `start` on."""
        source = [self.source_of[row] for row in rows]
        if not self.crossed.issuperset(source):
            self._read_sources(packed, sorted(set(source) - self.crossed))
        if end > (self.own[0][0].shape[2] if self.own else 0):
            like, count = self.cross[0][0], len(self.reached)
            old = self.own or [(None, None)] * len(self.cross)
            self.own, self.memory = [tuple(grown(x, like, count, end) for x in pair) for pair in old], None
        if self.memory is None or self.memory.packed is not packed:
            self.memory = PassMemory(packed, self.own, self.cross, self.sources.attention_mask)
        self._reach(rows, end)
        return run_pass(self.memory, decoder_ids, rows, source, start, end, end - keep_from)

    def _reach(self, rows: list[int], end: int) -> None:
        """Note that `rows` have done all positions before `end`."""
        for row in rows:
            self.reached[row] = end

    def _keep(self, cache: EncoderDecoderCache, rows: list[int], source: list[int], start: int, end: int) -> None:
        """Write the keys and values of a pass back to the rows and the sources it ran for."""
        self.memory = None
        layers = cache.self_attention_cache.layers
        capacity = self.own[0][0].shape[2] if self.own else 0
        if end > capacity:
            self.own = [
                tuple(grown(self.own[i][j] if self.own else None, tensor, len(self.reached), end) for j, tensor in
                      enumerate((layer.keys, layer.values)))
                for i, layer in enumerate(layers)
            ]  # fmt: skip
        for (keys, values), layer in zip(self.own, layers, strict=True):
            keys[rows, :, start:end] = layer.keys[:, :, start:]
            values[rows, :, start:end] = layer.values[:, :, start:]
        self._reach(rows, end)
        if not self.crossed.issuperset(source):
            count = len(self.sources.input_ids)
            cross_layers = cache.cross_attention_cache.layers
            if not self.cross:
                self.cross = [
                    (
                        layer.keys.new_zeros(count, *layer.keys.shape[1:]),
                        layer.values.new_zeros(count, *layer.values.shape[1:]),
                    )
                    for layer in cross_layers
                ]
            for (keys, values), layer in zip(self.cross, cross_layers, strict=True):
                keys[source], values[source] = layer.keys, layer.values
            self.crossed.update(source)


def grown(old: torch.Tensor | None, like: torch.Tensor, rows: int, needed: int) -> torch.Tensor:
    """A `(rows, H, capacity, K)` buffer with room for `needed` positions and growth, holding what `old` held."""
    buffer = like.new_zeros(rows, like.shape[1], max(16, 2 * needed), like.shape[3])
    if old is not None:
        buffer[:, :, : old.shape[2]] = old
    return buffer


def decode_together(
    et5: PreTrainedModel,
    sources: Sources,
    rows: torch.Tensor,
    decoder_ids: torch.Tensor,
    decoder_mask: torch.Tensor | None,
    keep: int,
    encoder_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One differentiable pass of encoder and decoder for `rows` `(R,)`, without a cache.

    Args:
        decoder_ids, decoder_mask: `(B, T)`. keep: how many of the last positions' logits to compute, 0 for all.
        encoder_states: `(B, S, D)`, the encoder's output where the caller already has it.

    Returns:
        logits `(R, keep or T, V)` and the encoder states of `rows`, `(R, S, D)`.
    """
    mask = sources.attention_mask[rows]
    if encoder_states is None:
        states = et5.encoder(input_ids=sources.input_ids[rows], attention_mask=mask)[0]  # (R, S, D)
    else:
        states = encoder_states[rows]
    hidden = et5.decoder(
        input_ids=decoder_ids[rows],
        attention_mask=None if decoder_mask is None else decoder_mask[rows],
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        use_cache=False,
    )[0]  # (R, T, D)
    return head_logits(et5, hidden[:, -keep:] if keep else hidden), states
