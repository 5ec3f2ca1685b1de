# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`mambaformer ask`: load a model, answer one question, print it. The loading and the answering serve the demo too."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_errors import UserError, check_source, one_line, reading, say_less

if TYPE_CHECKING:
    from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
    from .tokenizer.tokenization_mambaformer import MambaFormerTokenizer


@dataclass
class Answer:
    """
    One answer and what it cost.

    Attributes:
        answer: the text. tokens: what each token adds to it, "" for the end. experts: 0 EMamba, 1 ET5, one per token.
        margins: the router's margin per token, `None` where it was not asked.
        et5_share: share of the tokens that ET5 wrote. et5_passes, et5_tokens, encoder_calls: what was run of ET5.
        milliseconds: wall-clock time from the question's text to the answer's, without loading the model.
        model: the folder or the id.
    """

    answer: str
    tokens: list[str]
    experts: list[int]
    margins: list[float | None]
    et5_share: float
    et5_passes: int
    et5_tokens: int
    encoder_calls: int
    milliseconds: float
    model: str


def run(arguments: argparse.Namespace) -> None:
    """Serve `mambaformer ask`; what can be checked without a model is checked before one is loaded."""
    question = checked_text(arguments.question)
    context = read_context(arguments.context)
    if arguments.budget is not None and not 0 <= arguments.budget <= 1:
        raise UserError(f"--budget {arguments.budget:g} is not a share of tokens: give a number from 0 to 1.")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens} is too small: give a whole number of 1 or more.")
    say_less()
    source = arguments.model or embedded_model()
    model, tokenizer = load(source)
    options = {
        "routing": arguments.routing,
        "expert_budget": arguments.budget,
        "max_new_tokens": arguments.max_new_tokens,
    }
    given = {name: value for name, value in options.items() if value is not None}
    answer = answer_question(model, tokenizer, source, question, context, **given)
    if arguments.json:
        print(json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False))
    elif arguments.show_routing:
        from .cli_render import legend, show_routing

        legend()
        show_routing(answer)
    else:
        print(answer.answer)


def checked_text(question: str) -> str:
    """The question as given; `UserError` where it is blank or holds bytes that are no UTF-8."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the question is not valid UTF-8 at character {error.start + 1}: type or paste it again."
        ) from error
    if not question.strip():
        raise UserError(
            f'the question is blank (received {question!r}): give one, for example "What causes bad breath?".'
        )
    return question


def read_context(name: str | None) -> str | None:
    """The text of the context file `name`, or `None` without one."""
    if name is None:
        return None
    try:
        return Path(name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--context {name!r} is not UTF-8 text (byte {error.start + 1} of it): save it as UTF-8 first."
        ) from error
    except OSError as error:
        raise UserError(
            f"--context {name!r} cannot be read ({error.strerror}): give an existing text file."
        ) from error


def embedded_model() -> str:
    """The folder of the embedded default."""
    from . import embedded_checkpoint

    try:
        return str(embedded_checkpoint())
    except OSError as error:
        raise UserError(f"no model is embedded here: name one with --model ({one_line(error)})") from error


def load(source: str) -> tuple[MambaFormerForConditionalGeneration, MambaFormerTokenizer]:
    """
    Load the model `source` in float32 and its tokenizer, and check that both are whole and belong together.

    Raises:
        UserError: for a checkpoint that is missing, damaged, incomplete, of another kind, or not finite.
    """
    check_source(source, "--model")
    with reading(source, "--model"):
        import torch

        from .configuration.configuration_mambaformer import MambaFormerConfig
        from .modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
        from .tokenizer.tokenization_mambaformer import MambaFormerTokenizer

        kind = MambaFormerConfig.get_config_dict(source)[0].get("model_type")
        if kind != MambaFormerConfig.model_type:
            raise UserError(
                f"--model {source!r} is a {kind!r} checkpoint, not a MambaFormer: make one of it with "
                "`mambaformer compose`."
            )
        config = MambaFormerConfig.from_pretrained(source)
        model, report = MambaFormerForConditionalGeneration.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        misfits = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if misfits:  # the library would go on with random numbers in their places
            raise UserError(
                f"--model {source!r}: {len(misfits)} of its weights are missing or have another shape than "
                f"config.json says, {misfits[0]!r} among them: fetch or save the checkpoint again."
            )
        tokenizer = MambaFormerTokenizer.from_pretrained(source)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if len(tokenizer) > config.vocab_size or tokenizer.eos_token_id not in ends:
            raise UserError(
                f"--model {source!r}: its tokenizer ({len(tokenizer)} tokens, end {tokenizer.eos_token_id}) does not "
                f"fit its model ({config.vocab_size} rows, end {config.eos_token_id}): put back the one that it was "
                "saved with."
            )
    return model, tokenizer


def encode(tokenizer: MambaFormerTokenizer, question: str, context: str | None) -> list[int]:
    """The source's token ids; `UserError` where they are more than the tokenizer's `model_max_length`."""
    ids = tokenizer.encode_source(question, context)
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        asked = len(tokenizer.encode_source(question))
        part = f"{asked} of them the question's" if context else "all of them the question's"
        remedy = "shorten the context" if context and asked < limit else "shorten the question"
        raise UserError(
            f"the source is too long: {len(ids)} tokens ({part}), and the model reads at most {limit}: {remedy} by "
            f"{len(ids) - limit} tokens."
        )
    return ids


def answer_question(
    model: MambaFormerForConditionalGeneration,
    tokenizer: MambaFormerTokenizer,
    source: str,
    question: str,
    context: str | None = None,
    **options,
) -> Answer:
    """
    Answer one question greedily.

    Args:
        source: what the model was loaded from, for the record.
        options: passed to `generate`: `routing`, `expert_budget`, `max_new_tokens`.
    """
    import torch

    from .pipelines.pipeline_mambaformer import token_texts

    start = time.perf_counter()
    ids = torch.tensor([encode(tokenizer, question, context)])  # (1, S)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=1,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
    trace = output.route_trace
    experts = trace.expert[0].tolist()
    pieces = token_texts(tokenizer, output.sequences[0, -len(experts) :].tolist())
    text = "".join(pieces).strip()
    milliseconds = 1000 * (time.perf_counter() - start)
    return Answer(
        answer=text,
        tokens=pieces,
        experts=experts,
        margins=[value if math.isfinite(value) else None for value in trace.margin[0].tolist()],
        et5_share=float(trace.et5_share()[0]),
        et5_passes=int(trace.et5_passes[0]),
        et5_tokens=int(trace.et5_tokens[0]),
        encoder_calls=int(trace.encoder_calls[0]),
        milliseconds=round(milliseconds, 1),
        model=source,
    )
