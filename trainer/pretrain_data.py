# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Text for pretraining the tiny experts: reading, cleaning, tokenising once to disk, batching by length.

Three kinds of text are mixed: DentalQA's train split (closed-book questions, statements of the same facts, questions
with a context), the openings of MedQuAD's answers, and the recall tasks of `pretrain_tasks`. Each kind is a *group*;
the groups are tokenised once and stored side by side, and `MixtureBatchSampler` draws them in given shares of tokens.
"""

from __future__ import annotations

import json
import lzma
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..tokenizer.source_format import format_source
from .pretrain_tasks import Example, content_words, split_sentences

GROUPS = ("dental", "statement", "context", "medquad", "recall")
IGNORE = -100

_BOILERPLATE = re.compile(
    r"these resources|the following|this summary|key points|https?:|www\.|watch the video|see the|click|web ?site|"
    r"clinical trial|check the list|nlm|medlineplus|\bfor more information\b|human phenotype ontology|orphanet",
    re.IGNORECASE,
)
_QTYPES = frozenset({"information", "causes", "symptoms", "treatment", "prevention", "outlook", "susceptibility"})


def read_dental_qa(folder: str | Path, split: str) -> list[dict]:
    """Rows of one DentalQA split, as dicts, through `datasets`.

    Raises:
        FileNotFoundError: `folder` does not exist.
        ValueError: a needed column is missing.
    """
    import datasets  # heavy, and only needed where data is prepared

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no DentalQA at {folder}: build it with `python -m mambaformer.dental_qa.build`")
    with tempfile.TemporaryDirectory() as cache:  # the usual cache may hold an older build of the same folder
        rows = datasets.load_dataset(str(folder), split=split, cache_dir=cache).to_list()
    for column in ("question", "context", "answer", "concept", "aspect"):
        if rows and column not in rows[0]:
            raise ValueError(f"DentalQA split {split!r} has no column {column!r}; it has {sorted(rows[0])}")
    return rows


def read_medquad(path: str | Path, longest_words: int = 60) -> list[dict]:
    """Question and opening (one or two sentences) of those MedQuAD answers that begin like prose.

    Headings, bullet lists, link collections and openings shared by many rows (templates of the source sites) are left
    out, and questions are tidied ("What is (are) X ?" becomes "What is X?"). Returns dicts of question and answer.
    """
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    kept: list[tuple[str, dict]] = []
    counts: dict[str, int] = {}
    for record in records:
        if record.get("qtype") not in _QTYPES:
            continue
        answer = clean_opening(record["answer"], longest_words)
        if answer is None:
            continue
        template = answer.lower().replace(record["focus"].lower(), "<focus>")[:60]
        counts[template] = counts.get(template, 0) + 1
        question = re.sub(r"\s*\((?:are|is)\)", "", record["question"])
        question = re.sub(r"\s+([?.,])", r"\1", " ".join(question.split()))
        kept.append((template, {"question": question, "answer": answer, "qtype": record["qtype"]}))
    seen: set[str] = set()
    rows = []
    for template, row in kept:
        if counts[template] <= 3 and row["answer"] not in seen:
            seen.add(row["answer"])
            rows.append(row)
    return rows


def clean_opening(text: str, longest_words: int = 60) -> str | None:
    """The first one or two sentences of `text` when they read as prose of 6 to `longest_words` words, else None."""
    sentences = split_sentences(re.sub(r"^(?:Key Points|Summary|Overview|Definition)\s*[-:]\s*", "", text.strip()))
    while sentences and sentences[0].endswith("?"):  # a heading in the form of a question
        sentences.pop(0)
    taken: list[str] = []
    for sentence in sentences[:2]:
        words = sentence.split()
        proper = sentence[0].isupper() and sentence.endswith(".") and " - " not in sentence and ":" not in sentence
        if not proper or len(words) < 6 or sentence.count("(") != sentence.count(")") or _BOILERPLATE.search(sentence):
            break
        if sum(len(s.split()) for s in taken) + len(words) > longest_words:
            break
        taken.append(sentence)
    return " ".join(taken) or None


def dental_examples(rows: Iterable[dict], longest_context_words: int, seed: int) -> list[Example]:
    """DentalQA rows as training pairs of the groups `dental`, `statement` and `context`.

    A fact is seen as the answer to each of its questions, once as a statement asked for by concept and aspect, and
    once as a sentence to be continued. Long contexts are shortened round the sentences that support the answer.
    """
    rng = random.Random(seed)
    made: list[Example] = []
    stated: set[tuple[str, str]] = set()
    for row in rows:
        context = (row["context"] or "").strip()
        if context:
            passage = shorten_context(context, row["answer"], longest_context_words, rng)
            made.append(Example(format_source(row["question"], passage), row["answer"], "context"))
            continue
        made.append(Example(format_source(row["question"]), row["answer"], "dental"))
        name = row["concept"].replace("_", " ")
        if "+" in row["aspect"] or (name, row["answer"]) in stated:
            continue
        stated.add((name, row["answer"]))
        aspect = row["aspect"].replace("_", " ")
        made.append(Example(f"statement: {name}, {aspect}", row["answer"], "statement"))
        words = row["answer"].split()
        cut = rng.randint(2, max(2, min(8, len(words) // 2)))
        if len(words) > cut + 2:
            source = f"continue: {name}, {aspect}: {' '.join(words[:cut])}"
            made.append(Example(source, " ".join(words[cut:]), "statement"))
    return made


def medquad_examples(rows: Sequence[dict], seed: int, distractors: int = 3) -> list[Example]:
    """Every other row as a closed-book question; the others as questions with a context that holds their answer.

    The answers of the second kind are met nowhere else, so that they can be learnt from the context alone: this is
    the recall task in the form in which it is needed.
    """
    rng = random.Random(seed)
    made = []
    for number, row in enumerate(rows):
        if number % 2 == 0:
            made.append(Example(format_source(row["question"]), row["answer"], "medquad"))
            continue
        passages = [row["answer"]]
        passages += [rng.choice(rows)["answer"] for _ in range(rng.randint(1, distractors))]
        rng.shuffle(passages)
        made.append(Example(format_source(row["question"], " ".join(passages)), row["answer"], "context"))
    return made


def shorten_context(context: str, answer: str, longest_words: int, rng: random.Random) -> str:
    """At most about `longest_words` words of `context`: the sentences nearest to `answer`'s, and others at random.

    One sentence is kept for each sentence of the answer (the one that shares most of its words); the order is kept.
    """
    sentences = split_sentences(context)
    lengths = [len(s.split()) for s in sentences]
    if sum(lengths) <= longest_words:
        return " ".join(sentences)
    words = [{w.lower() for w in content_words(s)} for s in sentences]
    kept = set()
    for said in split_sentences(answer):
        wanted = {w.lower() for w in content_words(said)}
        kept.add(max(range(len(sentences)), key=lambda i: len(wanted & words[i])))
    size = sum(lengths[i] for i in kept)
    for i in rng.sample(range(len(sentences)), len(sentences)):
        if i not in kept and size + lengths[i] <= longest_words:
            kept.add(i)
            size += lengths[i]
    return " ".join(sentences[i] for i in sorted(kept))


class TokenStore(Dataset):
    """Tokenised pairs on disk: flat token arrays, offsets and a group per pair, memory-mapped.

    `store[i]` is `(source ids, target ids)`, both int64 numpy arrays that end with eos.
    """

    _ARRAYS = ("source", "source_offsets", "target", "target_offsets", "group")

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        missing = [name for name in self._ARRAYS if not (folder / f"{name}.npy").is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {missing}: run the command with `--stage data` first")
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in self._ARRAYS]
        self.source, self.source_offsets, self.target, self.target_offsets, self.group = arrays

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source = self.source[self.source_offsets[index] : self.source_offsets[index + 1]]
        target = self.target[self.target_offsets[index] : self.target_offsets[index + 1]]
        return source.astype(np.int64), target.astype(np.int64)

    @property
    def source_lengths(self) -> np.ndarray:
        return np.diff(self.source_offsets)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.diff(self.target_offsets)

    @classmethod
    def write(
        cls, folder: str | Path, examples: Sequence[Example], tokenizer, longest_source: int, longest_target: int
    ) -> TokenStore:
        """Tokenise `examples` into `folder`; pairs longer than the limits (tokens) are dropped, none is truncated."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sources = tokenizer([e.source for e in examples], add_special_tokens=True)["input_ids"]
        targets = tokenizer([e.target for e in examples], add_special_tokens=True)["input_ids"]
        keep = [
            i
            for i in range(len(examples))
            if len(sources[i]) <= longest_source and 1 < len(targets[i]) <= longest_target
        ]
        for name, sequences in (("source", sources), ("target", targets)):
            chosen = [sequences[i] for i in keep]
            np.save(folder / f"{name}.npy", np.array([t for s in chosen for t in s], dtype=np.uint32))
            np.save(folder / f"{name}_offsets.npy", np.cumsum([0] + [len(s) for s in chosen], dtype=np.int64))
        group = np.array([GROUPS.index(examples[i].group) for i in keep], dtype=np.uint8)
        np.save(folder / "group.npy", group)
        return cls(folder)


