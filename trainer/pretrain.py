# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Pretrain the two tiny experts from scratch: one tokenizer, a small T5 and a small Mamba, plain transformers models.

    python -m mambaformer.trainer.pretrain trainer/configs/embedded_pretrain.yaml --stage data
    python -m mambaformer.trainer.pretrain trainer/configs/embedded_pretrain.yaml --expert et5
    python -m mambaformer.trainer.pretrain trainer/configs/embedded_pretrain.yaml --expert emamba

The first command trains the tokenizer and tokenises the text once; the other two may run side by side, one thread
each. Any field of `PretrainArguments` can be overridden (`--max_steps 100`). A run that was stopped goes on from its
last checkpoint when the same command is given again. The result, `<output_dir>/<expert>`, is an ordinary checkpoint.
"""

import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    HfArgumentParser,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..dental_qa.loading import load_concepts
from ..modeling_mambaformer.mamba_mixer import use_selective_scan
from ..tokenizer.source_format import format_source
from ..tokenizer.tokenization_mambaformer import MambaFormerTokenizer
from .checkpoints import last_whole_checkpoint
from .finite import EXIT_CODE, FiniteLossMixin, NonFiniteLoss
from .induction_init import initialise_induction
from .pretrain_data import (
    GROUPS,
    IGNORE,
    Example,
    MixtureBatchSampler,
    TokenStore,
    dental_examples,
    medquad_examples,
    read_dental_qa,
    read_medquad,
)
from .pretrain_loss import fuse_activations, pretraining_loss, token_shares
from .pretrain_noise import NumberedRows, QuestionNoise
from .pretrain_probe import COLLATE, EXPERTS, JsonlLog, ProbeCallback
from .pretrain_questions import reworded_contexts, reworded_rows
from .pretrain_tasks import RECALL_SHARES, recall_examples, split_sentences
from .train_tokenizer import train_tokenizer


@dataclass
class PretrainArguments:
    """Everything that a pretraining run depends on; see `configs/embedded_pretrain.yaml` for the shipped values."""

    output_dir: str = field(metadata={"help": "Folder of the run: data/, et5/, emamba/ and their logs."})
    data: str = field(default="", metadata={"help": "The data/ folder of another run; empty: output_dir's."})
    dental_qa: str = field(default="dental_qa/data", metadata={"help": "Folder of DentalQA's splits."})
    medquad: str = field(default="", metadata={"help": "MedQuAD as .jsonl or .jsonl.xz; empty leaves it out."})
    stage: str = field(default="train", metadata={"help": "data (tokenizer and token store) or train."})
    expert: str = field(default="et5", metadata={"help": "Which expert to train: et5 or emamba."})
    seed: int = 0
    threads: int = field(default=1, metadata={"help": "torch threads of this process."})

    initial_dir: str = field(
        default="", metadata={"help": "Earlier run to go on from: its tokenizer and its weights."}
    )
    rewordings: int = field(default=0, metadata={"help": "Random questions for every aspect of a DentalQA concept."})
    first_tokens: int = field(default=6, metadata={"help": "How many tokens of a sentence `first_weight` applies to."})
    first_weight: float = field(default=1.0, metadata={"help": "Weight of a sentence's first tokens in the loss."})
    question_noise: float = field(default=0.0, metadata={"help": "Share of a closed-book question's tokens struck."})
    vocab_size: int = 8000
    max_source_tokens: int = 320
    max_target_tokens: int = 96
    max_context_words: int = field(default=150, metadata={"help": "Contexts have at most about so many words."})
    context_rows: int = field(default=0, metadata={"help": "Random questions with a passage that answers them."})
    medquad_rows: int = field(default=4000, metadata={"help": "At most so many MedQuAD openings."})
    recall_rows: int = field(default=20000, metadata={"help": "How many recall pairs to generate."})
    weight_dental: float = field(default=0.45, metadata={"help": "Share of tokens: closed-book questions."})
    weight_statement: float = field(default=0.13, metadata={"help": "Share of tokens: statements of the same facts."})
    weight_context: float = field(default=0.15, metadata={"help": "Share of tokens: questions with a context."})
    weight_medquad: float = field(default=0.10, metadata={"help": "Share of tokens: MedQuAD."})
    weight_recall: float = field(default=0.17, metadata={"help": "Share of tokens: recall tasks."})

    reading_from: int = field(
        default=0, metadata={"help": "Step from which contexts and recall count `reading_factor` times; 0: never."}
    )
    reading_factor: float = field(default=1.0, metadata={"help": "See `reading_from`."})

    et5_d_model: int = 256
    et5_d_ff: int = 640
    et5_layers: int = field(default=3, metadata={"help": "Encoder layers and, as many, decoder layers."})
    et5_heads: int = 4
    et5_d_kv: int = 64
    et5_dropout: float = 0.0
    et5_induction: bool = field(default=False, metadata={"help": "Begin with heads that copy (induction_init)."})
    emamba_hidden_size: int = 256
    emamba_layers: int = 6
    emamba_state_size: int = 16
    emamba_initializer_range: float = 0.1

    max_steps: int = 2500
    max_minutes: float = field(
        default=0.0,
        metadata={
            "help": "Wall-clock budget; the schedule follows steps or minutes, whichever is further on. 0: off."
        },
    )
    batch_tokens: int = field(default=2560, metadata={"help": "Padded tokens a batch, source plus target."})
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    min_lr_rate: float = 0.05
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    logging_steps: int = 20
    eval_steps: int = field(default=250, metadata={"help": "Steps between probes; 0 probes at the end only."})
    save_minutes: float = 5.0
    validation_rows: int = 150
    probe_rows: int = field(default=40, metadata={"help": "Held-out recall probes a task."})

    def __post_init__(self):
        if self.stage not in ("data", "train"):
            raise ValueError(f"stage must be 'data' or 'train', got {self.stage!r}")
        if self.expert not in EXPERTS:
            raise ValueError(f"expert must be one of {EXPERTS}, got {self.expert!r}")
        if self.stage == "data" and self.data:
            raise ValueError(f"data is {self.data!r}, which another run prepares: give its own file with --stage data")
        if self.max_steps < 1 or self.batch_tokens < 1:
            raise ValueError(f"max_steps and batch_tokens must be positive, got {self.max_steps}, {self.batch_tokens}")

    @property
    def data_dir(self) -> Path:
        return Path(self.data) if self.data else Path(self.output_dir) / "data"

    @property
    def weights(self) -> dict[str, float]:
        return {name: getattr(self, f"weight_{name}") for name in GROUPS}

    @property
    def later_weights(self) -> dict[str, float]:
        """Shares of tokens from step `reading_from` on."""
        factors = dict.fromkeys(("context", "recall"), self.reading_factor if self.reading_from else 1.0)
        return {name: weight * factors.get(name, 1.0) for name, weight in self.weights.items()}


def parse_arguments(argv: list[str]) -> PretrainArguments:
    """`<file.yaml> [--field value …]`: the command line overrides the file, and unknown fields are an error."""
    values: list[str] = []
    if argv and not argv[0].startswith("--"):
        for key, value in (yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}).items():
            values += [f"--{key}", str(value)]
        argv = argv[1:]
    (arguments,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses(values + argv)
    return arguments


def prepare_data(arguments: PretrainArguments) -> None:
    """Train the tokenizer, tokenise the mixture and the validation pairs, and write the probes; all under data/."""
    folder = arguments.data_dir
    train = read_dental_qa(arguments.dental_qa, "train")
    validation = read_dental_qa(arguments.dental_qa, "validation")
    examples = dental_examples(train, arguments.max_context_words, arguments.seed)
    asked_at_random = arguments.rewordings or arguments.context_rows
    concepts, trained = load_concepts()[0] if asked_at_random else [], {row["concept"] for row in train}
    if arguments.rewordings:
        reworded = reworded_rows(concepts, trained, arguments.rewordings, arguments.seed)
        examples += [Example(format_source(question), answer, "dental") for question, answer in reworded]
    if arguments.context_rows:
        count, longest = arguments.context_rows, arguments.max_context_words
        passages = reworded_contexts(concepts, trained, count, longest, arguments.seed)
        examples += [Example(format_source(question, text), answer, "context") for question, text, answer in passages]
    medquad = read_medquad(arguments.medquad)[: arguments.medquad_rows] if arguments.medquad else []
    examples += medquad_examples(medquad, arguments.seed)

    text = list(dict.fromkeys([row["answer"] for row in train] + [row["answer"] for row in medquad]))
    sentences = sorted({s for answer in text for s in split_sentences(answer) if 4 <= len(s.split()) <= 30})
    random.Random(arguments.seed).shuffle(sentences)
    held_out = max(len(sentences) // 20, 8)  # sentences of the probes are never in a training passage
    recall = recall_examples(sentences[held_out:], arguments.recall_rows, arguments.seed, RECALL_SHARES)
    examples += [example for _, example in recall]
    probes = probe_set(sentences[:held_out], arguments.probe_rows, arguments.seed + 1)

    if arguments.initial_dir:
        tokenizer = MambaFormerTokenizer.from_pretrained(Path(arguments.initial_dir) / "data" / "tokenizer")
    else:
        corpus = [text for e in examples if e.group != "recall" for text in (e.source, e.target)]
        tokenizer = MambaFormerTokenizer(tokenizer_object=train_tokenizer(corpus, vocab_size=arguments.vocab_size))
    tokenizer.save_pretrained(folder / "tokenizer")
    limits = (arguments.max_source_tokens, arguments.max_target_tokens)
    store = TokenStore.write(folder / "train", examples, tokenizer, *limits)
    pairs = dental_examples(validation, arguments.max_context_words, arguments.seed)
    pairs = [pair for pair in pairs if pair.group in ("dental", "context")]
    random.Random(arguments.seed).shuffle(pairs)
    TokenStore.write(folder / "validation", pairs[: arguments.validation_rows], tokenizer, *limits)
    asked = [vars(pair) for pair in pairs if pair.group == "dental"][:5]
    (folder / "probes.json").write_text(json.dumps({"questions": asked, "probes": probes}, indent=1), encoding="utf-8")
    for number, name in enumerate(GROUPS):
        rows = store.group == number
        source, target = int(store.source_lengths[rows].sum()), int(store.target_lengths[rows].sum())
        print(f"{name}: {int(rows.sum())} pairs, {source} source and {target} target tokens")
    print(f"dropped {len(examples) - len(store)} pairs beyond {limits} tokens; vocabulary {len(tokenizer)}")


def probe_set(sentences: list[str], each: int, seed: int) -> list[dict]:
    """`each` probes of every recall task, as dicts of task, source and target, from held-out sentences."""
    probes = []
    for task in ("copy", "repeat", "lookup", "find"):
        made = recall_examples(sentences, each, seed, {task: 1.0})
        probes += [{"task": name, "source": e.source, "target": e.target} for name, e in made]
    return probes


def build_expert(arguments: PretrainArguments, tokenizer) -> nn.Module:
    """A new `T5ForConditionalGeneration` (v1.1 form) or `MambaForCausalLM` of the tokenizer's vocabulary."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if arguments.initial_dir:
        auto = AutoModelForSeq2SeqLM if arguments.expert == "et5" else AutoModelForCausalLM
        return auto.from_pretrained(Path(arguments.initial_dir) / arguments.expert, dtype=torch.float32)
    if arguments.expert == "et5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=arguments.et5_d_model,
                d_kv=arguments.et5_d_kv,
                d_ff=arguments.et5_d_ff,
                num_layers=arguments.et5_layers,
                num_decoder_layers=arguments.et5_layers,
                num_heads=arguments.et5_heads,
                dropout_rate=arguments.et5_dropout,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=False,
                **ids,
            )
        )
        # A head of its own, as in T5 v1.1: transformers ties it at construction whatever the configuration says. Tied,
        # the embeddings must be small for the head's sake, the residual stream drowns them, and training crawls.
        # It starts as a scaled copy of the embeddings, so that what is read can be written before either has moved.
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach() * arguments.et5_d_model**-0.5)
        if arguments.et5_induction:
            initialise_induction(model, arguments.seed)
        model.generation_config = GenerationConfig(decoder_start_token_id=tokenizer.pad_token_id, **ids)
        return model
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.emamba_hidden_size,
            num_hidden_layers=arguments.emamba_layers,
            state_size=arguments.emamba_state_size,
            initializer_range=arguments.emamba_initializer_range,
            rescale_prenorm_residual=True,
            bos_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **ids,
        )
    )
    # It has done its part: left on, transformers would divide the loaded weights again at every `from_pretrained`.
    model.config.rescale_prenorm_residual = False
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.pad_token_id, **ids)
    return model


