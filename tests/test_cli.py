# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The command line on tiny checkpoints: what it prints, and a clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import VOCAB, save_tiny_emamba, tiny_emamba
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models

from mambaformer import __version__
from mambaformer.cli import main
from mambaformer.cli_ask import Answer
from mambaformer.cli_render import bracketed, cost, show_routing, spans
from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer


@pytest.fixture(scope="session")
def et5_with_tokenizer(et5_folder, tmp_path_factory) -> Path:
    """The tiny ET5 with a tokenizer beside it, as a real checkpoint has."""
    folder = shutil.copytree(et5_folder, tmp_path_factory.mktemp("cli") / "et5")
    tiny_tokenizer().save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=64)
    return folder


@pytest.fixture(scope="session")
def composed(et5_with_tokenizer, emamba_folder, tmp_path_factory) -> Path:
    """A model that `mambaformer compose` made; random weights repeat one token for ever, so it may not repeat any."""
    out = tmp_path_factory.mktemp("cli") / "composed"
    assert main(["compose", "--et5", str(et5_with_tokenizer), "--emamba", str(emamba_folder), "--out", str(out)]) == 0
    edit_json(out / "generation_config.json", suppress_tokens=[0, 2], no_repeat_ngram_size=1, max_new_tokens=8)
    return out


@pytest.fixture
def broken(composed, tmp_path) -> Path:
    """A copy of the composed model, to be damaged."""
    return shutil.copytree(composed, tmp_path / "model")


@pytest.fixture
def refuse(capsys):
    """Run a command that must fail as a user's error, and return what it said."""

    def run(*arguments: str) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert len(said.err.splitlines()) <= 2
        return said.err

    return run


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---- what works