class MixtureBatchSampler(Sampler[list[int]]):
    """Batches of similar lengths, drawn from the groups in given shares of tokens, for ever and the same for a seed.

    A pool of pairs is drawn group by group (always from the group that is furthest behind its share; each group in a
    new random order whenever it is used up), sorted by length, cut into batches of at most `tokens` padded tokens
    (source plus target) and shuffled. `__len__` is `steps`; the first n batches do not depend on it.

    Args:
        store: the tokenised pairs.
        weights: share of tokens per group name; groups without pairs are left out.
        tokens: padded tokens a batch, source plus target.
        steps: number of batches of one pass.
        seed: of every random order.
        pool: pairs a pool.
        later: shares of tokens from batch `later_from` on (to the nearest pool).

    Raises:
        ValueError: no group with a weight above 0 has pairs.
    """

    def __init__(
        self,
        store: TokenStore,
        weights: dict[str, float],
        tokens: int,
        steps: int,
        seed: int,
        pool: int = 2048,
        later: dict[str, float] | None = None,
        later_from: int = 0,
    ):
        group = np.asarray(store.group)
        members = {GROUPS.index(n): np.flatnonzero(group == GROUPS.index(n)) for n, w in weights.items() if w > 0}
        self.members = {g: ids for g, ids in members.items() if len(ids)}
        if not self.members:
            raise ValueError(f"no pairs for the weights {weights}: at least one group must have text and a weight > 0")
        self.weights = {g: float(weights[GROUPS[g]]) for g in self.members}
        self.later = {g: float((later or weights)[GROUPS[g]]) for g in self.members}
        self.later_from = later_from
        self.source, self.target = store.source_lengths, store.target_lengths
        self.tokens, self.steps, self.seed, self.pool = tokens, steps, seed, pool

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng(self.seed)
        queues = {g: iter(()) for g in self.members}
        spent = dict.fromkeys(self.members, 0.0)
        given = 0
        weights = self.weights
        while True:
            pool = []
            if weights is not self.later and given >= self.later_from:
                weights, spent = self.later, dict.fromkeys(self.members, 0.0)
            for _ in range(self.pool):
                g = min(spent, key=lambda k: spent[k] / weights[k])
                index = next(queues[g], None)
                if index is None:
                    queues[g] = iter(rng.permutation(self.members[g]))
                    index = next(queues[g])
                spent[g] += self.source[index] + self.target[index]
                pool.append(index)
            batches = self._cut(np.array(pool), rng)
            rng.shuffle(batches)
            for batch in batches:
                if given == self.steps:
                    return
                given += 1
                yield [int(index) for index in batch]

    def _cut(self, pool: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        source, target = self.source[pool], self.target[pool]
        order = np.lexsort((rng.random(len(pool)), target, source // 8))
        batches, current, widest, longest = [], [], 0, 0
        for index in pool[order]:
            wide, long = max(widest, self.source[index]), max(longest, self.target[index])
            if current and (len(current) + 1) * (wide + long) > self.tokens:
                batches.append(np.array(current))
                current, wide, long = [], self.source[index], self.target[index]
            current.append(index)
            widest, longest = wide, long
        return [*batches, np.array(current)]


def _pad(sequences: Sequence[np.ndarray], value: int, left: bool = False) -> torch.Tensor:
    longest = max(len(s) for s in sequences)
    out = np.full((len(sequences), longest), value, dtype=np.int64)
    for row, s in zip(out, sequences, strict=True):
        begin = longest - len(s) if left else 0
        row[begin : begin + len(s)] = s
    return torch.from_numpy(out)


def collate_et5(pairs: Sequence[tuple[np.ndarray, np.ndarray]], pad: int = 0) -> dict[str, torch.Tensor]:
    """T5's batch: `input_ids` (B, S) right-padded, `attention_mask` (B, S), `labels` (B, T) with -100 as padding."""
    source = _pad([s for s, _ in pairs], pad)  # (B, S)
    lengths = torch.tensor([len(s) for s, _ in pairs])
    mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    return {"input_ids": source, "attention_mask": mask, "labels": _pad([t for _, t in pairs], IGNORE)}


def collate_emamba(pairs: Sequence[tuple[np.ndarray, np.ndarray]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Mamba's batch: one causal sequence `[source] [decoder start = pad id] [target but its last token]`.

    Sources are left-padded with mask 0, so that padding never reaches the state; targets are right-padded (what
    follows them is never read). `labels` (B, T) belong to the last T positions of `input_ids` (B, S + T): the
    decoder start predicts the first target token, and the eos that ends the target is predicted but not fed.
    """
    source = _pad([s for s, _ in pairs], pad, left=True)  # (B, S)
    labels = _pad([t for _, t in pairs], IGNORE)  # (B, T)
    fed = torch.cat([torch.full((len(pairs), 1), pad), labels[:, :-1]], dim=1)  # (B, T)
    fed = fed.masked_fill(fed == IGNORE, pad)
    lengths = torch.tensor([len(s) for s, _ in pairs])
    mask = (torch.arange(source.shape[1]) >= source.shape[1] - lengths[:, None]).long()
    mask = torch.cat([mask, torch.ones_like(fed)], dim=1)  # (B, S + T)
    return {"input_ids": torch.cat([source, fed], dim=1), "attention_mask": mask, "labels": labels}
