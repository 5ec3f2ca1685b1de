# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Pretraining of tiny experts: tasks, data layout, loss, learning and resuming."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MambaForCausalLM, T5ForConditionalGeneration

from mambaformer.trainer.pretrain import (
    PretrainArguments,
    build_expert,
    main,
    parse_arguments,
    prepare_data,
    relative_rate,
    train,
)
from mambaformer.trainer.pretrain_data import (
    GROUPS,
    IGNORE,
    MixtureBatchSampler,
    TokenStore,
    clean_opening,
    collate_emamba,
    collate_et5,
    dental_examples,
    medquad_examples,
    read_medquad,
    shorten_context,
)
from mambaformer.trainer.pretrain_loss import (
    HeadCrossEntropy,
    fuse_activations,
    pretraining_loss,
    target_hidden,
    token_shares,
)
from mambaformer.trainer.pretrain_probe import JsonlLog, greedy, teacher_forced
from mambaformer.trainer.pretrain_tasks import TASKS, Example, recall_examples, split_sentences

PARTS = ("enamel", "dentine", "cementum", "pulp", "gingiva", "alveolus", "molar", "canine", "incisor", "premolar")
TRAITS = ("protects the crown", "carries the nerve", "holds the root firmly", "feels hot and cold", "grinds hard food")
SIZES = {
    "vocab_size": 700, "et5_d_model": 32, "et5_d_ff": 48, "et5_layers": 1, "et5_heads": 2, "et5_d_kv": 16,
    "emamba_hidden_size": 32, "emamba_layers": 2, "emamba_state_size": 4, "batch_tokens": 512, "recall_rows": 60,
    "warmup_steps": 4, "logging_steps": 1, "eval_steps": 0, "save_minutes": 1e6, "validation_rows": 6, "probe_rows": 2,
}  # fmt: skip


def sentences() -> list[str]:
    return [f"The {part} {trait} in region {n}." for n, part in enumerate(PARTS) for trait in TRAITS]


