# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Tokens a second of the embedded default with look-ahead decoding and without it, on held-out questions of DentalQA.

    python -m mambaformer.benchmarks.look_ahead --splits test_long test_phrasing --widths 4 8 --rows 20 --rounds 3

All widths answer each question in turn within every round, so that whatever else the machine does meets them alike;
a question's time is the median of its rounds. Decoding is timed from the first new token on, so that the source, which
all read alike, does not hide it; whole answers are timed too. An answer that differs from the plain one is an error.
`--enlarge 768 24` gives EMamba mamba-130m's width and layers, with which it says the same (`enlarged.py`).
Writes `benchmarks/results/look_ahead.json` and `look_ahead.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint, format_source

from ..dental_qa import load_dental_qa
from .enlarged import enlarged
from .machine import command_line, write_table
from .rows import sampled

PLAIN = 0  # the width of no look-ahead


class Clock(BaseStreamer):
    """When the prompt and each new token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.append(time.perf_counter())


def timed(model: PreTrainedModel, source: dict[str, torch.Tensor], **options: object) -> tuple[float, float, Any]:
    """Seconds of a whole answer, seconds from its first token on, and the output."""
    clock, start = Clock(), time.perf_counter()
    output = model.generate(**source, **options, streamer=clock, return_dict_in_generate=True)
    end = time.perf_counter()
    return end - start, end - clock.times[1], output


def measure_row(
    model: PreTrainedModel, source: dict[str, torch.Tensor], widths: list[int], rounds: int, options: dict[str, object]
) -> dict[int, dict[str, float]]:
    """Median seconds and counts of one question, by width; `PLAIN` among them."""
    seconds: dict[int, list[tuple[float, float]]] = {width: [] for width in widths}
    outputs = {}
    for turn in range(rounds):
        for width in widths[turn % len(widths) :] + widths[: turn % len(widths)]:
            whole, decoding, outputs[width] = timed(model, source, look_ahead=width, **options)
            seconds[width].append((whole, decoding))
    figures = {}
    for width in widths:
        output, plain = outputs[width], outputs[PLAIN]
        if not torch.equal(output.sequences, plain.sequences):
            raise RuntimeError(f"look_ahead={width} changed the answer: {output.sequences.tolist()}")
        if not torch.equal(output.route_trace.expert, plain.route_trace.expert):
            raise RuntimeError(f"look_ahead={width} changed who wrote the answer {output.sequences.tolist()}")
        whole, decoding = (statistics.median(times) for times in zip(*seconds[width], strict=True))
        counts = vars(output.look_ahead) if width else {"passes": 0, "proposed": 0, "accepted": 0}
        figures[width] = {"tokens": output.sequences.shape[1] - 1, "whole": whole, "decoding": decoding, **counts}
    return figures


def summary(split: str, width: int, rows: list[dict[int, dict[str, float]]]) -> list[object]:
    """One line of the table: speeds, their ratio to plain decoding, and what was proposed for it."""
    total = {
        name: sum(row[width][name] for row in rows)
        for name in ("tokens", "decoding", "passes", "proposed", "accepted")
    }
    later = total["tokens"] - len(rows)  # the first token of an answer is not decoding's
    ratios = {
        part: statistics.median(row[PLAIN][part] / row[width][part] for row in rows) for part in ("decoding", "whole")
    }
    return [
        split,
        width or "plain",
        round(later / total["decoding"], 1),
        round(ratios["decoding"], 3),
        round(ratios["whole"], 3),
        round(total["proposed"] / total["tokens"], 3),
        round(total["accepted"] / max(total["proposed"], 1), 3),
        round(total["passes"] / total["tokens"], 3),
    ]


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder or id, default the embedded checkpoint")
    parser.add_argument("--splits", nargs="+", default=["test_long", "test_phrasing"])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8], help="tokens proposed at a time")
    parser.add_argument("--rows", type=int, default=20, help="questions of each split, sampled with a fixed seed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routing", default="auto")
    parser.add_argument("--weights", default="float32", help="EMamba's decoding weights: float32, bfloat16 or int8")
    parser.add_argument("--enlarge", type=int, nargs=2, metavar=("WIDTH", "LAYERS"), help="sizes to give EMamba")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="look_ahead", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.model or str(embedded_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MambaFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    name = "Embedded default"
    if arguments.enlarge:
        model = enlarged(model, *arguments.enlarge)
        name += " with an EMamba of {} x {}".format(*arguments.enlarge)
    model.pack_emamba(arguments.weights)
    widths = [PLAIN, *arguments.widths]

    table, figures = [], {}
    for split in arguments.splits:
        rows = sampled(load_dental_qa(split), arguments.rows, arguments.seed)
        measured = []
        for at, row in enumerate(rows):
            source = tokenizer(format_source(row["question"], row["context"] or None), return_tensors="pt")
            if at == 0:  # warm-up
                measure_row(model, source, widths, 1, {"routing": arguments.routing})
            measured.append(measure_row(model, source, widths, arguments.rounds, {"routing": arguments.routing}))
        measured = [row for row in measured if row[PLAIN]["tokens"] > 1]
        table += [summary(split, width, measured) for width in widths]
        figures[split] = measured
    result: dict[str, object] = {
        "command": command_line("look_ahead", arguments),
        "columns": [
            "Split",
            "Look-ahead",
            "Tokens a second, decoding",
            "x plain, decoding",
            "x plain, whole answer",
            "Proposed a token",
            "of them accepted",
            "Passes a token",
        ],
        "rows": table,
        "note": f"{name}, {arguments.weights} decoding weights, {arguments.threads} thread(s), batch 1, "
        f"{arguments.rows} questions of each split, {arguments.rounds} rounds taking turns. Ratios are medians over "
        "the questions. Tokens and routes were those of plain decoding in every answer.",
        "arguments": vars(arguments),
        "questions": figures,
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
