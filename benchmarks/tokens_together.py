# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What several tokens of one answer cost in one call of EMamba's compiled step, as a multiple of one token.

    python -m mambaformer.benchmarks.tokens_together --tokens 2 3 4 5 8 --rounds 30 --threads 2

Look-ahead decoding pays where this grows more slowly than the tokens that a call is good for. At the size of
mamba-130m with random weights, and for the embedded default's EMamba. All take turns within every round; medians are
compared. Writes `benchmarks/results/tokens_together.json` and `tokens_together.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint

from ..modeling_mambaformer.emamba_decoder import BoundStep, EMambaDecoder
from ..modeling_mambaformer.mamba_mixer import use_selective_scan
from ..modeling_mambaformer.state_log import StateLog
from .machine import command_line, write_table

FORMATS = ("float32", "int8")


def contestant(emamba: MambaForCausalLM, weight_format: str, longest: int) -> tuple[BoundStep, StateLog]:
    """A step with room for `longest` tokens, and a log for their states."""
    cache = DynamicCache(config=emamba.config)
    emamba(torch.arange(8)[None], cache_params=cache, use_cache=True)
    ids = torch.randint(emamba.config.vocab_size, (1, longest))
    step = EMambaDecoder(weight_format).bind(emamba, cache, ids)
    if step is None:
        raise RuntimeError("the compiled decoding step does not apply here")
    return step, StateLog.for_tokens(cache, longest, logs=1)[0]


@torch.no_grad()
def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 3, 4, 5, 8], help="read in one call")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="tokens_together", help="name of the result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    large = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=32128)).eval()
    use_selective_scan(large)
    embedded = MambaFormerForConditionalGeneration.from_pretrained(
        str(embedded_checkpoint()), dtype=torch.float32
    ).eval()
    models = {"mamba-130m's size": large, "the embedded default": embedded.emamba}
    counts = [1, *arguments.tokens]
    parts = {
        (name, weight_format): contestant(model, weight_format, max(counts))
        for name, model in models.items()
        for weight_format in FORMATS
    }
    times: dict[tuple[str, str], dict[int, list[float]]] = {key: {n: [] for n in counts} for key in parts}
    for turn in range(arguments.rounds + 1):
        for key, (step, log) in parts.items():
            step.run(length=1)  # what the contestant before has left in the processor's caches is not its own
            for count in counts:
                start = time.perf_counter()
                step.run(log if count > 1 else None, count)
                if turn:
                    times[key][count].append(1000 * (time.perf_counter() - start))
    rows: list[list[object]] = []
    for (name, weight_format), by_count in times.items():
        one = statistics.median(by_count[1])
        more = [f"{statistics.median(by_count[count]) / one:.2f}" for count in arguments.tokens]
        rows.append([name, weight_format, round(one, 2), *more])
    result: dict[str, object] = {
        "command": command_line("tokens_together", arguments),
        "columns": ["EMamba", "Weights", "ms of one token", *(f"{count} tokens, x" for count in arguments.tokens)],
        "rows": rows,
        "note": f"Medians of {arguments.rounds} rounds, {arguments.threads} thread(s). The embedded default's float32 "
        "weights are read as bfloat16, which holds them exactly.",
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
