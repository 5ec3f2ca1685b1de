# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The adapted Mamba mixer against transformers' own, and its continuation from a cached state."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from mambaformer.modeling_mambaformer.mamba_mixer import SelectiveScanMixer, use_selective_scan
from mambaformer.modeling_mambaformer.native_library import LIBRARY

VOCABULARY, LENGTH = 60, 13


@pytest.fixture(
    params=[pytest.param("native", marks=pytest.mark.skipif(LIBRARY is None, reason="not built")), "torch"]
)
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("MAMBAFORMER_SCAN", request.param)
    return request.param


def make_model(**changes) -> MambaForCausalLM:
    """A small Mamba whose state matters: strong inputs to the scan and slow decay, unlike a fresh model's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4}
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = MambaForCausalLM(MambaConfig(**{**sizes, **ends, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj.weight" in name or "conv1d" in name:
                parameter.normal_(std=1.0 if "dt_proj" in name else 0.4)
            if "A_log" in name:
                parameter.sub_(1.5)
    return model


@pytest.fixture(scope="module")
def plain() -> MambaForCausalLM:
    return make_model()


@pytest.fixture
def adapted(plain) -> MambaForCausalLM:
    model = copy.deepcopy(plain)
    assert use_selective_scan(model) == 3
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def continued(model, cache, ids, mask=None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, cache_params=cache, use_cache=True).logits


def error(actual, expected) -> float:
    return (actual - expected).abs().max().item()


def test_equals_transformers_with_gradients(backend, plain, adapted, ids):
    plain = copy.deepcopy(plain)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for model in (plain, adapted):
        logits = model(ids, attention_mask=mask).logits
        (logits.log_softmax(-1)[..., 7] * mask).mean().backward()
    assert error(model(ids).logits, plain(ids).logits) < 1e-4
    assert error(logits[mask.bool()], plain(ids, attention_mask=mask).logits[mask.bool()]) < 1e-4
    expected = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        scale = expected[name].grad.abs().max()
        assert scale > 0, name
        assert error(parameter.grad, expected[name].grad) < 1e-4 * scale, name


def test_any_split_equals_one_pass(backend, plain, adapted, ids):
    whole = plain(ids).logits.detach()
    for split in ([5, 8], [1, 12], [12, 1], [3, 1, 4, 5], [2, 2, 9], [1] * LENGTH):
        cache, logits = DynamicCache(config=adapted.config), []
        for chunk in ids.split(split, dim=1):
            logits.append(continued(adapted, cache, chunk))
        assert error(torch.cat(logits, 1), whole) < 1e-4, split


def test_the_split_test_can_fail(adapted, ids):
    """Starting a continued chunk from a zero state, as transformers does, is far beyond the tolerance used here."""
    cache = DynamicCache(config=adapted.config)
    first = continued(adapted, cache, ids[:, :5])
    for layer in cache.layers:
        layer.recurrent_states[0].zero_()
    assert error(torch.cat([first, continued(adapted, cache, ids[:, 5:])], 1), adapted(ids).logits) > 0.1


def test_left_padded_equals_alone(backend, plain, adapted, ids):
    pads = [0, 3, 11]
    rows, mask = ids.clone(), torch.ones_like(ids)
    for row, count in enumerate(pads):
        rows[row] = torch.cat([torch.full((count,), 5), ids[row, : LENGTH - count]])
        mask[row, :count] = 0
    cache = DynamicCache(config=adapted.config)
    logits = continued(adapted, cache, rows, mask)
    then = continued(adapted, cache, ids[:, :1])
    for row, count in enumerate(pads):
        alone = plain(torch.cat([rows[row, count:], ids[row, :1]])[None]).logits[0]
        assert error(torch.cat([logits[row, count:], then[row]]), alone) < 1e-4


@pytest.mark.parametrize("full_length_mask", [False, True])
def test_left_padded_continuation_equals_alone(backend, plain, adapted, ids, full_length_mask):
    """A question behind a shared document: rows differ in length, one has no new token at all."""
    document, new = ids[:, :6], ids[:, 6:]
    pads = [0, 2, new.shape[1]]
    rows, mask = new.clone(), torch.ones_like(new)
    for row, count in enumerate(pads):
        rows[row] = torch.cat([torch.full((count,), 5), new[row, : new.shape[1] - count]])
        mask[row, :count] = 0
    cache = DynamicCache(config=adapted.config)
    continued(adapted, cache, document)
    passed = torch.cat([torch.ones_like(document), mask], 1) if full_length_mask else mask
    logits = continued(adapted, cache, rows, passed)
    then = continued(adapted, cache, ids[:, :2])
    for row, count in enumerate(pads):
        alone = plain(torch.cat([document[row], rows[row, count:], ids[row, :2]])[None]).logits[0, 6:]
        assert error(torch.cat([logits[row, count:], then[row]]), alone) < 1e-4


def test_masked_single_token_leaves_the_state_alone(backend, adapted, ids):
    cache = DynamicCache(config=adapted.config)
    continued(adapted, cache, ids[:, :6])
    before = [layer.recurrent_states[0].clone() for layer in cache.layers]
    continued(adapted, cache, ids[:, 6:7], torch.tensor([[1], [0], [1]]))
    for layer, old in zip(cache.layers, before, strict=True):
        assert error(layer.recurrent_states[0][1], old[1]) == 0
        assert error(layer.recurrent_states[0][0], old[0]) > 1e-3
    with pytest.raises(ValueError, match="attention_mask has 2 columns for 3 tokens"):
        continued(adapted, cache, ids[:, 7:10], torch.ones(3, 2))


@pytest.mark.parametrize("changes", [{}, {"use_conv_bias": False}, {"use_bias": True}, {"hidden_act": "relu"}])
def test_token_steps(backend, ids, changes):
    model = make_model(**changes)
    whole = model(ids).logits
    use_selective_scan(model)
    cache = DynamicCache(config=model.config)
    steps = [continued(model, cache, token) for token in ids.split(1, dim=1)]
    assert error(torch.cat(steps, 1), whole) < 1e-4


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generates_the_same_tokens(backend, plain, adapted, ids, arguments):
    mask = torch.ones_like(ids)
    mask[2, :5] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | arguments
    assert torch.equal(adapted.generate(ids, **arguments), plain.generate(ids, **arguments))


def test_gradients_flow_through_a_cached_state(backend, adapted, ids):
    """With gradients on, a continued chunk trains what read the first one."""
    embedded = adapted.get_input_embeddings()(ids).detach().requires_grad_()
    whole = torch.autograd.grad(adapted(inputs_embeds=embedded).logits[:, 5:].square().sum(), embedded)[0]
    mixer = adapted.backbone.layers[0].mixer
    hidden = torch.randn(1, LENGTH, 36, generator=torch.Generator().manual_seed(2)).requires_grad_()
    cache = DynamicCache(config=adapted.config)
    first = mixer(hidden[:, :5], cache_params=cache)
    second = mixer(hidden[:, 5:], cache_params=cache)
    expected = torch.autograd.grad(mixer(hidden).square().sum(), hidden)[0]
    actual = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), hidden)[0]
    assert whole.abs().max() > 0
    assert error(actual, expected) < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("adapt_first", [False, True])
def test_lora_adapters_receive_gradients(backend, plain, ids, adapt_first):
    model = copy.deepcopy(plain)
    if adapt_first:
        use_selective_scan(model)
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj", "x_proj"], init_lora_weights=False))
    if not adapt_first:
        assert use_selective_scan(lora) == 3
    lora(ids).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in lora.named_parameters() if "lora_" in name}
    assert len(gradients) == 3 * 2 * 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_adapting_keeps_everything_else(plain):
    model = copy.deepcopy(plain)
    calls = []
    model.backbone.layers[1].mixer.register_forward_hook(lambda *_: calls.append(1))
    keys, weights = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    assert use_selective_scan(nn.ModuleDict({"any": model})) == 3
    assert use_selective_scan(model) == 0
    assert list(model.state_dict()) == keys and [p.data_ptr() for p in model.parameters()] == weights
    assert all(isinstance(layer.mixer, SelectiveScanMixer) for layer in model.backbone.layers)
    model(torch.ones(1, 2, dtype=torch.long))
    assert calls == [1]


def test_bfloat16_module(backend, ids):
    exact = make_model(num_hidden_layers=1)
    expected = exact(ids).logits
    own = copy.deepcopy(exact).bfloat16()
    theirs = error(own(ids).logits, expected)
    use_selective_scan(own)
    assert own(ids).logits.isfinite().all()
    assert error(own(ids).logits, expected) < 1.5 * theirs
    cache = DynamicCache(config=own.config)
    chunks = [continued(own, cache, chunk) for chunk in ids.split([6, 1, 6], dim=1)]
    assert error(torch.cat(chunks, 1), expected) < 2 * theirs


def test_autocast(backend, adapted, ids):
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(ids, labels=ids).loss
        cache = DynamicCache(config=adapted.config)
        steps = torch.cat([continued(adapted, cache, chunk) for chunk in ids.split([11, 1, 1], dim=1)], 1)
    loss.backward()
    exact = adapted(ids, labels=ids)
    assert abs(loss.item() - exact.loss.item()) < 0.1 * loss.item()
    assert (steps - exact.logits).abs().mean() < 0.1 * exact.logits.abs().mean()


def test_compiled_forward(ids):
    model = make_model(num_hidden_layers=1, use_cache=False)
    use_selective_scan(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert error(compiled(ids).logits, model(ids).logits) < 1e-4
