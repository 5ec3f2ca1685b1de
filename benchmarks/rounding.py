# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What rounding its weights does to the answers of the embedded default: EMamba's next tokens, and whole answers' scores.

    python -m mambaformer.benchmarks.rounding --splits test_phrasing test_long --rows 200

Agreement: of the tokens of the right answers, read one by one, the share after which EMamba's likeliest token is that
of the float32 weights. Scores are those of routed answers, with the encoder that the result names; the interval is a
paired bootstrap over questions. Writes `benchmarks/results/rounding.json` and `rounding.md`.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint, format_source

from ..dental_qa import load_dental_qa
from ..trainer.bertscore import OFFLINE, named_scorer
from ..trainer.evaluation_statistics import PairedBootstrap
from ..trainer.metrics import token_f1_each
from .machine import command_line, write_table
from .rows import sampled

FORMATS = {
    "float32": lambda model: model,
    "decoding in int8 (`pack_emamba`)": lambda model: model.pack_emamba("int8"),
    "EMamba in int8 (`quantize`)": lambda model: model.quantize("int8"),
    "both experts in int8": lambda model: model.quantize("int8", et5="int8"),
    "EMamba in int4": lambda model: model.quantize("int4"),
}
FLOAT = "float32"


@torch.no_grad()
def next_tokens(model: PreTrainedModel, source: dict[str, torch.Tensor], answer: torch.Tensor) -> list[int]:
    """EMamba's likeliest token after each of `answer` `(1, T)`, read one by one as in decoding."""
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    cache, said = None, []
    for token in torch.cat([start, answer[:, :-1]], 1).split(1, 1):
        given = {} if cache is not None else source
        output = model(**given, decoder_input_ids=token, past_key_values=cache, routing="emamba", use_cache=True)
        cache = output.past_key_values
        said.append(int(output.logits[0, -1].argmax()))
    return said


def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> tuple[list[str], list[list[int]]]:
    """Routed answers, and EMamba's likeliest tokens along the right answers."""
    answers, tokens = [], []
    for row in rows:
        source = tokenizer(format_source(row["question"], row["context"] or None), return_tensors="pt")
        answers.append(tokenizer.decode(model.generate(**source)[0], skip_special_tokens=True))
        right = tokenizer(row["answer"], return_tensors="pt").input_ids
        tokens.append(next_tokens(model, dict(source), right))
    return answers, tokens


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder or id, default the embedded checkpoint")
    parser.add_argument("--splits", nargs="+", default=["test_phrasing", "test_long"])
    parser.add_argument("--rows", type=int, default=200, help="questions of each split, sampled with a fixed seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="rounding", help="name of the result file")
    arguments = parser.parse_args()
    folder = arguments.model or str(embedded_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = MambaFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    models = {name: change(copy.deepcopy(plain)).eval() for name, change in FORMATS.items()}
    scorer = named_scorer(OFFLINE)
    table: list[list[object]] = []
    for split in arguments.splits:
        rows = sampled(load_dental_qa(split), arguments.rows, arguments.seed)
        references = [row["answer"] for row in rows]
        bootstrap = PairedBootstrap(len(rows))
        found = {name: answer_all(model, tokenizer, rows) for name, model in models.items()}
        scores = {name: scorer.each(answers, references) for name, (answers, _) in found.items()}
        wanted = [token for tokens in found[FLOAT][1] for token in tokens]
        for name, (answers, tokens) in found.items():
            same = np.mean(np.equal([token for row in tokens for token in row], wanted))
            change = bootstrap.mean(scores[name] - scores[FLOAT])
            table.append(
                [
                    split,
                    name,
                    f"{same:.1%}",
                    f"{np.mean([a == b for a, b in zip(answers, found[FLOAT][0], strict=True)]):.0%}",
                    f"{token_f1_each(answers, references).mean():.3f}",
                    f"{scores[name].mean():.4f}",
                    "–" if name == FLOAT else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**change),
                ]
            )
    result: dict[str, object] = {
        "command": command_line("rounding", arguments),
        "columns": ["Split", "Weights", "Same next token", "Same answer", "Token F1", "BERTScore F1", "Change"],
        "rows": table,
        "note": f"{arguments.rows} questions a split. BERTScore by {scorer.name}; its change has a 95% interval.",
    }
    write_table(arguments.name, result)


if __name__ == "__main__":
    main()