def relative_rate(parameter: torch.Tensor, largest: float = 5.0) -> float:
    """Learning rate of a T5 tensor relative to that of one of initial root mean square 0.1, at most `largest`.

    T5's initial tensors differ in size by a factor of a hundred (query projections 0.008, embeddings 1). Adafactor,
    with which T5 was made, scales its steps by that size. Adam's steps are not scaled: at one rate for all tensors the
    queries grow until each head attends to one token, whatever is asked, and the loss stays where a model without a
    source would be.
    """
    size = float(parameter.detach().float().pow(2).mean().sqrt())
    return min(size / 0.1, largest)


class PretrainTrainer(FiniteLossMixin, Trainer):
    """A `Trainer` whose loss is the mean over target tokens and whose batches come from the mixture.

    Its learning rate rises linearly for `warmup_steps` and then falls as a cosine of `probe.progress`, to
    `min_lr_rate` of its peak.
    """

    def __init__(
        self, *args, expert: str, sampler: MixtureBatchSampler, probe: ProbeCallback, min_lr_rate: float,
        first_tokens: int, first_weight: float, sentence_ends: torch.Tensor, noise: QuestionNoise, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, callbacks=[probe], **kwargs)
        self.expert, self.sampler, self.probe, self.min_lr_rate = expert, sampler, probe, min_lr_rate
        self.model_accepts_loss_kwargs, self.noise = False, noise
        self.first_tokens, self.first_weight, self.sentence_ends = first_tokens, first_weight, sentence_ends

    def get_train_dataloader(self) -> DataLoader:
        rows = NumberedRows(self.noise.of(self.train_dataset), self.data_collator)
        loader = DataLoader(rows, batch_sampler=self.sampler, collate_fn=rows.collate)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None):
        """AdamW; for ET5 each tensor's rate is scaled by its initial size (`relative_rate`)."""
        if self.optimizer is None and self.expert == "et5":
            groups = [
                {"params": [p], "lr": self.args.learning_rate * relative_rate(p), "weight_decay": 0.0}
                for p in self.model.parameters()
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=betas, fused=True)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            warmup = max(self.args.warmup_steps, 1)

            def factor(step: int) -> float:
                progress = min(self.probe.progress(step, num_training_steps), 1.0)
                cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
                return min((step + 1) / warmup, 1.0) * (self.min_lr_rate + (1.0 - self.min_lr_rate) * cosine)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        shares = token_shares(inputs["labels"], self.sentence_ends, self.first_tokens, self.first_weight)
        loss = pretraining_loss(model, self.expert, inputs, shares)
        targets = int((inputs["labels"] != IGNORE).sum())
        fed = inputs["labels"].numel() if self.expert == "emamba" else 0  # these stand in the attention mask too
        self.probe.count(int(inputs["attention_mask"].sum()) - fed + targets)
        return (loss, {"loss": loss}) if return_outputs else loss


