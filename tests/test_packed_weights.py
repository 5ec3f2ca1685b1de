# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""How the compiled step's weights are packed: what is read from where, and how many threads that is worth."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import VOCAB, tiny_emamba
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from mambaformer.modeling_mambaformer.emamba_decoder import EMambaDecoder
from mambaformer.modeling_mambaformer.mamba_mixer import use_selective_scan
from mambaformer.modeling_mambaformer.packed_weights import (
    BFLOAT16,
    DECODE_LIBRARY,
    FLOAT32,
    PANELS,
    ROWS_AT_A_TIME,
    PackedWeights,
    row_sums,
)

pytestmark = pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled decoding step is not built")


@pytest.mark.parametrize("rows", [0, 1, ROWS_AT_A_TIME, 2 * ROWS_AT_A_TIME + 3])
def test_rows_are_summed_some_at_a_time(rows):
    whole = torch.randint(-127, 128, (rows, 70), dtype=torch.int8)
    sums = row_sums(whole)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), whole.long().sum(1))


def test_a_small_step_takes_few_threads():
    """And more where there is work for them, as many as PyTorch has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "state_size": 16}
    config = MambaConfig(vocab_size=8000, **sizes)
    packed, before = PackedWeights(MambaForCausalLM(config), "float32"), torch.get_num_threads()
    assert 4e6 < packed.products < 5e6
    try:
        for threads in (1, 2, 3, 6):
            torch.set_num_threads(threads)
            assert [packed.threads(tokens) for tokens in (1, 2, 100)] == [min(2, threads), min(4, threads), threads]
    finally:
        torch.set_num_threads(before)


def test_float32_reads_half_the_bytes_where_bfloat16_holds_every_value():
    """And says what the modules say, to what the order of a sum changes."""
    emamba = tiny_emamba(layers=3)
    use_selective_scan(emamba)
    whole = EMambaDecoder().prepare(emamba).step_bytes
    emamba.to(torch.bfloat16).float()
    odd = emamba.backbone.layers[1].mixer.out_proj  # one value of one matrix
    with torch.no_grad():
        odd.weight[-1, -1] += 1e-5
    decoder = EMambaDecoder()
    packed = decoder.prepare(emamba)
    formats = [layer.out_proj.format for layer in packed.layers]
    assert formats == [BFLOAT16, FLOAT32, BFLOAT16] and packed.args.head.format == PANELS
    assert packed.step_bytes < 0.6 * whole + odd.weight.nbytes
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        caches = [DynamicCache(config=emamba.config) for _ in range(2)]
        for cache in caches:
            emamba(ids[:, :4], cache_params=cache, use_cache=True)
        wanted = emamba(ids[:, 4:5], cache_params=caches[0], use_cache=True).logits
        found = decoder.step(emamba, caches[1], ids[:, 4:5])[1]
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
