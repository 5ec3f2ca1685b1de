# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Writes the data set's card: Hub metadata, what it is and is not, and the statistics of this build."""

from __future__ import annotations

import hashlib
import json

from .loading import PACKAGE, read_yaml
from .schema import SPLITS, Concept, Row
from .similarity import NEAR_DUPLICATE, SHINGLE
from .stats import statistics

TEMPLATE = """---
pretty_name: DentalQA
license: cc-by-4.0
language:
- en
task_categories:
- question-answering
tags:
- dentistry
- medical
- synthetic
size_categories:
- {size_category}
annotations_creators:
- machine-generated
language_creators:
- machine-generated
source_datasets:
- original
configs:
- config_name: default
  data_files:
{data_files}
---
# DentalQA

Questions and answers about dentistry in English, for training and testing small text-to-text models. Answers are
composed
from short facts, each with an id, so that a mistake can be traced to one line of one source file and mended there.

**Not medical advice.** The facts were written with a language model for the MambaFormer project and were **not
reviewed by a
clinician**. Nobody should decide about care on the strength of this data or of a model trained on it.

## Use

```python
from datasets import load_dataset

data = load_dataset("<owner>/dental_qa")  # or the folder that holds this card
print(data["train"][0]["question"], data["train"][0]["answer"])
```

Publish a copy of this folder with `hf upload <owner>/dental_qa . --repo-type dataset`.

## A row

| column | meaning |
| --- | --- |
| `id` | concept, aspects, style and a running number; unique |
| `question` | the question alone |
| `context` | empty, or a passage or case record of up to 1,500 words to read first |
| `answer` | 1 to 6 sentences |
| `concept`, `field` | what is asked about |
| `aspect` | definition, causes, treatment and so on; two or three joined by `+` |
| `style` | `patient`, `clinician` or `exam` |
| `length_class` | `short_simple` (one aspect), `short_complex` (two or three), `long` (with a context) |
| `difficulty` | `easy`, `medium` or `hard`, by the number of aspects and the length of the context |
| `facts` | ids of the facts that make up the answer, in order |
| `split` | the split's name |

## Splits

- `train`: each aspect of each training concept in several wordings, and some pairs and triples of aspects.
- `validation` and `test_phrasing`: training concepts in wordings that no training row uses. Each answer is a
  composition
  (two or three aspects together, or the first sentence of an aspect alone) that no training answer is, although its
  sentences are in
  training: what is tested is wording and composition, not unseen knowledge.
- `test_concept`: concepts that no training row asks about, and whose names no training fact mentions.
- `test_long`: contexts that hold the answer's facts somewhere, for concepts of `test_concept` and for pairs of aspects
  that no other split asks for together.

No question and no answer stands in two splits, compared without case and punctuation; nor do two whose sets of word
{shingle}-grams have a Jaccard similarity of {threshold} or more. Tests of the project hold this.

## Statistics

{statistics}

## Made how

Concept files (one for each field, YAML) hold facts by aspect. The builder puts names into wordings written by hand,
joins facts to
answers and assembles contexts from facts of several concepts. It is deterministic; these rows came from sources
with the digest
`{digest}`. Wordings, facts and contexts are the project's own; no sentence was taken from elsewhere, and a test
compares all word
8-grams with MedQuAD and PubMedQA.

## Read again

The pairs and the facts were read as a sceptical dentist would, by a language model, not by a clinician. What a reading
found was corrected
before the next one, everywhere it occurred.

{readings}

## Limits

- Written with a language model; no clinician has read it. Errors are likely, and some statements will age.
- The questions follow a limited set of wordings, and the answers are facts in a fixed order: scores on it say
  little about real patients' questions.
- Mostly British spelling and terms; practice differs between countries, which the facts mention only in part.
- No images, no dialogue, no names or records of real people: the people in case records are invented.

## Intended use

Research on small question-answering models, routing between experts, and evaluation of retrieval from long
contexts. Out of scope:
giving advice to patients, clinical decisions, and the certification of any product.

## Licence

CC BY 4.0, the MambaFormer developers.
"""


def digest(concepts: list[Concept]) -> str:
    """SHA-256 over ids, names and facts, shortened: says which sources a build came from."""
    content = [[c.id, c.field, c.name, c.plural, c.aliases, c.neighbour, c.all_facts] for c in concepts]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def size_category(rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if rows < limit:
            return name
    return "100K<n<1M"


def readings_table() -> str:
    """What each reading of `readings.yaml` found, as a Markdown table."""
    lines = [
        "| date | read | factual errors | question not answered | vague | wording |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in read_yaml(PACKAGE / "readings.yaml")["readings"]:
        found = " | ".join(str(one[kind]) for kind in ("factual", "no_answer", "vague", "wording"))
        lines.append(f"| {one['date']} | {one['read']:,} {one['of']} | {found} |")
    return "\n".join(lines)


def card(concepts: list[Concept], rows: list[Row]) -> str:
    """The card as Markdown with a YAML head that `datasets` and the Hub read."""
    return TEMPLATE.format(
        size_category=size_category(len(rows)),
        data_files="\n".join(f"  - split: {split}\n    path: {split}.parquet" for split in SPLITS),
        shingle=SHINGLE,
        threshold=NEAR_DUPLICATE,
        statistics=statistics(concepts, rows),
        digest=digest(concepts),
        readings=readings_table(),
    )
