# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
At the true sizes of flan-t5-base and mamba-130m, with their real tokenizers: compose, save, reload, generate, train.

The weights are random, all else is as it will be. Each step runs in a process of its own, whose peak of resident
memory above what its imports took must stay within 1.3 times the weights; in training 2 times, with the optimizer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer

pytestmark = pytest.mark.slow
MOST, MOST_IN_TRAINING = 1.3, 2.0

MEASURED = """
import json, re, sys
import torch
from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from mambaformer.tokenizer.tokenization_mambaformer import MambaFormerTokenizer
def peak():  # VmHWM is this process's own; ru_maxrss would start at that of the process it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
start = peak()
def report(**values):
    print(json.dumps(dict(values, bytes=peak() - start)))
"""

COMPOSE = """
from mambaformer.cli import main
et5, emamba, out = sys.argv[1:]
code = main(["compose", "--et5", et5, "--emamba", emamba, "--out", out])
report(code=code or 0)
"""

RELOAD = """
folder, = sys.argv[1:]
tokenizer = MambaFormerTokenizer.from_pretrained(folder)
model = MambaFormerForConditionalGeneration.from_pretrained(folder)
batch = tokenizer("What is pulpitis, and how is it treated?", return_tensors="pt")
experts = {}
for routing in ("et5", "emamba", "auto"):
    options = dict(routing=routing, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True)
    output = model.generate(**batch, **options)
    experts[routing] = output.route_trace.expert[0].tolist()
report(
    weights=sum(p.numel() * p.element_size() for p in model.parameters()),
    vocabulary=model.config.vocab_size,
    experts=experts,
    text=tokenizer.decode(output.sequences[0]),
    dtype=str(model.dtype),
)
"""

TRAIN = """
from datasets import Dataset
from transformers import HfArgumentParser, TrainerCallback
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.data import tokenize_qa
from mambaformer.trainer.run_arguments import RunArguments
from mambaformer.trainer.run_parsing import parse
from mambaformer.trainer.trainer import MambaFormerTrainer
from mambaformer.trainer.training_run import load_model
config, et5, emamba, out = sys.argv[1:]
here = ["--stages", "joint", "--et5", et5, "--emamba", emamba, "--output_dir", out, "--bf16", "false"]
here += ["--use_cpu", "true", "--report_to", "none", "--dataloader_num_workers", "0", "--per_device_train_batch_size"]
here += ["1", "--gradient_accumulation_steps", "1", "--max_source_length", "32", "--max_target_length", "12"]
here += ["--max_steps", "3", "--warmup_steps", "0", "--logging_steps", "1", "--save_strategy", "no"]
arguments, stages = parse([config, *here], HfArgumentParser([RunArguments, MambaFormerTrainingArguments]))
model, tokenizer = load_model(arguments)
model.config.router_threshold = 0.0
rows = [{"question": f"What is treated by {n}?", "context": "", "answer": f"A deep cavity near {n}."} for n in "abc"]

class Gradients(TrainerCallback):
    steps = []
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                kind = "missing" if gradient is None else "zero" if not gradient.any() else "moving"
                kind = kind if gradient is None or gradient.isfinite().all() else "not finite"
                found[name] = kind
        self.steps.append(found)

trainer = MambaFormerTrainer(
    model=model, args=stages["joint"], train_dataset=tokenize_qa(Dataset.from_list(rows), tokenizer, 32, 12),
    processing_class=tokenizer, callbacks=[Gradients()],
)
trainer.train()
report(
    weights=sum(p.numel() * p.element_size() for p in model.parameters()),
    trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    mixers=sorted({type(layer.mixer).__name__ for layer in model.emamba.backbone.layers}),
    checkpointing=model.is_gradient_checkpointing,
    losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    gradients=Gradients.steps,
)
"""


