# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Rebuild a language model's embedding and head for another vocabulary, out of its own rows.

Choosing or mixing the experts token by token needs one vocabulary. Where EMamba's differs from the shared one, every
shared piece is read as text and spelled by EMamba's own tokenizer:

- one token with exactly that text: its row is copied, bit for bit ("exact");
- several tokens: their rows are averaged, each weighted by how many bytes of the piece it spells ("combined");
- a special token: the row of the token with the same role ("special");
- nothing, a special token without a counterpart (T5's `<extra_id_n>` sentinels) or a row beyond the tokenizer (T5
  checkpoints have 32,128 rows for 32,100 tokens): the mean of the rows of all ordinary tokens ("unmatched").

It leaves the model a start to fine-tune from, not a finished one. This file does not train anything.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .token_text import TokenText

ROLES = ("pad", "eos", "unk", "bos")
KINDS = ("exact", "combined", "special", "unmatched")
ROWS_AT_ONCE = 4096  # bounds the memory of combining


@dataclass(frozen=True)
class VocabularyMap:
    """How each row of the new embedding is made from the old rows.

    Attributes:
        target_rows: rows of the new embedding.
        source_rows: rows that the old embedding has at least: one more than its tokenizer's largest id.
        sources: LongTensor (n,): old rows, those of new row r at `offsets[r]` to `offsets[r + 1]`.
        weights: FloatTensor (n,): their weights, summing to 1 within a row.
        offsets: LongTensor (target_rows + 1,).
        ordinary: LongTensor (m,): old rows whose mean fills the new rows that have no source.
        counts: tokens of the new vocabulary by kind ("exact", "combined", "special", "unmatched"); rows beyond the
            tokenizer are under "padding".
        special_ids: id in the new vocabulary by role ("pad", "eos", "unk", "bos"); None where it has no such token.
        identity: whether both tokenizers give every token the same id.
    """

    target_rows: int
    source_rows: int
    sources: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    offsets: Tensor = field(repr=False)
    ordinary: Tensor = field(repr=False)
    counts: dict[str, int]
    special_ids: dict[str, int | None]
    identity: bool

    @property
    def tokens(self) -> int:
        """Number of tokens of the new vocabulary."""
        return sum(self.counts[kind] for kind in KINDS)

    def describe(self) -> str:
        """Return the report in one sentence."""
        if self.identity:
            return f"The vocabularies agree: all {self.tokens:,} tokens keep their rows."
        share = 100.0 * self.counts["exact"] / max(self.tokens, 1)
        return (
            f"Of {self.tokens:,} shared tokens {self.counts['exact']:,} ({share:.1f} %) have an exact counterpart, "
            f"{self.counts['combined']:,} are combined from several, {self.counts['special']:,} special tokens are "
            f"mapped by role and {self.counts['unmatched']:,} get the mean row, as do {self.counts['padding']:,} rows "
            "beyond the tokenizer."
        )


def plan_transfer(
    source_tokenizer: PreTrainedTokenizerFast, target_tokenizer: PreTrainedTokenizerFast, target_rows: int
) -> VocabularyMap:
    """Plan the rows of a `target_rows`-row embedding for `target_tokenizer` out of those of `source_tokenizer`.

    Args:
        source_tokenizer: the model's own fast tokenizer.
        target_tokenizer: the shared one.
        target_rows: rows of the new embedding; the tokenizer's ids must fit, more rows are allowed.

    Raises:
        ValueError: if a shared token's id does not fit into `target_rows`.
    """
    target_ids = target_tokenizer.get_vocab()
    needed = max(target_ids.values()) + 1
    if target_rows < needed:
        raise ValueError(
            f"target_rows={target_rows} is too small: the shared tokenizer has ids up to {needed - 1}; "
            f"use at least {needed} rows (the row count of ET5's embedding)."
        )
    identity = source_tokenizer.get_vocab() == target_ids
    source = TokenText(source_tokenizer)
    rows: list[list[int]] = [[] for _ in range(target_rows)]
    counts: Counter[str] = Counter(dict.fromkeys((*KINDS, "padding"), 0))
    if identity:
        for index in target_ids.values():
            rows[index] = [index]
        counts["exact"] = len(target_ids)
    else:
        by_role = _special_rows(source_tokenizer, target_tokenizer)
        texts = TokenText(target_tokenizer).texts
        for index in target_ids.values():
            text = texts[index]
            if text is None:
                rows[index] = by_role.get(index, [])
                counts["special" if rows[index] else "unmatched"] += 1
            else:
                rows[index] = source.spell(text)
                counts[_kind(rows[index], text, source)] += 1
    counts["padding"] = target_rows - len(target_ids)
    lengths = torch.tensor([len(row) for row in rows])
    return VocabularyMap(
        target_rows=target_rows,
        source_rows=len(source.texts),
        sources=torch.tensor([index for row in rows for index in row], dtype=torch.long),
        weights=torch.tensor([share for row in rows for share in _shares(row, source)], dtype=torch.float32),
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        ordinary=torch.tensor([index for index, text in enumerate(source.texts) if text is not None]),
        counts=dict(counts),
        special_ids={role: getattr(target_tokenizer, f"{role}_token_id") for role in ROLES},
        identity=identity,
    )