def rows() -> list[dict]:
    made = []
    for n, sentence in enumerate(sentences()):
        row = {"question": f"What about item {n}?", "context": "", "answer": sentence, "concept": f"item_{n}"}
        made.append({**row, "aspect": "function"})
        if n % 5 == 0:
            context = " ".join(sentences()[n : n + 4])
            made.append({**row, "aspect": "function", "context": context, "question": f"Read: what of item {n}?"})
    return made


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> PretrainArguments:
    """Arguments of a tiny run whose data stage is done."""
    folder = tmp_path_factory.mktemp("pretrain")
    dental = folder / "dental"
    dental.mkdir()
    for split, chosen in (("train", rows()), ("validation", rows()[:12])):
        (dental / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    made = PretrainArguments(output_dir=str(folder / "run"), dental_qa=str(dental), **SIZES)
    prepare_data(made)
    return made


def copied(arguments: PretrainArguments, folder, **changes) -> PretrainArguments:
    """The same arguments and data with another output folder."""
    (folder / "data").symlink_to(arguments.data_dir)
    return PretrainArguments(**{**vars(arguments), "output_dir": str(folder), **changes})


def losses(folder, expert: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / f"{expert}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


# --- tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(TASKS))
def test_recall_answers_stand_in_their_source(task):
    for name, example in recall_examples(sentences(), 50, seed=3, shares={task: 1.0}):
        assert name == task
        context = example.source.split("context: ")[1].split(" question: ")[0]
        assert (
            f" {example.target} " in f" {context} ".replace(".", " . ").replace("  ", " ") or example.target in context
        )


def test_lookup_value_is_the_value_of_the_asked_key():
    for _, example in recall_examples(sentences(), 50, seed=5, shares={"lookup": 1.0}):
        context, question = example.source.split(" question: What is ")
        pairs = dict(pair.split(" is ") for pair in context.removeprefix("context: ").rstrip(".").split(". "))
        assert pairs[question.removesuffix("?")] == example.target
        assert len(pairs) >= 2


def test_repeat_span_follows_an_anchor_that_occurs_once():
    for _, example in recall_examples(sentences(), 80, seed=7, shares={"repeat": 1.0}):
        context, anchor = example.source.split(" question: What follows ")
        anchor = anchor.removesuffix("?")
        passage = context.removeprefix("context: ").split()
        starts = [i for i in range(len(passage)) if " ".join(passage[i : i + 2]) == anchor]
        assert len(starts) == 1
        assert " ".join(passage[starts[0] + 2 :]).startswith(example.target)


def test_found_sentence_alone_names_the_word():
    for _, example in recall_examples(sentences(), 50, seed=9, shares={"find": 1.0}):
        context, question = example.source.removeprefix("context: ").split(" question: ")
        word = (
            question.rstrip(".?").split()[-1] if not question.startswith("Which") else question.split()[3].rstrip("?")
        )
        naming = [s for s in split_sentences(context) if word in s.lower().rstrip(".").split()]
        assert naming == [example.target]


def test_recall_is_reproducible_and_refuses_bad_input():
    assert recall_examples(sentences(), 20, seed=1) == recall_examples(sentences(), 20, seed=1)
    assert recall_examples(sentences(), 20, seed=1) != recall_examples(sentences(), 20, seed=2)
    with pytest.raises(ValueError, match="at least 8 sentences"):
        recall_examples(sentences()[:3], 1, seed=0)
    with pytest.raises(ValueError, match="unknown recall tasks"):
        recall_examples(sentences(), 1, seed=0, shares={"sing": 1.0})


# --- text ------------------------------------------------------------------------------------------------------


def test_each_fact_is_asked_stated_and_continued():
    examples = dental_examples(rows(), 150, seed=0)
    fact = sentences()[1]
    groups = [e.group for e in examples if e.target == fact]
    assert groups.count("dental") == 1 and groups.count("statement") == 1
    continued = [e for e in examples if e.source.startswith("continue: item 1, function: ")]
    assert len(continued) == 1
    assert f"{continued[0].source.split('function: ')[1]} {continued[0].target}" == fact


def test_shortened_context_keeps_the_support_and_the_order():
    context, answer = " ".join(sentences()), f"{sentences()[31]} {sentences()[7]}"
    short = shorten_context(context, answer, 60, random.Random(0))
    kept = split_sentences(short)
    assert sentences()[31] in kept and sentences()[7] in kept
    assert 40 <= len(short.split()) <= 60
    assert kept == [s for s in sentences() if s in kept]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Key Points - Gum disease is a common infection of the gums.",
            "Gum disease is a common infection of the gums.",
        ),
        ("What is a stye? A stye is a small red lump on the eyelid.", "A stye is a small red lump on the eyelid."),
        ("These resources address the diagnosis or management of it.", None),
        ("The following list has it: - one - two.", None),
        ("Too short.", None),
    ],
)
def test_medquad_openings_are_prose(text, expected):
    assert clean_opening(text) == expected


def test_medquad_on_the_real_file(shared_data):
    found = read_medquad(shared_data / "medquad" / "medquad.jsonl.xz")
    assert len(found) > 2000
    assert len({row["answer"] for row in found}) == len(found)
    assert not any("(are)" in row["question"] or " ?" in row["question"] for row in found)
    closed = {e.target for e in medquad_examples(found, 0) if e.group == "medquad"}
    opened = [e for e in medquad_examples(found, 0) if e.group == "context"]
    assert not closed & {e.target for e in opened}
    assert all(" ".join(e.target.split()) in e.source for e in opened)


# --- batches ---------------------------------------------------------------------------------------------------

PAIRS = [(np.array([5, 6, 1]), np.array([7, 8, 9, 1])), (np.array([4, 1]), np.array([3, 1]))]


def test_layout_of_emamba():
    batch = collate_emamba(PAIRS)
    assert batch["input_ids"].tolist() == [[5, 6, 1, 0, 7, 8, 9], [0, 4, 1, 0, 3, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0, 1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 9, 1], [3, 1, IGNORE, IGNORE]]


