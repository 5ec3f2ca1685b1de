# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Loads a saved MambaFormer as a stranger would: a program of its own, in an environment without this package.

    python remote_code_probe.py SOURCE AGAIN QUESTION…

loads SOURCE (a folder or a Hub id) by each Auto class and by `pipeline`, saves it again into AGAIN before any pipeline
was loaded, loads that, and prints one JSON object with what came out. `bare_environment` makes the environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

NEEDED = ("torch", "transformers", "tokenizers")
HIDDEN = ("mambaformer", "peft", "accelerate", "datasets")


def bare_environment(folder: Path) -> Path:
    """
    Make `folder` an import path that holds torch, transformers, tokenizers, what these require, and nothing else.

    It consists of links to what is installed here.
    """
    folder.mkdir()
    waiting, seen = list(NEEDED), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # required on other platforms
            continue
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link, target = folder / top, Path(distribution.locate_file(top))
            if target.exists() and not link.exists() and top.split("-")[0] not in HIDDEN:
                link.symlink_to(target)
        required = [line for line in distribution.requires or () if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in required]
    return folder


def run_probe(bare: Path, work: Path, source: str, questions: list[str], **environment: str) -> dict:
    """Run this file in the environment `bare`, from the new folder `work`, and return what it printed."""
    said = run_bare(bare, work, Path(__file__), source, str(work / "again"), *questions, **environment)
    return json.loads(said.splitlines()[-1])


def run_bare(bare: Path, work: Path, program: Path, *arguments: str, **environment: str) -> str:
    """Run a copy of `program` in the environment `bare`, from the new folder `work`, and return its output."""
    work.mkdir()
    probe = work / "probe.py"
    probe.write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    settings = {
        "PYTHONPATH": str(bare),
        "HF_HOME": str(work / "home"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-s", str(probe), *arguments],
        env=kept | settings | environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def facts(source: str, questions: list[str]) -> dict:
    """What the model and the tokenizer of `source` answer, each loaded by its Auto class."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    batch = tokenizer([f"question: {question}" for question in questions], padding=True, return_tensors="pt")
    found = {"config": type(config).__module__, "tokenizer": type(tokenizer).__module__}
    for auto in (AutoModel, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(source, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(**batch, labels=batch["input_ids"], routing="auto", expert_budget=0.5).logits
        tokens = model.generate(**batch, max_new_tokens=12, expert_budget=0.5)
        found[auto.__name__] = {
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "logits": logits[:, :, ::7].tolist(),
            "tokens": tokens.tolist(),
        }
    return {**found, "model_object": model, "tokenizer_object": tokenizer}


def pipeline_answers(source: str, questions: list[str]) -> dict:
    """What `pipeline` answers, with the task named and with the task taken from the configuration."""
    from transformers import pipeline

    ask = pipeline("text2text-generation", model=source, trust_remote_code=True)
    options = {"max_new_tokens": 12, "expert_budget": 0.5, "return_route": True}
    return {
        "class": f"{type(ask).__module__}.{type(ask).__name__}",
        "answers": ask(questions, batch_size=2, **options),
        "unnamed": type(pipeline(model=source, trust_remote_code=True)).__name__,
    }


def main(source: str, again: str, questions: list[str]) -> None:
    """Print the facts as one line of JSON."""
    hidden = {name: importlib.util.find_spec(name) is None for name in HIDDEN}
    found = facts(source, questions)
    model, tokenizer = found.pop("model_object"), found.pop("tokenizer_object")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    reloaded = facts(again, questions)
    del reloaded["model_object"], reloaded["tokenizer_object"]
    found |= {"hidden": hidden, "pipeline": pipeline_answers(source, questions), "again": reloaded}
    found["again_pipeline"] = pipeline_answers(again, questions)
    found["again_files"] = sorted(path.name for path in Path(again).iterdir())
    found["path"] = [entry for entry in sys.path if entry.startswith(sysconfig.get_paths()["purelib"])]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
