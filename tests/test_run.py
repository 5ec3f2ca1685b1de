# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`trainer/run.py` from the outside: arguments, a whole small run, taking up a stopped one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_training import tiny_rows, tiny_tokenizer, write_jsonl

from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.run import main
from mambaformer.trainer.run_arguments import RunArguments
from mambaformer.trainer.run_parsing import parse, split_overrides

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def parser():
    """Of all the fields that a run takes."""
    from transformers import HfArgumentParser

    return HfArgumentParser([RunArguments, MambaFormerTrainingArguments])


@pytest.fixture
def inputs(et5_folder, emamba_folder, tmp_path) -> list[str]:
    """Command-line arguments that name tiny experts, a tokenizer, data and an output folder."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "qa.jsonl", tiny_rows(40))
    named = {
        "et5": et5_folder,
        "emamba": emamba_folder,
        "tokenizer": tmp_path / "tokenizer",
        "dataset": tmp_path / "qa.jsonl",
        "output_dir": tmp_path / "out",
    }
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def config_file(tmp_path, values: dict) -> str:
    """A YAML file of `values`."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_command_line_beats_stage_beats_file(parser, tmp_path):
    path = config_file(
        tmp_path,
        {
            "model_name_or_path": "m",
            "learning_rate": "1e-3",
            "max_steps": 7,
            "use_cpu": True,
            "output_dir": str(tmp_path / "out"),
            "distil": {"max_steps": 9, "w_burst": 0.25},
        },
    )
    run, stages = parse([path, "--seed", "5", "--distil.learning_rate", "0.5", "--stages", "distil", "adapt"], parser)
    assert run.model_name_or_path == "m" and list(stages) == ["distil", "adapt"]
    adapt, distil = stages["adapt"], stages["distil"]
    assert (adapt.stage, adapt.max_steps, adapt.learning_rate, adapt.w_burst, adapt.seed) == ("adapt", 7, 1e-3, 0.0, 5)
    assert (distil.stage, distil.max_steps, distil.learning_rate, distil.w_burst) == ("distil", 9, 0.5, 0.25)
    assert distil.output_dir == str(tmp_path / "out" / "distil")


def test_overrides_are_separated_by_stage():
    common, by_stage = split_overrides(["--a", "1", "--adapt.b", "2", "3", "--c"])
    assert common == ["--a", "1", "--c"] and by_stage["adapt"] == ["--b", "2", "3"] and not by_stage["distil"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_name_or_path": "m", "learning_rte": 1}, "learning_rate"),
        ({"model_name_or_path": "m", "adapt": {"max_stepz": 1}}, "max_steps"),
        ({"model_name_or_path": "m", "stages": ["adopt"]}, "adopt"),
        ({"et5": "only one expert"}, "only one expert"),
        ({"model_name_or_path": "m", "tau": -1}, "-1"),
        ({"model_name_or_path": "m", "save_form": "small"}, "small"),
    ],
)
def test_bad_configurations_end_with_code_2_and_name_the_value(tmp_path, capsys, values, named):
    assert main([config_file(tmp_path, {"use_cpu": True, "output_dir": str(tmp_path / "out"), **values})]) == 2
    assert named in capsys.readouterr().err


def test_absent_configuration_is_named(capsys):
    assert main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_help_lists_the_fields_without_torch(repo_root):
    code = "import sys; sys.argv = ['run.py', '--help']; import runpy\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch'"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root / "trainer", capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(RunArguments):
        assert f"--{field.name}" in done.stdout


@pytest.mark.parametrize(
    "name", ["smoke", "dental_embedded", "flan_t5_base_mamba_130m", "flan_t5_large_mamba_370m_gpu"]
)
def test_shipped_configurations_parse(parser, repo_root, name, tmp_path):
    path = repo_root / "trainer" / "configs" / f"{name}.yaml"
    values = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true", "--report_to", "none"]
    if name == "smoke":
        values += ["--model_name_or_path", "m"]
    run, stages = parse([str(path), *values], parser)
    assert list(stages) == run.stages
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#") and sum(line.strip().startswith("#") for line in lines) > len(lines) / 6


def stored_in_bfloat16(model) -> bool:
    """Whether a model of float32 holds nothing but what bfloat16 holds."""
    return all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_the_embedded_default_is_small_on_disk_and_loaded_as_it_was_calibrated():
    assert stored_in_bfloat16(MambaFormerForConditionalGeneration.from_pretrained(embedded_checkpoint()))