def train(arguments: PretrainArguments) -> Path:
    """Train one expert, resuming from its last checkpoint if there is one; returns the folder of the result."""
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    store, validation = TokenStore(arguments.data_dir / "train"), TokenStore(arguments.data_dir / "validation")
    tokenizer = MambaFormerTokenizer.from_pretrained(arguments.data_dir / "tokenizer")
    asked = json.loads((arguments.data_dir / "probes.json").read_text(encoding="utf-8"))
    model = build_expert(arguments, tokenizer)
    if arguments.expert == "emamba":
        use_selective_scan(model)
    else:
        fuse_activations(model)
    torch.set_flush_denormal(True)  # probabilities near zero would slow every product down
    output = Path(arguments.output_dir) / arguments.expert
    checkpoints = output / "checkpoints"
    log = JsonlLog(Path(arguments.output_dir) / f"{arguments.expert}.jsonl")
    probe = ProbeCallback(
        arguments.expert, log, tokenizer, validation, asked["questions"], asked["probes"],
        arguments.eval_steps, arguments.save_minutes, arguments.max_minutes,
    )  # fmt: skip
    sampler = MixtureBatchSampler(
        store,
        arguments.weights,
        arguments.batch_tokens,
        arguments.max_steps,
        arguments.seed,
        later=arguments.later_weights,
        later_from=arguments.reading_from,
    )
    trainer = PretrainTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate,
            warmup_steps=arguments.warmup_steps,
            weight_decay=arguments.weight_decay,
            adam_beta2=arguments.adam_beta2,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_steps=arguments.logging_steps,
            logging_first_step=True,
            save_strategy="no",
            save_total_limit=2,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
        ),
        train_dataset=store,
        data_collator=COLLATE[arguments.expert],
        expert=arguments.expert,
        sampler=sampler,
        probe=probe,
        min_lr_rate=arguments.min_lr_rate,
        first_tokens=arguments.first_tokens,
        first_weight=arguments.first_weight,
        noise=QuestionNoise(arguments.question_noise, arguments.seed, len(tokenizer), len(tokenizer.all_special_ids)),
        sentence_ends=torch.tensor([i for i in range(len(tokenizer)) if tokenizer.decode([i]).endswith(".")]),
    )
    last = last_whole_checkpoint(checkpoints)
    log.write(
        event="resume" if last else "start",
        expert=arguments.expert,
        parameters=model.num_parameters(),
        pairs=len(store),
        checkpoint=last,
        **{name: value for name, value in vars(arguments).items() if name not in ("expert", "stage")},
    )
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    log.write(event="saved", folder=str(output))
    return output


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m mambaformer.trainer.pretrain`; returns 0, or 3 where a loss was not finite."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.stage == "data":
        prepare_data(arguments)
        return 0
    try:
        train(arguments)
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