def test_layout_of_et5():
    batch = collate_et5(PAIRS)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [4, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9, 1], [3, 1, IGNORE, IGNORE]]


def test_store_holds_what_the_tokenizer_said(arguments):
    from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer

    tokenizer = MambaFormerTokenizer.from_pretrained(arguments.data_dir / "tokenizer")
    examples = [Example("question: What is pulp?", "The pulp.", "dental"), Example("x " * 40, "y", "recall")]
    store = TokenStore.write(arguments.data_dir / "two", examples, tokenizer, 30, 30)
    assert len(store) == 1  # the second source is too long, and nothing is truncated
    source, target = store[0]
    assert source.tolist() == tokenizer(examples[0].source)["input_ids"] and source[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(target, skip_special_tokens=True) == "The pulp."
    with pytest.raises(FileNotFoundError, match="--stage data"):
        TokenStore(arguments.data_dir / "nowhere")


def test_sampler_keeps_budget_shares_and_order(arguments):
    store = TokenStore(arguments.data_dir / "train")
    weights = {"dental": 0.5, "recall": 0.5, "medquad": 0.3}  # there is no MedQuAD here
    sampler = MixtureBatchSampler(store, weights, tokens=300, steps=60, seed=4, pool=64)
    batches = list(sampler)
    assert len(batches) == 60
    source, target = store.source_lengths, store.target_lengths
    assert all(len(b) * (source[b].max() + target[b].max()) <= 300 for b in batches if len(b) > 1)
    spent = np.zeros(5)
    for batch in batches:
        np.add.at(spent, store.group[batch], (source + target)[batch])
    assert spent[[1, 2, 3]].sum() == 0
    assert abs(spent[0] / spent.sum() - 0.5) < 0.05
    longer = MixtureBatchSampler(store, weights, tokens=300, steps=90, seed=4, pool=64)
    assert list(longer)[:60] == batches and list(sampler) == batches
    with pytest.raises(ValueError, match="no pairs"):
        MixtureBatchSampler(store, {"medquad": 1.0}, 300, 1, 0)


def test_sampler_changes_its_shares_on_the_way(arguments):
    store = TokenStore(arguments.data_dir / "train")
    first, later = {"dental": 0.9, "recall": 0.1}, {"dental": 0.3, "recall": 0.7}
    options = {"tokens": 300, "steps": 300, "seed": 4, "pool": 64}
    plain = list(MixtureBatchSampler(store, {**first, "medquad": 0.0}, **options))
    changed = list(MixtureBatchSampler(store, first, **options, later=later, later_from=150))
    same = next(i for i, pair in enumerate(zip(plain, changed, strict=True)) if pair[0] != pair[1])
    assert 150 <= same < 200
    length = store.source_lengths + store.target_lengths
    rows = np.array([row for batch in changed[same:] for row in batch])
    spent = np.bincount(np.asarray(store.group)[rows], weights=length[rows], minlength=5)
    assert abs(spent[GROUPS.index("recall")] / spent.sum() - 0.7) < 0.1


# --- loss ------------------------------------------------------------------------------------------------------


def test_head_cross_entropy_is_cross_entropy():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    gold = torch.tensor([0, 8, 3, 3, 1, 7])
    share = torch.full((6,), 1 / 6)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    ours = torch.autograd.grad(2 * HeadCrossEntropy.apply(hidden, weight, gold, share), (hidden, weight))
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), gold)
    theirs = torch.autograd.grad(2 * plain, (hidden, weight))
    torch.testing.assert_close(HeadCrossEntropy.apply(hidden, weight, gold, share), plain)
    torch.testing.assert_close(ours, theirs)


def test_first_tokens_of_a_sentence_weigh_more():
    labels = torch.tensor([[5, 6, 9, 5, 7, 1], [6, 6, 6, 1, -100, -100]])  # 9 ends a sentence
    weights = torch.tensor([3.0, 3, 1, 3, 3, 1, 3, 3, 1, 1])
    torch.testing.assert_close(token_shares(labels, torch.tensor([9]), 2, 3.0), weights / weights.sum())


