# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Ask the embedded default held-out questions of DentalQA, by the router and by each expert alone.

    python -m mambaformer.benchmarks.embedded_answers --answers 30 --rows 300

Prints the first answers and writes all figures to `benchmarks/results/embedded_answers.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoTokenizer

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint, format_source

from ..dental_qa import load_dental_qa, probe_rows
from ..trainer.metrics import token_f1
from .answer_content import Content
from .machine import write_result
from .rows import sampled

ROUTINGS = ("auto", "emamba", "et5")


def main() -> None:
    """Parse arguments, answer, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder or id, default the embedded checkpoint")
    parser.add_argument("--split", default="test_phrasing", help="of DentalQA, or probe: single questions, reworded")
    parser.add_argument("--answers", type=int, default=30, help="answers to print and keep")
    parser.add_argument("--rows", type=int, default=300, help="rows to score, sampled with a fixed seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="embedded_answers", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    folder = arguments.model or str(embedded_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MambaFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if arguments.split == "probe":
        rows = [vars(row) for row in probe_rows(500)]
    else:
        rows = list(load_dental_qa(arguments.split))
    rows = sampled(rows, arguments.rows, arguments.seed)

    scores = {routing: [] for routing in ROUTINGS}
    seconds = {routing: [] for routing in ROUTINGS}
    counts = {"tokens": 0, "et5": 0, "passes": 0, "et5_tokens": 0, "encoder_calls": 0}
    content = Content()
    judged: dict[str, list[dict[str, float]]] = {routing: [] for routing in ROUTINGS}
    kept = []
    for row in rows:
        source = tokenizer(format_source(row["question"], row["context"] or None), return_tensors="pt")
        for routing in ROUTINGS:
            start = time.perf_counter()
            output = model.generate(**source, routing=routing, return_dict_in_generate=True)
            seconds[routing].append(time.perf_counter() - start)
            answer = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
            scores[routing].append(token_f1([answer], [row["answer"]]))
            judged[routing].append(content.judge(answer, row["concept"], row["facts"]))
            if routing == "auto":
                trace = output.route_trace
                counts["tokens"] += int((trace.expert >= 0).sum())
                counts["et5"] += int((trace.expert == 1).sum())
                counts["passes"] += int(trace.et5_passes.sum())
                counts["et5_tokens"] += int(trace.et5_tokens.sum())
                counts["encoder_calls"] += int(trace.encoder_calls.sum())
                if len(kept) < arguments.answers:
                    share = float(trace.et5_share()[0])
                    kept.append({"question": row["question"], "gold": row["answer"], "answer": answer, "share": share})
    for item in kept:
        print(
            f"Q: {item['question']}\nA: {item['answer']}\n   gold: {item['gold']}\n   ET5 share {item['share']:.3f}\n"
        )
    result = {
        "split": arguments.split,
        "rows": len(rows),
        "seed": arguments.seed,
        "token_f1": {routing: statistics.mean(values) for routing, values in scores.items()},
        "content": {
            routing: {name: statistics.mean(one[name] for one in values) for name in values[0]}
            for routing, values in judged.items()
        },
        "seconds_median": {routing: statistics.median(values) for routing, values in seconds.items()},
        "et5_share": counts["et5"] / max(counts["tokens"], 1),
        "passes_per_answer": counts["passes"] / len(rows),
        "et5_tokens_per_answer": counts["et5_tokens"] / len(rows),
        "encoder_calls_per_answer": counts["encoder_calls"] / len(rows),
        "answers": kept,
    }
    path = write_result(arguments.name, result)
    print({key: value for key, value in result.items() if key != "answers"})
    print(f"written to benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
