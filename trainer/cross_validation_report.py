# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Means and spreads over the folds of a cross-validation, as plain values and as Markdown."""

from __future__ import annotations

from statistics import fmean, stdev

LABELS = {"mambaformer": "MambaFormer", "emamba": "always EMamba", "et5": "always ET5"}
SKIPPED = ("questions",)


def summarise(folds: list[dict[str, dict[str, float | str]]]) -> dict[str, dict[str, dict]]:
    """
    By policy and metric: `mean`, `deviation` and `values`, one a fold.

    Args:
        folds: the scores of each fold, by policy and metric; names of encoders are left out.
    """
    return {
        policy: {metric: spread([fold[policy][metric] for fold in folds]) for metric in metrics(folds, policy)}
        for policy in folds[0]
    }


def metrics(folds: list[dict[str, dict[str, float | str]]], policy: str) -> list[str]:
    """The metrics that are numbers, and that every fold has."""
    return [
        name
        for name, value in folds[0][policy].items()
        if name not in SKIPPED and not isinstance(value, str) and all(name in fold[policy] for fold in folds)
    ]


def spread(values: list[float]) -> dict:
    """Mean, sample standard deviation (n - 1), and the values themselves."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else 0.0, "values": values}


def to_markdown(report: dict) -> str:
    """The report of `cross_validate`."""
    summary, folds = report["summary"], report["folds"]
    encoder = folds[0]["scores"]["mambaformer"].get("bert_score_model")
    scorer = f" BERTScore is by {encoder}." if encoder else ""
    lines = [
        f"# Cross-validation on {report['dataset']}, {len(folds)} folds",
        "",
        f"{report['rows']} rows, no {report['group_column']} in two folds ({report['groups']} in all), seed "
        f"{report['seed']}. Mean ± standard deviation over the folds.{scorer}",
        "",
    ]
    names = list(summary["mambaformer"])
    lines += table(
        ["", *names],
        [
            [LABELS[policy], *(f"{found[name]['mean']:.4f} ± {found[name]['deviation']:.4f}" for name in names)]
            for policy, found in summary.items()
        ],
    )
    for policy, found in summary.items():
        rows = [
            [
                f"fold {fold['fold']} ({fold['rows']['scored']} of {fold['rows']['test']} rows)",
                *(f"{found[n]['values'][at]:.4f}" for n in names),
            ]
            for at, fold in enumerate(folds)
        ]
        lines += ["", f"## {LABELS[policy]}", "", *table(["", *names], rows)]
    return "\n".join(lines)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left, the others to the right."""
    heads = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    return [f"| {' | '.join(line)} |" for line in (*heads, *rows)]
