# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Adapters and router on named bases: saved, small, loaded again to the same answers, refused on other bases."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_experts import save_tiny_et5, tiny_emamba, tiny_et5
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from mambaformer.cli import main
from mambaformer.modeling_mambaformer.adapter_checkpoint import (
    ADAPTED_FILE,
    ADAPTER_FOLDERS,
    is_adapter_checkpoint,
)
from mambaformer.modeling_mambaformer.modeling_mambaformer import MambaFormerForConditionalGeneration
from mambaformer.trainer.adapter_folder import save_adapters
from mambaformer.trainer.adapters import add_adapters, merge_adapters, prepare_stage
from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.trainer import MambaFormerTrainer

KIND = MambaFormerForConditionalGeneration


@pytest.fixture
def adapted(model, tmp_path):
    """The tiny model with adapters that say something, and an embedding of EMamba's that was trained."""
    args = MambaFormerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        report_to="none",
        et5_lora_targets=["q", "v", "wi"],
        lora_dropout=0.1,
    )
    add_adapters(model, args)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        model.emamba.get_input_embeddings().weight.mul_(1.05)
    model.config.router_threshold = 0.25
    return model.eval()


@pytest.fixture
def folder(adapted, tmp_path) -> Path:
    """The adapted model, saved as adapters with its tokenizer."""
    return save_adapters(adapted, tmp_path / "adapters", tiny_tokenizer())


@pytest.fixture
def bases(et5_folder, emamba_folder) -> dict[str, str]:
    """Where the bases lie."""
    return {"et5": str(et5_folder), "emamba": str(emamba_folder)}


def named(bases: dict[str, str]) -> dict[str, str]:
    """The same, as fields of the configuration."""
    return {f"{expert}_name_or_path": base for expert, base in bases.items()}


def assert_same(one, other, batch) -> None:
    """Both experts' logits, the margins, and the tokens of a routed answer agree."""
    labels = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        have, want = (
            model(**batch, labels=labels, routing="soft", output_experts=True, use_cache=False)
            for model in (one, other)
        )
    for name in ("logits", "et5_logits", "emamba_logits", "margin"):
        torch.testing.assert_close(have[name], want[name], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "expert_budget": 0.5}
    assert torch.equal(one.generate(**batch, **options), other.generate(**batch, **options))


def test_reloaded_adapters_answer_as_before(adapted, folder, bases, batch):
    plain = KIND.from_adapters_pretrained(folder, **bases)
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]
    assert not plain.training and all(parameter.requires_grad for parameter in plain.parameters())
    assert plain.config.router_threshold == 0.25
    assert plain.config.et5_name_or_path == adapted.config.et5_name_or_path
    assert_same(plain, adapted, batch)
    apart = KIND.from_adapters_pretrained(folder, **bases, merge=False)
    assert [name for name in apart.state_dict() if "lora" in name]
    assert_same(apart, adapted, batch)
    merge_adapters(adapted)
    assert_same(plain, adapted, batch)


def test_from_pretrained_and_auto_classes_know_the_form(adapted, folder, bases, batch, tmp_path):
    assert is_adapter_checkpoint(folder) and not is_adapter_checkpoint(bases["et5"])
    for kind in (KIND, AutoModel, AutoModelForSeq2SeqLM):
        loaded = kind.from_pretrained(folder, **named(bases))
        assert type(loaded) is KIND
        assert_same(loaded, adapted, batch)
    low = KIND.from_pretrained(folder, **named(bases), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "whole")
    assert_same(KIND.from_pretrained(tmp_path / "whole"), adapted, batch)
    assert AutoTokenizer.from_pretrained(folder)("teeth") == tiny_tokenizer()("teeth")