def test_first_tokens_weigh_more_where_asked(arguments):
    model = build(arguments, "et5").eval()
    store = TokenStore(arguments.data_dir / "train")
    batch = collate_et5([store[i] for i in (0, 40)])
    logits = model(**batch).logits  # (B, T, V)
    wanted = batch["labels"] != -100
    each = torch.nn.functional.cross_entropy(logits[wanted], batch["labels"][wanted], reduction="none")
    weights = torch.ones(wanted.shape)
    weights[:, :2] = 5.0
    expected = (each * weights[wanted]).sum() / weights[wanted].sum()
    shares = token_shares(batch["labels"], torch.tensor([], dtype=torch.long), 2, 5.0)
    torch.testing.assert_close(pretraining_loss(model, "et5", batch, shares), expected)


@pytest.mark.parametrize("expert", ["et5", "emamba"])
def test_loss_is_that_of_the_plain_model(arguments, expert):
    model = build(arguments, expert).eval()
    store = TokenStore(arguments.data_dir / "train")
    pairs = [store[i] for i in (0, 40, 80)]
    batch = collate_et5(pairs) if expert == "et5" else collate_emamba(pairs)
    if expert == "et5":
        reference = model(**batch).loss
    else:  # one row at a time and without padding
        total, count = 0.0, 0
        for source, target in pairs:
            ids = torch.from_numpy(np.concatenate([source, [0], target]))[None]
            logits = model(input_ids=ids).logits[0, len(source) : -1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, len(source) + 1 :], reduction="sum").item()
            count += len(target)
        reference = torch.tensor(total / count)
    torch.testing.assert_close(pretraining_loss(model, expert, batch), reference, rtol=1e-4, atol=1e-5)


def build(arguments: PretrainArguments, expert: str):
    from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer

    torch.manual_seed(1)
    tokenizer = MambaFormerTokenizer.from_pretrained(arguments.data_dir / "tokenizer")
    return build_expert(PretrainArguments(**{**vars(arguments), "expert": expert}), tokenizer)


def test_fused_activation_computes_the_same(arguments):
    model = build(arguments, "et5").eval()
    batch = collate_et5(PAIRS)
    before = target_hidden(model, "et5", batch)[0]
    keys = list(model.state_dict())
    after = target_hidden(fuse_activations(model), "et5", batch)[0]
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys


# --- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expert", "kind"), [("et5", T5ForConditionalGeneration), ("emamba", MambaForCausalLM)])
def test_a_short_run_learns_and_leaves_a_plain_checkpoint(arguments, expert, kind, tmp_path):
    threads = torch.get_num_threads()
    folder = train(copied(arguments, tmp_path, expert=expert, max_steps=30, learning_rate=5e-3))
    torch.set_num_threads(threads)
    seen = losses(tmp_path, expert)
    assert seen[30] < 0.8 * seen[1]
    lines = [json.loads(line) for line in (tmp_path / f"{expert}.jsonl").read_text(encoding="utf-8").splitlines()]
    probe = next(line for line in lines if "eval_loss" in line)
    assert probe["step"] == 30 and {"eval_accuracy", "recall_copy", "recall_find"} <= set(probe)
    auto = AutoModelForSeq2SeqLM if expert == "et5" else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model) is kind and not report["missing_keys"] and not report["unexpected_keys"]
    validation = TokenStore(arguments.data_dir / "validation")
    assert teacher_forced(model.eval(), expert, validation)["loss"] == pytest.approx(probe["eval_loss"], abs=1e-3)


@pytest.mark.parametrize("expert", ["et5", "emamba"])
def test_resuming_equals_not_having_stopped(arguments, expert, tmp_path):
    threads = torch.get_num_threads()
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    train(copied(arguments, tmp_path / "whole", expert=expert, max_steps=8, save_minutes=0.0))
    parts = copied(arguments, tmp_path / "parts", expert=expert, max_steps=8, save_minutes=0.0)
    whole = tmp_path / "whole" / expert / "checkpoints"
    kept = sorted(whole.iterdir(), key=lambda f: int(f.name.split("-")[1]))[0]
    assert kept.name == "checkpoint-7"
    (tmp_path / "parts" / expert / "checkpoints").mkdir(parents=True)
    (tmp_path / "parts" / expert / "checkpoints" / kept.name).symlink_to(kept)
    train(parts)
    torch.set_num_threads(threads)
    assert losses(tmp_path / "parts", expert)[8] == losses(tmp_path / "whole", expert)[8]