def test_ask_prints_the_answer_alone(composed, capsys):
    assert main(["ask", "what is pulpitis?", "--model", str(composed), "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err == ""


def test_json_agrees_with_the_trace(composed, capsys):
    command = ["ask", "what is pulpitis?", "--model", str(composed), "--json", "--max-new-tokens", "8"]
    assert main([*command, "--routing", "auto", "--budget", "0.5"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == set(Answer.__dataclass_fields__)
    count = len(said["tokens"])
    assert 1 <= count <= 8
    assert len(said["experts"]) == len(said["margins"]) == count
    assert said["et5_share"] == pytest.approx(sum(said["experts"]) / count)
    assert said["et5_share"] <= 0.5
    assert said["milliseconds"] > 0
    assert all(isinstance(margin, float) for margin in said["margins"])
    assert "".join(said["tokens"]).strip() == said["answer"] != ""


@pytest.mark.parametrize(("routing", "expert"), [("et5", 1), ("emamba", 0)])
def test_forced_routing_runs_one_expert(composed, capsys, routing, expert):
    command = ["ask", "what is pulpitis?", "--model", str(composed), "--json", "--max-new-tokens", "5"]
    assert main([*command, "--routing", routing]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["experts"]) == {expert}
    assert said["encoder_calls"] == expert
    assert (said["et5_passes"] > 0) == bool(expert)
    assert set(said["margins"]) == {None}


def test_context_changes_what_is_read(composed, tmp_path, capsys):
    context = tmp_path / "context.txt"
    context.write_bytes("\ufeffa pulp that hurts".encode())
    command = ["ask", "what is it?", "--model", str(composed), "--json", "--max-new-tokens", "8"]
    margins = []
    for extra in ([], ["--context", str(context)]):
        assert main([*command, *extra]) == 0
        margins.append(json.loads(capsys.readouterr().out)["margins"])
    assert margins[0][0] != margins[1][0]


def test_show_routing_brackets_et5_where_there_are_no_colours(composed, capsys):
    command = ["ask", "what is pulpitis?", "--model", str(composed), "--show-routing", "--max-new-tokens", "5"]
    assert main([*command, "--routing", "et5"]) == 0
    legend, answer, costs = capsys.readouterr().out.splitlines()
    assert "EMamba" in legend and "ET5" in legend
    assert answer.startswith("[") and answer.endswith("]")
    assert re.search(
        r"ET5 wrote (\d+) of \1 tokens \(100.0%\) in \d+ decoder passes, 0 caught up, 1 encoder call · \d+ ms", costs
    )


def test_demo_answers_five_questions(composed, capsys):
    assert main(["demo", "--model", str(composed)]) == 0
    said = capsys.readouterr().out
    assert said.count("ET5 wrote") == 6
    assert said.strip().splitlines()[-1].startswith("5 questions: ET5 wrote")


def test_demo_of_the_embedded_model(repo_root, capsys):
    if not (repo_root / "mambaformer" / "embedded" / "model.safetensors").exists():
        pytest.skip("the embedded model has not been trained yet")
    assert main(["demo"]) == 0
    assert "5 questions: " in capsys.readouterr().out


def test_compose_reports_the_vocabulary_and_saves_everything(et5_with_tokenizer, tmp_path, capsys):
    emamba = save_tiny_emamba(tmp_path / "emamba")
    tiny_tokenizer().save_pretrained(emamba)
    out = tmp_path / "out"
    command = ["compose", "--et5", str(et5_with_tokenizer), "--emamba", str(emamba), "--out", str(out)]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert f"all {VOCAB} tokens keep their rows" in said
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(out))
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_compose_with_another_tokenizer_for_emamba(et5_with_tokenizer, tmp_path, capsys):
    emamba, other = tmp_path / "emamba", tmp_path / "tokenizer"
    tiny_emamba(vocab=5).save_pretrained(emamba)
    backend = Tokenizer(models.Unigram([("<pad>", 0), ("</s>", 0), ("<unk>", -9), ("a", -1), ("b", -1)], unk_id=2))
    MambaFormerTokenizer(tokenizer_object=backend).save_pretrained(other)
    command = ["compose", "--et5", str(et5_with_tokenizer), "--emamba", str(emamba), "--out", str(tmp_path / "out")]
    assert main([*command, "--emamba-tokenizer", str(other)]) == 0
    assert f"Of {VOCAB} shared tokens 2 " in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mambaformer {__version__}\n"


def test_help_and_errors_of_the_command_line_load_no_library():
    code = (
        "import sys; from mambaformer.cli import build_parser, main\n"
        "build_parser().format_help(); code = main(['ask', ''])\n"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


# ---- rendering


def answer_of(tokens: list[str], experts: list[int]) -> Answer:
    return Answer("".join(tokens), tokens, experts, [0.0] * len(tokens), 0.0, 1, 5, 1, 12.0, "tiny")


def test_spans_join_neighbours_and_leave_the_end_out():
    answer = answer_of(["The", " pul", "p", " hurts", ".", ""], [0, 1, 1, 0, 0, 1])
    assert spans(answer) == [("The", False), (" pulp", True), (" hurts.", False)]
    assert bracketed(answer) == "The [pulp] hurts."
    assert cost([answer]) == "ET5 wrote 3 of 6 tokens (50.0%) in 1 decoder pass, 2 caught up, 1 encoder call · 12 ms"


def test_colours_with_and_without_rich(monkeypatch, capsys):
    answer = answer_of(["The", " pulp", " hurts."], [0, 1, 0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    show_routing(answer)
    with_rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show_routing(answer)
    without_rich = capsys.readouterr().out
    for said in (with_rich, without_rich):
        assert "\x1b[32mThe\x1b[0m\x1b[1;35m pulp\x1b[0m" in said
    monkeypatch.setenv("NO_COLOR", "1")
    show_routing(answer)
    assert capsys.readouterr().out.startswith("The [pulp] hurts.\n")


# ---- bad input


@pytest.mark.parametrize("question", ["", "  \n\t"])
def test_blank_question(refuse, question):
    assert "the question is blank" in refuse("ask", question)


def test_question_with_broken_bytes(refuse):
    assert "not valid UTF-8 at character 2" in refuse("ask", "a\udcff")


def test_context_that_is_missing_a_folder_or_not_utf8(refuse, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 pulp".encode("latin-1"))
    assert "No such file" in refuse("ask", "why?", "--context", tmp_path / "none.txt")
    assert "Is a directory" in refuse("ask", "why?", "--context", tmp_path)
    said = refuse("ask", "why?", "--context", tmp_path / "latin.txt")
    assert "not UTF-8 text (byte 4" in said and "save it as UTF-8" in said


@pytest.mark.parametrize(
    ("option", "value"), [("--budget", "1.5"), ("--budget", "nan"), ("--budget", "-1"), ("--max-new-tokens", "0")]
)
def test_numbers_out_of_range(refuse, option, value):
    said = refuse("ask", "why?", f"{option}={value}")
    assert f"{option} {value}" in said and "give" in said


def test_unknown_option_is_argparse_own_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ask", "why?", "--routing", "both"])
    assert stop.value.code == 2
    assert "invalid choice: 'both'" in capsys.readouterr().err


def test_too_long_question_and_context(refuse, composed, tmp_path):
    said = refuse("ask", "pulp " * 40, "--model", composed)
    assert re.search(r"too long: (\d+) tokens \(all of them the question's\), and the model reads at most 64", said)
    assert "shorten the question by" in said
    (tmp_path / "context.txt").write_text("tooth " * 40)
    said = refuse("ask", "why?", "--model", composed, "--context", tmp_path / "context.txt")
    assert "of them the question's" in said and "shorten the context by" in said


def test_model_that_does_not_exist(refuse, tmp_path):
    assert "'./nowhere' does not exist" in refuse("ask", "why?", "--model", "./nowhere")
    said = refuse("ask", "why?", "--model", "nobody/no-such-model")
    assert "'nobody/no-such-model'" in said and "spelling" in said and "HF_HUB_OFFLINE" in said
    assert "without config.json" in refuse("ask", "why?", "--model", tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in refuse("ask", "why?", "--model", tmp_path / "file")


def test_model_of_another_kind(refuse, et5_folder):
    said = refuse("ask", "why?", "--model", et5_folder)
    assert "'t5' checkpoint" in said and "mambaformer compose" in said


@pytest.mark.parametrize("keep", [0, 4, 1000, -8])
def test_truncated_weights(refuse, broken, keep):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    said = refuse("ask", "why?", "--model", broken)
    assert "damaged or cut short" in said and "model.safetensors" in said and "again" in said


def test_corrupted_header(refuse, broken):
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[9:40] = b"\xff" * 31
    weights.write_bytes(bytes(data))
    assert "damaged" in refuse("ask", "why?", "--model", broken)


def test_missing_and_misshapen_and_nan_weights(refuse, broken):
    path = broken / "model.safetensors"
    weights = load_file(path)
    name = "emamba.backbone.norm_f.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    misfit = f"1 of its weights are missing or have another shape than config.json says, '{name}'"
    assert misfit in refuse("ask", "why?", "--model", broken)
    save_file({**weights, name: torch.ones(3)}, path, {"format": "pt"})
    assert misfit in refuse("ask", "why?", "--model", broken)
    save_file({**weights, name: weights[name] * float("nan")}, path, {"format": "pt"})
    said = refuse("ask", "why?", "--model", broken)
    assert f"the weights in '{name}' are not finite" in said
    path.unlink()
    assert "cannot be read" in refuse("ask", "why?", "--model", broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("merger", "average"),
        ("expert_budget", 3),
        ("router_rank", 0),
        ("max_source_length", -1),
        ("routing", "t5"),
        ("et5", 5),
    ],
)
def test_config_with_impossible_values(refuse, broken, field, value):
    edit_json(broken / "config.json", **{field: value})
    said = refuse("ask", "why?", "--model", broken)
    assert field in said and str(value) in said


def test_config_that_is_no_json(refuse, broken):
    (broken / "config.json").write_text("{")
    assert "config.json" in refuse("ask", "why?", "--model", broken)


def test_mismatched_vocabularies(refuse, broken):
    config = json.loads((broken / "config.json").read_text())
    edit_json(broken / "config.json", emamba={**config["emamba"], "vocab_size": VOCAB + 1})
    assert "share one vocabulary" in refuse("ask", "why?", "--model", broken)


def test_tokenizer_that_is_not_the_models(refuse, broken):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["pulpitis"])
    tokenizer.save_pretrained(broken)
    said = refuse("ask", "why?", "--model", broken)
    assert f"({VOCAB + 1} tokens" in said and f"({VOCAB} rows" in said
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json" in refuse("ask", "why?", "--model", broken)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("MAMBAFORMER_DEBUG", "1")
    with pytest.raises(Exception, match="the question is blank"):
        main(["ask", ""])


def test_compose_refuses_an_occupied_folder_before_loading(refuse, tmp_path):
    (tmp_path / "file").touch()
    said = refuse("compose", "--et5", "no/et5", "--emamba", "no/emamba", "--out", tmp_path)
    assert "is not empty" in said and "new folder" in said
    said = refuse("compose", "--et5", "no/et5", "--emamba", "no/emamba", "--out", tmp_path / "file")
    assert "is a file" in said


def test_compose_with_unknown_or_swapped_experts(refuse, et5_with_tokenizer, emamba_folder, tmp_path):
    out = tmp_path / "out"
    said = refuse("compose", "--et5", "nobody/no-t5", "--emamba", emamba_folder, "--out", out)
    assert "--et5 'nobody/no-t5' is neither a folder" in said
    said = refuse("compose", "--et5", et5_with_tokenizer, "--emamba", "nobody/no-mamba", "--out", out)
    assert "--emamba 'nobody/no-mamba' is neither a folder" in said
    said = refuse("compose", "--et5", et5_with_tokenizer, "--emamba", et5_with_tokenizer, "--out", out)
    assert "model_type 't5'" in said
    assert not out.exists()


def test_compose_without_a_shared_tokenizer(refuse, et5_folder, emamba_folder, tmp_path):
    said = refuse("compose", "--et5", et5_folder, "--emamba", emamba_folder, "--out", tmp_path / "out")
    assert "tokenizer" in said and "--tokenizer" in said


def test_compose_with_a_mismatched_vocabulary(refuse, et5_with_tokenizer, tmp_path):
    tiny_emamba(vocab=VOCAB + 4).save_pretrained(tmp_path / "emamba")
    said = refuse("compose", "--et5", et5_with_tokenizer, "--emamba", tmp_path / "emamba", "--out", tmp_path / "out")
    assert f"{VOCAB + 4} vocabulary rows" in said and "emamba_tokenizer" in said


def test_compose_with_damaged_experts(refuse, et5_with_tokenizer, emamba_folder, tmp_path):
    emamba = shutil.copytree(emamba_folder, tmp_path / "emamba")
    weights = load_file(emamba / "model.safetensors")
    weights["backbone.norm_f.weight"][0] = float("inf")
    save_file(weights, emamba / "model.safetensors", {"format": "pt"})
    command = ["compose", "--et5", et5_with_tokenizer, "--emamba", emamba, "--out", tmp_path / "out"]
    assert "not finite" in refuse(*command)
    (emamba / "model.safetensors").write_bytes(b"\0" * 100)
    assert "damaged or cut short" in refuse(*command)
