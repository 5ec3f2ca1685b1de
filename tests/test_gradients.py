# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Gradients: what trains what, and that a loss is the loss it says it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixed_routing import ET5, mixed_model, random_targets
from tiny_experts import VOCAB, random_batch
from transformers import MambaForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration

LENGTHS = [7, 3, 11, 5]


@pytest.fixture(scope="module")
def composed(et5_folder, emamba_folder):
    return mixed_model(et5_folder, emamba_folder)


@pytest.fixture
def mixed(composed):
    """The model without gradients, not training."""
    yield composed.eval()
    composed.zero_grad()
    composed.gradient_checkpointing_disable()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return random_batch(LENGTHS, seed=1)


def labels(seed: int = 9) -> torch.Tensor:
    """Targets `(4, 9)` of different lengths, padded with -100."""
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate((9, 4, 6, 8)):
        ids[row, length - 1], ids[row, length:] = 1, -100
    return ids


def silent(module: torch.nn.Module) -> list[str]:
    """Trainable parameters without a gradient."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def check_gradient(name: str, gradient: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 1e-4 of the largest value of the tensor."""
    scale, difference = float(expected.abs().max()), float((gradient - expected).abs().max())
    assert difference <= 1e-4 * max(scale, 1), f"{name} differs by {difference}, its largest value is {scale}"


def test_soft_routing_trains_everything(mixed, batch):
    """In training the default is soft: both experts and the router get a gradient, the gate has a loss of its own."""
    mixed.train()
    output = mixed(**batch, labels=labels())
    assert (output.route_trace.et5_passes == 1).all() and output.past_key_values is None
    output.loss.backward()
    assert silent(mixed.et5) == silent(mixed.emamba) == silent(mixed.router) == []
    assert all(parameter.grad is None for parameter in mixed.gate.parameters())
    for parameter in mixed.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_gate_trains_on_its_logit(mixed, batch):
    mixed(**batch, labels=labels()).gate_logit.sum().backward()
    assert silent(mixed.gate) == []
    assert silent(mixed.emamba) == [name for name, _ in mixed.emamba.named_parameters()], "the gate only reads EMamba"


def test_margin_trains_the_router_alone(mixed, batch):
    mixed.train()
    output = mixed(**batch, labels=labels(), output_experts=True)
    output.margin.sum().backward()
    assert silent(mixed.router) == []
    assert silent(mixed.emamba) == [name for name, _ in mixed.emamba.named_parameters()], (
        "the router only reads EMamba"
    )


def test_loss_is_the_mixture_likelihood(mixed, batch):
    gold = labels()
    output = mixed(**batch, labels=gold, routing="soft", output_experts=True)
    phi = torch.sigmoid(output.margin.double())[..., None]
    p = phi * output.et5_logits.double().softmax(-1) + (1 - phi) * output.emamba_logits.double().softmax(-1)
    known = gold != -100
    likelihood = p.gather(-1, gold.clamp(min=0)[..., None]).squeeze(-1)[known]
    torch.testing.assert_close(output.loss.double(), -likelihood.log().mean(), atol=1e-5, rtol=0)


def test_labels_make_the_decoder_inputs(mixed, batch):
    gold = labels()
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), gold[:, :-1]], 1).masked_fill_(
        F.pad(gold[:, :-1], (1, 0), value=0) == -100, 0
    )
    from_labels = mixed(**batch, labels=gold, routing="soft")
    given = mixed(**batch, decoder_input_ids=ids, use_cache=False, routing="soft")
    assert from_labels.logits.shape == (4, 9, VOCAB)
    torch.testing.assert_close(from_labels.logits, given.logits)


@pytest.mark.parametrize("routing", ["et5", "emamba"])
def test_forced_gradients_are_the_experts_own(mixed, batch, et5_folder, emamba_folder, routing):
    """The gradient of a forced loss is the plain expert's, and nobody else has one."""
    gold = labels()
    mixed(**batch, labels=gold, routing=routing).loss.backward()
    if routing == "et5":
        plain, ours, others = T5ForConditionalGeneration.from_pretrained(et5_folder), mixed.et5, mixed.emamba
        plain(**batch, labels=gold).loss.backward()
    else:
        plain, ours, others = MambaForCausalLM.from_pretrained(emamba_folder), mixed.emamba, mixed.et5
        decoder_ids = mixed.prepare_decoder_input_ids_from_labels(gold)
        losses = []
        for row in range(4):
            source = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            logits = plain(torch.cat([source, decoder_ids[row]])[None]).logits[0, -9:]
            losses.append(F.cross_entropy(logits, gold[row], reduction="sum"))
        (sum(losses) / (gold != -100).sum()).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        check_gradient(name, parameter.grad, expected[name].grad)
    assert all(p.grad is None or not p.grad.any() for p in others.parameters())
    assert all(p.grad is None or not p.grad.any() for p in mixed.router.parameters())


def test_routed_tokens_train_et5_alone(mixed, batch):
    """With `select` a routed token's loss is ET5's, any other's EMamba's."""
    output = mixed(**batch, decoder_input_ids=random_targets(4, 9), use_cache=False, routing="auto")
    routed = output.route_trace.expert == ET5
    assert routed.any() and not routed.all()
    output.logits[routed].sum().backward()
    assert silent(mixed.et5) == [] and silent(mixed.emamba) == [n for n, _ in mixed.emamba.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("routing", ["soft", "auto", "et5", "emamba"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_targets_change_nothing_before_them(mixed, side, routing):
    """A target padded on the right gives what the target alone gives, with a decoder mask or without."""
    batch = random_batch(LENGTHS, seed=1, side=side)
    ids, kept = random_targets(4, 9), 6
    short = mixed(**batch, decoder_input_ids=ids[:, :kept], use_cache=False, routing=routing)
    padded = ids.clone()
    padded[:, kept:] = 0
    mask = torch.ones_like(ids)
    mask[:, kept:] = 0
    for options in ({}, {"decoder_attention_mask": mask}):
        output = mixed(**batch, decoder_input_ids=padded, use_cache=False, routing=routing, **options)
        torch.testing.assert_close(output.logits[:, :kept], short.logits, atol=1e-4, rtol=0)
        assert torch.equal(output.route_trace.expert[:, :kept], short.route_trace.expert)


@torch.no_grad()
def test_ignored_labels_do_not_count(mixed, batch):
    gold = labels()
    whole = mixed(**batch, labels=gold, routing="soft").loss
    wider = mixed(**batch, labels=F.pad(gold, (0, 3), value=-100), routing="soft").loss
    torch.testing.assert_close(wider, whole)
    total = 0
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        total += mixed(**one, labels=gold[row : row + 1], routing="soft").loss * (gold[row] != -100).sum()
    torch.testing.assert_close(total / (gold != -100).sum(), whole)


def test_gradient_checkpointing_changes_no_gradient(mixed, batch):
    def gradients():
        mixed.zero_grad()
        mixed(**batch, labels=labels()).loss.backward()
        return {name: p.grad.clone() for name, p in mixed.named_parameters() if p.grad is not None}

    mixed.train()
    expected = gradients()
    mixed.gradient_checkpointing_enable()
    assert mixed.is_gradient_checkpointing
    for name, gradient in gradients().items():
        check_gradient(name, gradient, expected[name])


def test_trainer_divides_by_the_accumulation_steps(mixed, tmp_path):
    """The loss is a mean: told otherwise, transformers' Trainer would take steps larger by the accumulation."""
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert Seq2SeqTrainer(mixed, arguments).model_accepts_loss_kwargs is False