def test_a_run_on_another_runs_data_leaves_them_alone(arguments, tmp_path):
    threads = torch.get_num_threads()
    before = {path: path.stat().st_mtime_ns for path in arguments.data_dir.rglob("*")}
    own = {**vars(arguments), "output_dir": str(tmp_path), "data": str(arguments.data_dir)}
    folder = train(PretrainArguments(**{**own, "max_steps": 2}))
    torch.set_num_threads(threads)
    assert folder == tmp_path / "et5" and (folder / "model.safetensors").is_file()
    assert {path: path.stat().st_mtime_ns for path in arguments.data_dir.rglob("*")} == before
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="which another run prepares"):
        PretrainArguments(**{**own, "stage": "data"})
    with pytest.raises(FileNotFoundError, match="--stage data"):
        train(PretrainArguments(**{**own, "data": str(tmp_path / "nowhere")}))


def test_rates_of_et5_follow_the_initial_sizes(arguments):
    model = build(arguments, "et5")
    block = model.encoder.block[0].layer[0].SelfAttention
    assert relative_rate(block.q.weight) < 0.4 * relative_rate(block.k.weight)
    assert relative_rate(model.shared.weight) == 5.0
    assert relative_rate(2 * block.k.weight) == pytest.approx(2 * relative_rate(block.k.weight), rel=1e-4)


@pytest.mark.parametrize("expert", ["et5", "emamba"])
def test_greedy_answers_do_not_depend_on_the_batch(arguments, expert):
    model = build(arguments, expert).eval()
    sources = [[9, 8, 7, 6, 5, 1], [12, 1], [300, 301, 302, 1]]
    together = greedy(model, expert, sources, longest=6)
    assert together == [greedy(model, expert, [source], longest=6)[0] for source in sources]


def test_the_clock_ends_a_run_and_its_schedule(arguments, tmp_path):
    threads = torch.get_num_threads()
    train(copied(arguments, tmp_path, expert="emamba", max_steps=100_000, max_minutes=0.05, logging_steps=1))
    torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "emamba.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert 1 < steps[-1]["step"] < 100_000
    assert steps[-1]["lr"] < 0.3 * max(line["lr"] for line in steps)
    assert JsonlLog(tmp_path / "emamba.jsonl").minutes(steps[-1]["step"]) == steps[-1]["minutes"]


def test_command_line_overrides_the_shipped_file(repo_root, tmp_path, capsys):
    file = str(repo_root / "trainer" / "configs" / "embedded_pretrain.yaml")
    made = parse_arguments([file, "--expert", "emamba", "--max_steps", "7"])
    assert (made.expert, made.max_steps, made.vocab_size) == ("emamba", 7, 8000)
    assert sum(made.weights.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expert must be one of"):
        parse_arguments([file, "--expert", "gpt"])
    with pytest.raises(FileNotFoundError, match=r"dental_qa\.build"):
        main([file, "--stage", "data", "--dental_qa", str(tmp_path / "none"), "--output_dir", str(tmp_path)])


def test_shipped_sizes_fit_the_embedded_default(repo_root):
    made = parse_arguments([str(repo_root / "trainer" / "configs" / "embedded_pretrain.yaml")])

    class Vocabulary:
        pad_token_id, eos_token_id = 0, 1

        def __len__(self):
            return made.vocab_size

    total = 0
    for expert in ("et5", "emamba"):
        with torch.device("meta"):
            total += build_expert(PretrainArguments(**{**vars(made), "expert": expert}), Vocabulary()).num_parameters()
    assert 2 * total <= 32e6  # bytes in bfloat16
