# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Traces of a finished run: what a real run keeps, what is read where less is kept, and the figure."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer.trainer.run import main
from mambaformer.trainer.training_plots import (
    TRACES_FIGURE,
    Traces,
    curve,
    panels_of,
    plot_traces,
    read_traces,
)

ROUTING = {"lambda", "share", "soft_share", "passes", "encoder_calls", "oracle_gain", "router_gain", "oracle_gap"}


@pytest.fixture(scope="module")
def finished(repo_root, et5_folder, emamba_folder, tmp_path_factory):
    """The output folder of a small run that kept checkpoints too."""
    folder = tmp_path_factory.mktemp("run")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "qa.jsonl", tiny_rows(24))
    named = {"et5": et5_folder, "emamba": emamba_folder, "tokenizer": folder / "tokenizer"}
    named |= {"dataset": folder / "qa.jsonl", "output_dir": folder / "out"}
    words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    quick = ["--calibrate", "false", "--score_samples", "0", "--cost_table", "keep", "--expert_budget", "0.25"]
    quick += ["--save_strategy", "steps", "--save_steps", "3"]
    assert main([str(repo_root / "trainer" / "configs" / "smoke.yaml"), *words, *quick]) == 0
    return folder / "out"


def test_a_run_keeps_what_each_stage_logged(finished):
    traces = read_traces(finished)
    report = json.loads((finished / "training_report.json").read_text(encoding="utf-8"))
    assert list(traces.stages) == list(report["stages"]) == ["adapt", "distil"]
    assert traces.share == 0.25
    for stage, entries in traces.stages.items():
        steps, losses = curve(entries, "loss")
        assert steps.tolist() == [1, 2, 3] and losses[-1] == report["stages"][stage]["loss"]
    drawn = {name for names in panels_of(traces.stages["distil"]).values() for name in names}
    assert drawn > ROUTING | {"loss", "loss_util", "loss_gate"}
    assert "lambda" not in {name for names in panels_of(traces.stages["adapt"]).values() for name in names}


def test_an_older_run_is_read_from_its_checkpoints(finished, tmp_path):
    older = shutil.copytree(finished, tmp_path / "older")
    for file in older.glob("*/finished/log_history.jsonl"):
        file.unlink()
    (older / "training_report.json").unlink()
    again, whole = read_traces(older), read_traces(finished)
    assert list(again.stages) == list(whole.stages) and again.share == whole.share
    for stage, entries in again.stages.items():  # a checkpoint does not hold the last line, the run's summary
        assert entries == whole.stages[stage][: len(entries)] and len(entries) == 3


def test_folders_without_a_log_are_named(finished, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no log"):
        read_traces(tmp_path)
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / "adapt" / "finished" / "log_history.jsonl").write_text('{"step": 1\n', encoding="utf-8")
    with pytest.raises(ValueError, match="log_history.jsonl is not JSON"):
        read_traces(broken)


def test_the_figure_shows_every_quantity(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from mambaformer.trainer import training_plots

    kept = []
    monkeypatch.setattr(training_plots, "save", lambda figure, path: kept.append(figure) or path)
    traces = read_traces(finished)
    joint = [{**entry, "eval_loss": 1.0} for entry in traces.stages["distil"]]
    assert plot_traces(Traces({**traces.stages, "joint": joint}, 0.25), tmp_path / TRACES_FIGURE).name == TRACES_FIGURE
    axes = [axis for axis in kept[0].axes if axis.axison]
    assert [axis.get_ylabel() for axis in axes if axis.get_ylabel()] == ["stage adapt", "stage distil", "stage joint"]
    assert len(axes) == 2 + 5 + 5
    share = next(axis for axis in axes if "share of ET5" in axis.get_title())
    lines = {line.get_label(): line.get_ydata() for line in share.get_lines()}
    steps, values = curve(traces.stages["distil"], "share")
    assert list(lines["tokens routed"]) == pytest.approx([100 * value for value in values])
    assert lines["target"][0] == 25
    assert "weighted sum, evaluation" in {line.get_label() for line in axes[7].get_lines()}