def test_the_folder_holds_no_base_weights(adapted, folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert files == {ADAPTED_FILE, *(f"{inside}/adapter_model.safetensors" for inside in ADAPTER_FOLDERS.values())}
    adapters = [tensor for name in files - {ADAPTED_FILE} for tensor in load_file(folder / name).values()]
    assert sum(map(torch.numel, adapters)) == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    held = load_file(folder / ADAPTED_FILE)
    experts = {name for name in held if name.startswith(("et5.", "emamba."))}
    assert experts == {"emamba.backbone.embeddings.weight"}  # the one that was trained; its head is tied to it
    samples = {name: len(held[name]) for name in held if name.startswith("base_sample.")}
    plain = [name for name, _ in adapted.named_parameters() if "lora_" not in name]
    assert samples["base_sample.et5"] == sum(name.startswith("et5.") for name in plain)
    assert (folder / "modeling_mambaformer.py").is_file() and (folder / "tokenizer.json").is_file()


def test_peft_reads_an_experts_adapter(adapted, folder, et5_folder, batch):
    base = T5ForConditionalGeneration.from_pretrained(et5_folder)
    there = PeftModel.from_pretrained(base, str(folder), subfolder=ADAPTER_FOLDERS["et5"]).eval()
    assert there.peft_config["default"].base_model_name_or_path == et5_folder.name
    start = torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        have, want = (part(**batch, decoder_input_ids=start).logits for part in (there, adapted.et5))
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_a_rebuilt_vocabulary_and_an_untied_head_come_back(et5_folder, tmp_path, batch):
    base = tmp_path / "other_vocabulary"
    tiny_emamba(vocab=70, tied=False).save_pretrained(base)
    tokens = tiny_tokenizer()
    own = tokens.backend_tokenizer.to_str()
    rows = json.loads(own)
    rows["model"]["vocab"] = rows["model"]["vocab"][:70]
    tiny = type(tokens)(tokenizer_object=Tokenizer.from_str(json.dumps(rows)))
    model = KIND.from_experts_pretrained(et5_folder, base, tokens, emamba_tokenizer=tiny)
    folder = save_adapters(model, tmp_path / "adapters")
    held = load_file(folder / ADAPTED_FILE)
    assert {name for name in held if name.startswith("emamba.")} == {
        "emamba.backbone.embeddings.weight",
        "emamba.lm_head.weight",
    }
    assert not (folder / ADAPTER_FOLDERS["et5"]).exists()  # no adapters: a router on two bases
    assert_same(KIND.from_adapters_pretrained(folder, et5_folder, base), model, batch)


@pytest.mark.parametrize("expert", ["et5", "emamba"])
def test_another_revision_of_a_base_is_refused(folder, bases, tmp_path, expert):
    other = tmp_path / "another"
    part = tiny_et5("v1.1") if expert == "et5" else tiny_emamba()
    with torch.no_grad():
        last = [parameter for name, parameter in sorted(part.named_parameters()) if parameter.ndim == 2][-1]
        last.mul_(1.001)
    part.save_pretrained(other)
    with pytest.raises(ValueError, match=f"'{other}' of {expert} is not the one.*1 of its .*{expert}_revision="):
        KIND.from_adapters_pretrained(folder, **{**bases, expert: other})


@pytest.mark.parametrize("merge", [True, False])
def test_a_base_of_other_shapes_or_kind_is_refused(folder, bases, tmp_path, merge):
    deep = tmp_path / "deep"
    tiny_et5("v1.1", decoder_layers=4).save_pretrained(deep)
    wide = save_tiny_et5(tmp_path / "wide", "v1.0")
    for base, named in ((deep, "not the one"), (wide, "not the one"), (bases["emamba"], "'mamba', not 't5'")):
        with pytest.raises(ValueError, match=named):
            KIND.from_adapters_pretrained(folder, base, bases["emamba"], merge=merge)
    with pytest.raises(OSError, match="'nobody/nothing' of emamba .* emamba_name_or_path="):
        KIND.from_adapters_pretrained(folder, bases["et5"], "nobody/nothing", merge=merge)


def test_options_that_need_whole_weights_are_refused(folder, bases):
    for option in ({"device_map": "auto"}, {"quantization_config": {"load_in_8bit": True}}):
        with pytest.raises(ValueError, match="mambaformer merge"):
            KIND.from_adapters_pretrained(folder, **bases, **option)
    assert KIND.from_adapters_pretrained(folder, **bases, device_map="cpu").device.type == "cpu"


def test_adapter_files_that_do_not_fit_are_refused(folder, bases):
    file = folder / ADAPTER_FOLDERS["et5"] / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors, the first"):
        KIND.from_adapters_pretrained(folder, **bases)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(OSError, match="damaged or cut short"):
        KIND.from_adapters_pretrained(folder, **bases)


def test_saving_on_another_base_is_refused(adapted, folder, et5_folder, tmp_path):
    other = tmp_path / "another"
    tiny_et5("v1.1", seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="weights of et5 are not those of its base"):
        save_adapters(adapted, tmp_path / "new", et5=other)
    merge_adapters(adapted)
    with pytest.raises(ValueError, match="save the merged model"):
        save_adapters(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    adapted.save_pretrained(tmp_path / "whole")
    assert not is_adapter_checkpoint(tmp_path / "whole")
    shutil.copy(folder / ADAPTED_FILE, tmp_path / "whole")
    assert not is_adapter_checkpoint(tmp_path / "whole")  # whole weights speak for themselves


def test_without_peft_the_remedy_is_named(folder, bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft, or .* `mambaformer merge`"):
        KIND.from_pretrained(folder, **named(bases))


def test_the_router_is_trained_without_the_adapters_dropout(adapted, tmp_path):
    args = MambaFormerTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", stage="distil", lora_dropout=0.1
    )
    dropouts = [m for m in adapted.modules() if isinstance(m, torch.nn.Dropout) and m.p == args.lora_dropout]
    prepare_stage(adapted, args)
    assert dropouts and not any(dropout.p for dropout in dropouts)
    args.stage = "joint"
    prepare_stage(adapted, args)
    assert all(dropout.p == args.lora_dropout for dropout in dropouts)


def test_the_trainer_saves_them_too(adapted, bases, batch, tmp_path):
    args = MambaFormerTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer = MambaFormerTrainer(model=adapted, args=args, processing_class=tiny_tokenizer())
    trainer.save_adapters(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert_same(KIND.from_pretrained(tmp_path / "saved", **named(bases)), adapted.eval(), batch)


def test_merge_on_the_command_line(adapted, folder, bases, batch, tmp_path, capsys):
    out = tmp_path / "whole"
    both = [word for expert, base in bases.items() for word in (f"--{expert}", base)]
    assert main(["merge", str(folder), str(out), *both]) == 0
    assert "written to" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    assert_same(KIND.from_pretrained(out), adapted, batch)
    for words, said in (
        ([str(folder), str(out), *both], "not empty"),
        ([str(out), str(tmp_path / "new"), *both], "holds no adapters"),
        ([str(folder), str(tmp_path / "new"), "--et5", bases["et5"], "--emamba", bases["et5"]], "--emamba"),
    ):
        assert main(["merge", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