def _special_rows(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """Return the source row of each target token that has a role; the end of sequence stands in for a missing one."""
    found: dict[int, list[int]] = {}
    for role in ROLES:
        wanted, own = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (target, source))
        own = source.eos_token_id if own is None else own
        if wanted is not None and own is not None:
            found.setdefault(wanted, [own])
    return found


def _shares(row: list[int], source: TokenText) -> list[float]:
    """Return the weight of each row of a combination: its token's share of the bytes, a space alone half a byte."""
    if len(row) == 1:
        return [1.0]
    lengths = [max(len((source.texts[index] or b"").strip()), 0.5) for index in row]
    return [length / sum(lengths) for length in lengths]


def _kind(row: list[int], text: bytes, source: TokenText) -> str:
    if not row:
        return "unmatched"
    return "exact" if len(row) == 1 and source.texts[row[0]] == text else "combined"


def transfer_embedding(weight: Tensor, plan: VocabularyMap) -> Tensor:
    """Return the rows of the new vocabulary.

    Args:
        weight: (V_source, ...) old rows, floating point; an embedding, a head's weight or a head's bias.
        plan: what `plan_transfer` made for the tokenizer of `weight`.

    Returns:
        (V_target, ...) in the dtype and on the device of `weight`; copied rows are equal bit for bit. When the
        vocabularies and the numbers of rows agree it is `weight` itself.

    Raises:
        ValueError: if `weight` has fewer rows than the source tokenizer has ids.
    """
    rows = weight.shape[0]
    if rows < plan.source_rows:
        raise ValueError(
            f"the embedding has {rows} rows but its tokenizer has ids up to {plan.source_rows - 1}; "
            "pass the tokenizer that this model was trained with."
        )
    if plan.identity and rows == plan.target_rows:
        return weight
    weight = weight.detach()
    mean = _mean_row(weight, plan.ordinary)  # (...)
    new = mean.to(weight.dtype).expand(plan.target_rows, *weight.shape[1:]).clone()  # (V_target, ...)
    for start in range(0, plan.target_rows, ROWS_AT_ONCE):
        part = new[start : start + ROWS_AT_ONCE]
        offsets = plan.offsets[start : start + len(part) + 1].to(weight.device)
        lengths = offsets.diff()  # (R,)
        sources = plan.sources[offsets[0] : offsets[-1]].to(weight.device)  # (n,)
        weights = plan.weights[offsets[0] : offsets[-1]].to(weight.device)  # (n,)
        owner = torch.repeat_interleave(lengths)  # (n,): the row of `part` that each source belongs to
        shaped = weights.view(-1, *[1] * (weight.dim() - 1))  # (n, 1, ...)
        sums = torch.zeros_like(part, dtype=torch.float32).index_add_(0, owner, weight[sources].float() * shaped)
        part[lengths > 1] = sums[lengths > 1].to(weight.dtype)
        single = lengths == 1
        part[single] = weight[sources[(offsets[:-1] - offsets[0])[single]]]
    return new


def _mean_row(weight: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of some rows in float32, a part at a time: (V, ...) -> (...)."""
    total = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)
    for part in rows.to(weight.device).split(ROWS_AT_ONCE):
        total += weight[part].float().sum(0)
    return total / max(len(rows), 1)


def transfer_vocabulary(mamba_model: PreTrainedModel, plan: VocabularyMap) -> VocabularyMap:
    """Give a causal language model the new vocabulary, in place.

    The input embedding and the head are rebuilt; a head tied to the embedding stays tied, an untied one is rebuilt
    from its own rows (and its bias). `config.vocab_size` and the padding, beginning, end-of-sequence ids of the
    config and of the generation config become those of the new vocabulary.

    Args:
        mamba_model: for example a `MambaForCausalLM`.
        plan: what `plan_transfer` made for the model's tokenizer.

    Returns:
        `plan`, for its report.

    Raises:
        ValueError: if the model's embedding does not fit the plan's source tokenizer.
    """
    embedding = cast(nn.Embedding, mamba_model.get_input_embeddings())
    head = cast(nn.Linear | None, mamba_model.get_output_embeddings())
    tied = head is not None and head.weight is embedding.weight
    _replace(embedding, "weight", plan)
    embedding.num_embeddings = plan.target_rows
    embedding.padding_idx = None
    if head is not None:
        if tied:
            head.weight = embedding.weight
        else:
            _replace(head, "weight", plan)
        if getattr(head, "bias", None) is not None:
            _replace(head, "bias", plan)
        head.out_features = plan.target_rows
    mamba_model.config.get_text_config().vocab_size = plan.target_rows
    for config in (mamba_model.config, getattr(mamba_model, "generation_config", None)):
        if config is not None:
            for role in ("pad", "bos", "eos"):
                setattr(config, f"{role}_token_id", plan.special_ids[role])
    return plan


def _replace(module: nn.Module, name: str, plan: VocabularyMap) -> None:
    """Put the transferred rows into a module's parameter; the parameter itself stays when nothing changes."""
    old = getattr(module, name)
    new = transfer_embedding(old.data, plan)
    if new is not old.data and new.data_ptr() != old.data_ptr():
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def unspellable(tokenizer: PreTrainedTokenizerFast, characters: str) -> list[str]:
    """Return those of `characters` that the tokenizer can only write as its unknown token, each once, in order.

    T5's vocabulary, for example, has no "<", "±", "≥" or "β".
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    distinct = list(dict.fromkeys(characters))
    spelled = tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
    return [character for character, ids in zip(distinct, spelled, strict=True) if unknown in ids]