@pytest.mark.slow
def test_a_whole_run_by_path_and_what_it_leaves(repo_root, inputs, tmp_path):
    config = repo_root / "trainer" / "configs" / "smoke.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*launcher, "trainer/run.py", str(config), *inputs, "--distil.max_steps", "2", "--save_dtype", "bfloat16"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "training_report.json").read_text(encoding="utf-8"))
    assert report["rows"] == {"train": 36, "validation": 4, "distil": 36}
    assert report["stages"]["adapt"]["step"] == 3 and report["stages"]["distil"]["step"] == 2
    assert set(report["scores"]) >= {"exact_match", "token_f1", "rouge_l", "et5_share"}

    model = MambaFormerForConditionalGeneration.from_pretrained(tmp_path / "out" / "model")
    assert stored_in_bfloat16(model)
    assert model.config.router_threshold == report["calibration"]["router_threshold"]
    assert model.config.cost_table == report["cost_table"]
    assert not [name for name in model.state_dict() if "lora" in name]
    tokenizer = type(tiny_tokenizer()).from_pretrained(tmp_path / "out" / "model")
    answer = model.generate(**tokenizer("question: what is pulp?", return_tensors="pt"), max_new_tokens=4)
    assert answer.shape[1] <= 5


def test_a_stopped_run_is_taken_up(repo_root, inputs, tmp_path, capsys):
    config = str(repo_root / "trainer" / "configs" / "smoke.yaml")
    quick = ["--calibrate", "false", "--score_samples", "0", "--cost_table", "keep"]
    assert main([config, *inputs, *quick, "--seed", "1"]) == 0
    whole = weights(tmp_path / "out" / "model")
    for path in (tmp_path / "out" / "distil" / "finished").iterdir():
        path.unlink()
    (tmp_path / "out" / "distil" / "finished").rmdir()
    assert main([config, *inputs, *quick, "--seed", "1", "--resume", "true"]) == 0
    again = weights(tmp_path / "out" / "model")
    assert whole.keys() == again.keys()
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_both_forms_hold_the_same_model(repo_root, inputs, et5_folder, emamba_folder, tmp_path, capsys):
    """Also where a second stage goes on with the adapters of the first, past the router's."""
    from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration

    config = str(repo_root / "trainer" / "configs" / "smoke.yaml")
    quick = ["--calibrate", "false", "--score_samples", "0", "--cost_table", "keep", "--max_steps", "1"]
    assert main([config, *inputs, *quick, "--stages", "adapt", "distil", "joint", "--save_form", "both"]) == 0
    assert str(tmp_path / "out" / "adapters") in capsys.readouterr().out
    whole = weights(tmp_path / "out" / "model")
    assert not (tmp_path / "out" / "adapters" / "model.safetensors").exists()
    apart = MambaFormerForConditionalGeneration.from_adapters_pretrained(
        tmp_path / "out" / "adapters", et5_folder, emamba_folder
    )
    assert set(whole) <= set(apart.state_dict())
    for name, tensor in whole.items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    model = [str(word) for word in (config, "--model_name_or_path", tmp_path / "out" / "model", *inputs[4:])]
    assert main([*model, *quick, "--save_form", "adapters", "--output_dir", str(tmp_path / "again")]) == 2
    assert "of et5" in capsys.readouterr().err  # neither are the bases there, nor are these weights theirs


@pytest.mark.slow
def test_two_processes_train_as_one(repo_root, inputs, tmp_path):
    """Half the batch on each of two processes gives the step of one; the router, too, whose pass is not wrapped."""
    base = [str(repo_root / "trainer" / "run.py"), str(repo_root / "trainer" / "configs" / "smoke.yaml"), *inputs]
    base += ["--calibrate", "false", "--score_samples", "0", "--cost_table", "keep"]
    base += ["--train_sampling_strategy", "sequential", "--w_use", "0", "--w_gate", "0", "--max_steps", "1"]
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, size in (([sys.executable], 4), (pair, 2)):
        folder = ["--output_dir", str(tmp_path / f"out{size}"), "--per_device_train_batch_size", str(size)]
        done = subprocess.run([*launcher, *base, *folder], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((tmp_path / f"out{size}" / "training_report.json").read_text(encoding="utf-8")) for size in (4, 2)
    )
    for stage in ("adapt", "distil"):
        for name in ("loss", "grad_norm", "train_loss"):  # of one step: the running threshold is a mean of quantiles
            assert two["stages"][stage][name] == pytest.approx(one["stages"][stage][name], rel=2e-3), (stage, name)


def weights(folder) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
