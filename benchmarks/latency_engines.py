# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
CTranslate2's T5 and llama.cpp's Mamba, on the random weights of the latency benchmark.

Their files are written straight from the modules, in a process that ends before the engine is loaded: no tokenizer is
needed, tokens are named by their numbers. PyTorch is imported for the writing only.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .latency_contestants import source_ids, vocabulary


class CTranslate2T5:
    """CTranslate2 on a T5, int8 weights. Args: `size`, one of `SIZES`."""

    def __init__(self, setup: dict[str, Any], size: str):
        self.setup, self.size = setup, size
        self.vocab = vocabulary(setup["sizes"])

    def prepare(self) -> None:
        """Convert a random T5, as the engine's own converter does once it has a tokenizer."""
        from ctranslate2.converters.transformers import T5Loader

        from .latency_peers import random_t5

        spec = T5Loader().get_model_spec(random_t5(self.setup["sizes"], self.size))
        tokens = [str(token) for token in range(self.vocab)]
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
        spec.config.bos_token = spec.config.decoder_start_token = "0"
        spec.config.eos_token, spec.config.unk_token = "1", "2"
        spec.validate()
        spec.optimize(quantization="int8")
        Path(self.setup["folder"]).mkdir(exist_ok=True)
        spec.save(self.setup["folder"])

    def load(self) -> dict[str, Any]:
        """Read the converted model."""
        import ctranslate2

        device, _, index = self.setup["device"].partition(":")
        self.translator = ctranslate2.Translator(
            self.setup["folder"],
            device=device,
            device_index=int(index or 0),
            compute_type="int8",
            inter_threads=1,
            intra_threads=self.setup["threads"],
        )
        return {"weight_bytes": (Path(self.setup["folder"]) / "model.bin").stat().st_size}

    def answer(self, length: int, new_tokens: int, turn: int, batch: int = 1) -> dict[str, Any]:
        """One greedy answer, timed; the whole source is read and the answer does not end early."""
        source = [[str(token) for token in row] for row in source_ids(length, self.vocab, batch)]
        times: list[float] = []

        def note(_: object) -> bool:
            times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        results = self.translator.translate_batch(
            source,
            beam_size=1,
            max_input_length=0,
            min_decoding_length=new_tokens,
            max_decoding_length=new_tokens,
            callback=note,
        )
        end = time.perf_counter()
        tokens = min(len(result.hypotheses[0]) for result in results)
        return {"seconds": end - start, "first": times[0] - start, "decode": times[-1] - times[0], "tokens": tokens}


class LlamaCpp:
    """llama.cpp on a Mamba, by the `xllamacpp` wheel. Args: `weights`, `q8_0` or `q4_0`, of all large matrices."""

    def __init__(self, setup: dict[str, Any], weights: str):
        self.setup, self.weights = setup, weights
        self.vocab = vocabulary(setup["sizes"])
        self.path = Path(setup["folder"]) / f"mamba-{weights}.gguf"

    def prepare(self) -> None:
        """Write the file, with the names and the roundings that llama.cpp's own converter gives."""
        from .latency_peers import random_mamba

        self.path.parent.mkdir(exist_ok=True)
        write_gguf(self.path, random_mamba(self.setup["sizes"]), self.weights)

    def load(self) -> dict[str, Any]:
        """
        Start the engine on the file, without what serves many users and would only cost time here.

        Raises:
            RuntimeError: where a device was asked for that this build of the engine does not know.
        """
        import xllamacpp

        kinds = {str(device["type"]) for device in xllamacpp.get_device_info()}
        if self.setup["device"] != "cpu" and all(kind.endswith("TYPE_CPU") for kind in kinds):
            raise RuntimeError("this build of xllamacpp knows the CPU only: install its CUDA wheel")
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx = self.setup["longest"] + 256
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.setup["threads"]
        params.n_gpu_layers = 0 if self.setup["device"] == "cpu" else 999
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.n_ctx_checkpoints = 0
        params.warmup = True
        self.server = xllamacpp.Server(params)
        return {"weight_bytes": self.path.stat().st_size}

    def answer(self, length: int, new_tokens: int, turn: int, batch: int = 1) -> dict[str, Any]:
        """
        One greedy answer, timed; the parts are those that the engine reports.

        Raises:
            RuntimeError: where it answers with an error.
        """
        request = {
            "prompt": source_ids(length, self.vocab)[0],
            "n_predict": new_tokens,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0,
            "cache_prompt": False,
            "stream": False,
        }
        start = time.perf_counter()
        reply = self.server.handle_completions(request)
        seconds = time.perf_counter() - start
        reply = json.loads(reply) if isinstance(reply, str) else reply
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp answered {json.dumps(reply)[:200]}")
        timings = reply["timings"]
        if timings["prompt_n"] != length:
            raise RuntimeError(f"llama.cpp read {timings['prompt_n']} tokens of a source of {length}")
        figures = {"seconds": seconds, "first": timings["prompt_ms"] / 1000, "decode": timings["predicted_ms"] / 1000}
        return {**figures, "tokens": timings["predicted_n"]}


def write_gguf(path: Path, model: Any, weights: str) -> None:
    """
    Write a Mamba of transformers as a GGUF file.

    Args:
        model (`MambaForCausalLM`): in float32, with a head tied to its embeddings.
        weights: `q8_0` or `q4_0`, of the embeddings and all projections but that of the step sizes, which is float16.
    """
    import gguf
    import numpy as np

    config, kind = model.config, gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights.upper()}"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, value: Any, form: Any = None) -> None:
        value = np.ascontiguousarray(value.detach().numpy())
        if form is None:
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, form), raw_dtype=form)

    add("token_embd.weight", model.backbone.embeddings.weight, kind)
    add("output_norm.weight", model.backbone.norm_f.weight)
    for at, block in enumerate(model.backbone.layers):
        mixer, prefix = block.mixer, f"blk.{at}"
        add(f"{prefix}.attn_norm.weight", block.norm.weight)
        add(f"{prefix}.ssm_in.weight", mixer.in_proj.weight, kind)
        add(f"{prefix}.ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1))
        add(f"{prefix}.ssm_conv1d.bias", mixer.conv1d.bias)
        add(f"{prefix}.ssm_x.weight", mixer.x_proj.weight, kind)
        add(f"{prefix}.ssm_dt.weight", mixer.dt_proj.weight, gguf.GGMLQuantizationType.F16)
        add(f"{prefix}.ssm_dt.bias", mixer.dt_proj.bias)
        add(f"{prefix}.ssm_a", -mixer.A_log.exp())
        add(f"{prefix}.ssm_d", mixer.D)
        add(f"{prefix}.ssm_out.weight", mixer.out_proj.weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