def run(script: str, *arguments: Path) -> tuple[dict, str]:
    """Run a script in a new process; its report, and what else it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *printed, last = done.stdout.strip().splitlines()
    return json.loads(last), "\n".join(printed)


def save_with_tokenizer(model, folder: Path, tokenizer: Path) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def experts(shared_data, tmp_path_factory):
    """Random checkpoints at the true sizes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    if not (shared_data / "t5_tokenizer").is_dir() or not (shared_data / "gptneox_tokenizer").is_dir():
        pytest.skip("the real tokenizers are absent from the shared data")
    folder = tmp_path_factory.mktemp("true_sizes")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    et5 = T5ForConditionalGeneration(config)
    et5.lm_head.weight = torch.nn.Parameter(torch.randn(32128, 768) / 28)
    save_with_tokenizer(et5, folder / "flan-t5-base", shared_data / "t5_tokenizer")
    del et5
    config = MambaConfig(
        vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16, eos_token_id=0, pad_token_id=0
    )
    save_with_tokenizer(MambaForCausalLM(config), folder / "mamba-130m-hf", shared_data / "gptneox_tokenizer")
    yield folder
    shutil.rmtree(folder)


def test_compose_save_reload_generate(experts, shared_data, capsys):
    out = experts / "mambaformer"
    composed, printed = run(COMPOSE, experts / "flan-t5-base", experts / "mamba-130m-hf", out)
    assert composed["code"] == 0
    assert "shared tokens" in printed and "exact counterpart" in printed
    reloaded, _ = run(RELOAD, out)
    weights = reloaded["weights"]
    with capsys.disabled():
        print(f"\n{printed}\nweights {weights / 1e6:.0f} MB")
        for name, values in (("compose and save", composed), ("reload and generate", reloaded)):
            print(f"{name}: peak {values['bytes'] / 1e6:.0f} MB, {values['bytes'] / weights:.2f} x the weights")
    assert 1.3e9 < weights < 1.6e9
    assert reloaded["vocabulary"] == 32128 and reloaded["dtype"] == "torch.float32"
    assert reloaded["experts"]["et5"] == [1] * 8 and reloaded["experts"]["emamba"] == [0] * 8
    assert len(reloaded["experts"]["auto"]) == 8
    vocabulary = AutoTokenizer.from_pretrained(shared_data / "t5_tokenizer").get_vocab()
    assert MambaFormerTokenizer.from_pretrained(out).get_vocab() == vocabulary
    assert composed["bytes"] <= MOST * weights
    assert reloaded["bytes"] <= MOST * weights


def test_three_steps_of_everything_at_once(experts, repo_root, capsys):
    """The joint stage of the shipped recipe, batches of one row: all adapters, rebuilt embeddings, router and gate."""
    recipe = repo_root / "trainer" / "configs" / "flan_t5_base_mamba_130m.yaml"
    trained, _ = run(TRAIN, recipe, experts / "flan-t5-base", experts / "mamba-130m-hf", experts / "run")
    weights = trained["weights"]
    with capsys.disabled():
        print(f"\nlosses {trained['losses']}; {trained['trained'] / 1e6:.1f} million weights trained")
        print(f"train: peak {trained['bytes'] / 1e6:.0f} MB, {trained['bytes'] / weights:.2f} x the weights")
    assert trained["mixers"] == ["SelectiveScanMixer"] and trained["checkpointing"]
    assert len(trained["losses"]) == 3 and all(abs(loss) < 1e4 for loss in trained["losses"])  # false for NaN
    first, *later = trained["gradients"]
    adapters = [name for name in first if "lora_" in name]
    assert len(adapters) == 2 * (12 * 2 + 12 * 4 + 24 * 2)  # A and B of q and v, in_proj and x_proj
    assert {name.split(".")[0] for name in first} == {"et5", "emamba", "router", "gate"}
    # B starts at zero, so A has no gradient in the first step; from the second on, B has moved.
    assert {kind for name, kind in first.items() if "lora_A" in name} == {"zero"}
    assert {kind for name, kind in first.items() if "lora_B" in name} == {"moving"}
    for step in later:
        assert not {name: kind for name, kind in step.items() if kind != "moving"}
    assert trained["bytes"] <= MOST_IN_TRAINING * weights
