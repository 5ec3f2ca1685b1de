# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""From an evaluation's figures to tables, and from tables to Markdown; nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable

from .evaluation_statistics import Interval

Table = dict
"""`title`, `columns` (headings), `rows` (lists of texts or numbers), perhaps `note`."""

METRIC_LABELS = {
    "bert_score": "BERTScore F1",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "exact_match": "Exact",
}
RULE_LABELS = {
    "mambaformer": "MambaFormer, with its gate",
    "router": "learned router, gate open",
    "confidence": "confidence rule",
    "entropy": "entropy rule",
    "random": "random",
    "sequence": "choice by sequence",
    "informed": "both distributions seen, answer not",
    "oracle": "oracle",
}
TIMES = (
    ("Median ms an answer", 1000, 0, "median"),
    ("p95 ms an answer", 1000, 0, "p95"),
    ("Tokens an answer, of those timed", 1, 1, "tokens"),
)
"""Label, factor, digits and key of what a row's `latency` says."""
EXPERT_LABELS = {
    "emamba": "EMamba",
    "et5": "ET5",
    "soft": "soft mixture by the router",
    "even_mixture": "even mixture",
}


def number(value: float, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value != value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share with one digit, or a dash where there is none."""
    return "–" if value != value else f"{value:.1%}"


def span(interval: Interval, digits: int = 3) -> str:
    """A figure with its interval."""
    low, high = (number(interval[end], digits) for end in ("low", "high"))
    return f"{number(interval['value'], digits)} [{low}, {high}]"


def heading(metric: str, scorer: str | None) -> str:
    """A metric's label; BERTScore never without its encoder."""
    return METRIC_LABELS[metric] + (f" ({scorer})" if metric == "bert_score" else "")


def quality_table(split: str, found: dict, scorer: str | None) -> Table:
    """Scores, ET5's work and latency of every policy on one split."""
    metrics = [m for m in METRIC_LABELS if m in next(iter(found["policies"].values()))["scores"]]
    work = ["ET5 share", "Passes", "Caught up", "Encoder runs", "ET5 ms", "Median ms", "p95 ms", "Tokens/s"]
    rows = []
    for row in found["policies"].values():
        line = [row["label"], *(span(row["scores"][m]) for m in metrics), percent(row["et5_share"])]
        line += [number(row[k], 2) for k in ("passes", "caught_up", "encoder_calls")] + [number(row["cost_ms"], 1)]
        latency = row.get("latency")
        if latency:
            line += [number(1000 * latency["median"], 0), number(1000 * latency["p95"], 0)]
            line += [number(latency["tokens_per_second"], 0)]
        else:
            line += ["–", "–", "–"]
        rows.append(line)
    return {
        "title": f"Answers to {found['questions']} questions of {split}",
        "columns": ["Answers by", *(heading(m, scorer) for m in metrics), *work],
        "rows": rows,
    }


def plain_table(split: str, found: dict, scorer: str | None, parameters: dict[str, int]) -> Table | None:
    """MambaFormer and a plain T5 side by side, or `None` where no plain T5 answered."""
    policies = found["policies"]
    if "plain_t5" not in policies:
        return None
    own, plain = policies["mambaformer"], policies["plain_t5"]
    less = plain["mambaformer_less_this"]
    rows = [
        [heading(metric, scorer), span(own["scores"][metric]), span(plain["scores"][metric]), span(less[metric], 4)]
        for metric in METRIC_LABELS
        if metric in less
    ]
    sizes = parameters["mambaformer"], parameters["plain_t5"]
    rows.append(["Parameters", *(f"{size:,}" for size in sizes), f"{sizes[1] / sizes[0]:.2f} ×"])
    if "latency" in plain:
        for label, scale, digits, key in TIMES:
            pair = own["latency"][key], plain["latency"][key]
            rows.append([label, *(number(scale * value, digits) for value in pair), f"{pair[1] / pair[0]:.2f} ×"])
    return {
        "title": f"MambaFormer beside a plain T5 on {split}",
        "columns": ["", own["label"], plain["label"], "MambaFormer less plain T5, or plain T5's multiple"],
        "rows": rows,
    }


def difference_table(split: str, found: dict, scorer: str | None) -> Table:
    """MambaFormer's scores less everybody else's, and every other policy's less the better expert's."""
    policies = found["policies"]
    own = policies["mambaformer"]
    metrics = [m for m in METRIC_LABELS if m in own["scores"]]
    pairs = [(own["label"], other, less) for other, less in own["less"].items()]
    pairs += [
        (own["label"], row["label"], row["mambaformer_less_this"])
        for row in policies.values()
        if "mambaformer_less_this" in row
    ]
    pairs += [
        (row["label"], "better expert", row["less"]["better expert"])
        for name, row in policies.items()
        if "less" in row and name != "mambaformer"
    ]
    return {
        "title": f"Differences on {split}",
        "columns": ["Answers by", "less", *(heading(m, scorer) for m in metrics)],
        "rows": [[label, other, *(span(less[m], 4) for m in metrics)] for label, other, less in pairs],
    }


def rule_label(row: dict) -> str:
    """A rule's label, with the feature of a rule by sequence, and what it was made equal in where that is the cost."""
    label = RULE_LABELS[row["policy"]] + (f" ({row['feature']})" if "feature" in row else "")
    return label + (", equal cost" if row["matched"].endswith("cost") else "")


def likelihood_table(split: str, found: dict, budget: float, on_split: bool) -> Table:
    """Policies on the gold answers at one budget, with thresholds of the split itself or of validation."""
    rows = []
    for row in found["likelihood"]["policies"]:
        if row["budget"] != budget or row["matched"].startswith("split_") != on_split:
            continue
        line = [rule_label(row), f"{row['share']:.1%}", f"{row['called']:.0%}", number(row["cost_ms"], 1)]
        rows.append([*line, number(row["perplexity"], 2), span(row["gain"], 4), span(row["captured"], 2)])
    columns = ["Policy", "ET5 share", "Answers with ET5", "ET5 ms", "Perplexity", "Gain, nats a token"]
    how = "thresholds of the split itself, set without its answers" if on_split else "thresholds of validation"
    return {
        "title": f"Gold answers of {split} at {100 * budget:g} %, {how}",
        "columns": [*columns, "Share of the oracle's gain"],
        "rows": rows,
    }


def advantage_table(split: str, found: dict) -> Table:
    """How many nats a token MambaFormer and its router win over each rule at the main budget."""
    differences = found["likelihood"]["differences"]
    rows = []
    for key in differences["mambaformer"]:
        policy, matched = key.split("/")
        how = ("split" if matched.startswith("split_") else "validation", matched.removeprefix("split_"))
        cells = [span(differences[own][key], 4) for own in ("mambaformer", "router")]
        rows.append([RULE_LABELS[policy], f"equal {how[1]}, {how[0]}", *cells])
    return {
        "title": f"Gain on {split} less that of each rule, nats a token",
        "columns": ["Rule", "Made equal on", RULE_LABELS["mambaformer"], RULE_LABELS["router"]],
        "rows": rows,
    }


def captured_table(split: str, found: dict) -> Table:
    """Share of the oracle's gain by policy and budget."""
    table = [row for row in found["likelihood"]["policies"] if row["matched"] == "split_share"]
    budgets = sorted({row["budget"] for row in table})
    rows = []
    for policy, label in RULE_LABELS.items():
        cells = {row["budget"]: number(row["captured"]["value"], 2) for row in table if row["policy"] == policy}
        if cells and policy != "oracle":
            rows.append([label, *(cells[b] for b in budgets)])
    gains = {row["budget"]: number(row["gain"]["value"], 4) for row in table if row["policy"] == "oracle"}
    rows.append(["oracle's gain, nats a token", *(gains[b] for b in budgets)])
    return {
        "title": f"Share of the oracle's gain by budget on {split}, thresholds of the split itself",
        "columns": ["Policy", *(f"{100 * b:g} %" for b in budgets)],
        "rows": rows,
    }


def expert_table(splits: dict[str, dict]) -> Table:
    """Perplexity of gold answers, by split."""
    rows = []
    for name, label in EXPERT_LABELS.items():
        cells = []
        for found in splits.values():
            said = found["likelihood"]["experts"][name]
            cells.append(f"{said['perplexity']:.2f} ({span(said['nats'])})")
        rows.append([label, *cells])
    return {"title": "Perplexity of the gold answers (nats a token)", "columns": ["", *splits], "rows": rows}


def decision_table(split: str, found: dict) -> Table | None:
    """PubMedQA's decisions, or `None` where the data has none."""
    scored = {row["label"]: row["decisions"] for row in found["policies"].values() if "decisions" in row}
    if not scored:
        return None
    rows = [
        [label, *(f"{d[k]:.3f}" for k in ("accuracy", "macro_f1")), f"{d['decided']:.0%}"]
        for label, d in scored.items()
    ]
    any_one = next(iter(scored.values()))
    majority = ["always the commonest", *(f"{any_one[f'majority_{k}']:.3f}" for k in ("accuracy", "macro_f1")), "100%"]
    return {
        "title": f"Yes, no, maybe on {split}",
        "columns": ["Answers by", "Accuracy", "Macro-F1", "Answers with a decision"],
        "rows": [*rows, majority],
    }


def all_tables(result: dict) -> dict[str, Table]:
    """Every table of an evaluation, by name."""
    tables: dict[str, Table] = {"perplexity": expert_table(result["splits"])}
    for split, found in result["splits"].items():
        tables[f"quality_{split}"] = quality_table(split, found, result["bert_score_model"])
        beside = plain_table(split, found, result["bert_score_model"], result["parameters"])
        if beside is not None:
            tables[f"plain_{split}"] = beside
        tables[f"differences_{split}"] = difference_table(split, found, result["bert_score_model"])
        tables[f"likelihood_{split}"] = likelihood_table(split, found, result["budget"], True)
        tables[f"likelihood_validation_{split}"] = likelihood_table(split, found, result["budget"], False)
        tables[f"advantage_{split}"] = advantage_table(split, found)
        tables[f"captured_{split}"] = captured_table(split, found)
        decisions = decision_table(split, found)
        if decisions is not None:
            tables[f"decisions_{split}"] = decisions
    return tables


def markdown_table(table: Table) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""
    lines = [table["columns"], ["---", *["---:"] * (len(table["columns"]) - 1)], *table["rows"]]
    body = "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)
    return f"### {table['title']}\n\n{body}"


def to_markdown(result: dict, figures: Iterable[str]) -> str:
    """The whole report."""
    machine = result["machine"]
    scorer, digest = result["bert_score_model"], result["weights_sha256"]
    weights = f"Weights sha256 {digest[:16]}…." if digest else "Weights from the Hub."
    scored = f"BERTScore is by {scorer}; scores by other encoders do not compare." if scorer else "Without BERTScore."
    head = [
        f"# Evaluation of {result['model']} on {result['data']}\n",
        f"`{result['command']}`\n",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {result['threads']} threads, Python "
        f"{machine['python']}, torch {machine['versions'].get('torch', '?')}, transformers "
        f"{machine['versions'].get('transformers', '?')}. {weights}\n",
        f"{scored} Brackets are 95 % intervals by a paired bootstrap over questions ({result['resamples']} resamples, "
        f"seed {result['seed']}). Thresholds are calibrated on {result['calibration_rows']} validation questions. "
        "ET5 ms is what ET5 costs an answer by the cost table: passes, positions caught up, encoder runs. Times: "
        f'{result["latency_rows"]} questions a split, one at a time. "Equal cost" means: set so '
        "that ET5 costs on the split's own answers what it costs in MambaFormer's, which takes no reference.\n",
    ]
    if "plain_t5" in result["parameters"]:
        digest = f", weights sha256 {result['plain_sha256'][:16]}…" if result["plain_sha256"] else ""
        head.append(
            f"The plain T5{digest} answers through transformers' own generate: the same sources in batches of the "
            "same size, the same limits, and its turn at each timed question. No ET5 is called for it.\n"
        )
    body = [markdown_table(table) for table in all_tables(result).values()]
    pictures = [f"![{name.removesuffix('.png')}]({name})\n" for name in figures]
    return "\n".join([*head, *body, *pictures])
