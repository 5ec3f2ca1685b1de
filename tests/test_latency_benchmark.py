# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The latency benchmark at tiny sizes: the whole command, its schedule, its sums, and its processes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from mambaformer.benchmarks import latency, latency_process, machine, report
from mambaformer.benchmarks.latency_contestants import (
    BURST,
    CONTESTANTS,
    ENGINES,
    MIXTURE,
    OPEN,
    SHARE,
    SIZES,
    routed_positions,
    source_ids,
)
from mambaformer.benchmarks.latency_ours import OurMambaFormer
from mambaformer.benchmarks.latency_peers import TransformersT5
from mambaformer.benchmarks.latency_pool import Pool
from mambaformer.benchmarks.latency_process import EngineError, EngineProcess
from mambaformer.benchmarks.latency_summary import TARGETS, least_times, summarise, target_rows

SETUP = {"sizes": "tiny", "threads": 1, "device": "cpu", "longest": 64}
TIMES = {"seconds", "first", "decode", "tokens"}
LENGTHS, NEW = [6, 20], 20
QUICK = ["--turn-seconds", "0"]


# ---- which tokens ET5 writes


@pytest.mark.parametrize("share", [SHARE, SHARE / OPEN, 1.0])
@pytest.mark.parametrize("burst", [1, BURST])
def test_over_the_turns_the_share_is_the_one_asked_for(share, burst):
    turns = 25
    positions = [routed_positions(64, share, burst, turn) for turn in range(turns)]
    assert all(one == sorted(set(one)) and all(0 <= at < 64 for at in one) for one in positions)
    counts = [len(one) for one in positions]
    assert abs(sum(counts) - share * 64 * turns) < 1 and max(counts) - min(counts) <= 1
    assert len({tuple(one) for one in positions}) > turns / 2 or share == 1


def test_bursts_are_runs_and_independent_tokens_are_not():
    def runs(burst: int) -> float:
        lists = [routed_positions(64, 0.15, burst, turn) for turn in range(40)]
        return sum(at - 1 not in one for one in lists for at in one) / 40

    assert runs(BURST) < 1.3 and runs(1) > 7


def test_sources_are_the_same_for_all_and_differ_by_length():
    assert source_ids(9, 100) == source_ids(9, 100) and len(source_ids(9, 100)[0]) == 9
    assert source_ids(9, 100)[0][-1] == 1 and len({tuple(row) for row in source_ids(9, 100, 3)}) == 3


# ---- engines, in this process


@pytest.fixture(scope="module")
def mambaformer(tmp_path_factory):
    engine = OurMambaFormer(
        {**SETUP, "folder": str(tmp_path_factory.mktemp("engine"))}, "int8", "float32", "flan-t5-base"
    )
    engine.prepare()
    told = engine.load()
    assert told["weight_bytes"] > 0 and told["encoder_products"] > 0
    return engine


@pytest.mark.parametrize("scenario", ["quarter", "bursts", "independent"])
def test_et5_writes_what_the_schedule_says_and_the_trace_counts_it(mambaformer, scenario):
    passes, parts = [], ((0, mambaformer.model.et5.encoder), (1, mambaformer.model.et5.decoder))
    hooks = [part.register_forward_hook(lambda *_, count=count: passes.append(count)) for count, part in parts]
    options = CONTESTANTS[scenario].scenario
    positions = routed_positions(64, options.get("share", SHARE), options["burst"], 3)
    answer = mambaformer.answer(20, 64, turn=3, **options)
    for hook in hooks:
        hook.remove()
    assert answer["tokens"] == 64 and answer["et5_share"] == pytest.approx(len(positions) / 64)
    assert answer["et5_passes"] == len(positions) == passes.count(1)
    assert answer["encoder_calls"] == 1 == passes.count(0)
    assert answer["et5_tokens"] == positions[-1] + 1  # everything up to the last of them, once
    assert 0 < answer["encoder_seconds"] < answer["seconds"] and 0 < answer["pass_seconds"] < answer["seconds"]


def test_a_closed_gate_asks_nothing_of_et5(mambaformer):
    answer = mambaformer.answer(20, 64, turn=0, **CONTESTANTS["closed"].scenario)
    assert answer["tokens"] == 64 and answer["et5_share"] == 0
    assert answer["et5_passes"] == answer["encoder_calls"] == answer["encoder_seconds"] == 0


def test_one_row_of_a_batch_asks_et5_as_if_it_were_alone(mambaformer):
    alone = mambaformer.answer(8, 64, turn=1, burst=BURST)
    one = mambaformer.answer(8, 64, turn=1, burst=BURST, batch=4, open_rows=1)
    every = mambaformer.answer(8, 64, turn=1, burst=BURST, batch=4)
    for name in ("et5_passes", "et5_tokens", "encoder_calls"):
        assert one[name] == alone[name] and every[name] == 4 * alone[name]


def test_a_route_that_is_not_the_schedule_is_an_error(mambaformer, monkeypatch):
    monkeypatch.setattr("mambaformer.benchmarks.latency_ours.NEVER", float("-inf"))
    with pytest.raises(RuntimeError, match="were asked of it"):
        mambaformer.answer(8, 16, turn=0, burst=1)


def test_gate_and_router_are_really_computed(mambaformer, monkeypatch):
    model, gates, outputs = mambaformer.model, [], []

    def generate(*given, **options):
        outputs.append(type(model).generate(model, *given, **options))
        return outputs[-1]

    hook = model.gate.register_forward_hook(lambda _, __, logit: gates.append(logit))
    monkeypatch.setattr(model, "generate", generate)
    mambaformer.answer(8, 16, turn=0, burst=1)
    hook.remove()
    margin = outputs[0].route_trace.margin
    assert len(gates) == 1 and margin.shape == (1, 16) and bool(margin.isfinite().all())
    assert len(margin.unique()) > 8


def test_t5_writes_all_tokens_though_it_would_end(tmp_path):
    engine = TransformersT5({**SETUP, "folder": str(tmp_path)}, "t5-base")
    engine.prepare()
    engine.load()
    head = torch.nn.Linear(engine.model.config.d_model, engine.model.config.vocab_size)
    with torch.no_grad():
        head.bias[1] = 100.0  # the end token is the likeliest everywhere
    engine.model.lm_head = head
    answer = engine.answer(12, 64, turn=0)
    assert answer["tokens"] == 64
    assert answer["first"] > 0 and answer["first"] + answer["decode"] <= answer["seconds"]


# ---- the command


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in this process; returns its result, its Markdown and its folder."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads()

    def run_command(*options: str):
        latency.main(["--sizes", "tiny", "--in-process", "--threads", "1", "--new-tokens", str(NEW), *QUICK, *options])
        folder = tmp_path / "results"
        return json.loads((folder / "latency.json").read_text()), (folder / "latency.md").read_text(), folder

    yield run_command
    torch.set_num_threads(threads)


def test_the_command_measures_and_writes_everything(run, monkeypatch):
    monkeypatch.setitem(ENGINES, "llama-q8_0", replace(ENGINES["llama-q8_0"], packages=("no_such_engine",)))
    monkeypatch.setattr(latency, "BATCH_LENGTH", 6)
    names = ["t5-large", "mamba", "llama-q8_0", "emamba-float32", "emamba-int8", "closed", "quarter", "bursts"]
    options = ["--lengths", *map(str, LENGTHS), "--scaling-lengths", "8", "40", "--batches", "1", "3"]
    result, text, folder = run(*options, "--rounds", "2", "--warm-up", "1", "--contestants", *names)

    present = [name for name in names if name != "llama-q8_0"]
    for name in present:
        for length in map(str, LENGTHS):
            answers = result["answers"][name][length]
            assert len(answers) == 2 and all(answer.keys() >= TIMES for answer in answers)
            assert all(answer["tokens"] == NEW and 0 < answer["first"] < answer["seconds"] for answer in answers)
            assert result["summary"][name][length]["rounds"] == 2
    assert result["answers"]["llama-q8_0"] == {}
    (failure,) = result["failures"]["rows"]
    assert failure[0] == "llama-q8_0" and "no_such_engine not installed" in failure[1] and failure[1] in text

    shares = {name: [a["et5_share"] for n in map(str, LENGTHS) for a in result["answers"][name][n]] for name in present
              if name in ("closed", "quarter", "bursts")}  # fmt: skip
    assert set(shares["closed"]) == {0.0}
    assert abs(sum(shares["quarter"]) / 4 - SHARE / OPEN) < 1 / NEW
    assert abs(sum(shares["bursts"]) / 4 - SHARE) < 1 / NEW

    summary = result["summary"]
    for length in map(str, LENGTHS):
        mixed = 0.75 * summary["closed"][length]["seconds"] + 0.25 * summary["quarter"][length]["seconds"]
        assert summary[MIXTURE][length]["seconds"] == pytest.approx(mixed)
        assert result["ratios"][MIXTURE]["t5-large"][length] == pytest.approx(
            summary["t5-large"][length]["seconds"] / mixed
        )
    assert len(result["speeds"]) == 3 and all(min(speed.values()) > 0 for speed in result["speeds"])
    assert {(case["name"], case["batch"], case.get("open_rows")) for case in result["throughput_answers"]} == {
        *((name, batch, None) for name in ("emamba-float32", "emamba-int8", "closed", "bursts") for batch in (1, 3)),
        ("bursts", 3, 1),
    }
    scaled = {(case["name"], case["length"]): case["answers"] for case in result["scaling_answers"]}
    assert len(scaled) == 4 and len({a["state_bytes"] for answers in scaled.values() for a in answers}) == 1
    for part in ("targets", "parts", "et5", "throughput", "scaling"):
        assert result[part]["rows"] and all(len(row) == len(result[part]["columns"]) for row in result[part]["rows"])
        assert report.render(f"latency-{part}").startswith("| ")
    assert report.render("latency").startswith("| Answers by |")
    assert result["engines"]["mambaformer"]["step_bytes"] is None or "x limit" in text
    assert str(folder.parent) not in (folder / "latency.json").read_text() and "--in-process" in result["command"]
    if find_spec("matplotlib") is not None:
        assert (folder / "latency_time.png").stat().st_size > 5000
        assert (folder / "latency_ratios.png").stat().st_size > 5000


def test_a_spent_budget_starts_no_further_round_and_says_so(run):
    given = ["--lengths", "4", "--scaling-lengths", "--batches", "--contestants", "emamba-float32"]
    result, text, _ = run(*given, "--rounds", "5", "--warm-up", "0", "--budget-minutes", "0")
    assert result["rounds"] == 1 and len(result["answers"]["emamba-float32"]["4"]) == 1
    assert result["stopped"].startswith("Stopped after 1 of 5 rounds") and result["stopped"] in text


class Answering:
    """A pool whose answers take these seconds of a clock that nobody else moves, and these bytes."""

    broken: dict[str, str] = {}

    def __init__(self, clock: list[float], seconds: list[float]):
        self.clock, self.left = clock, list(seconds)

    def ask(self, engine: str, length: int, new_tokens: int, **request):
        seconds = self.left.pop(0)
        self.clock[0] += seconds
        return {"seconds": seconds, "tokens": new_tokens, "peak_bytes": int(100 * seconds)}


@pytest.mark.parametrize(
    ("seconds", "told", "peak", "left"),
    [
        ([1.2, 0.5, 0.2, 0.4, 9.0], 0.4, 120, 1),  # the first is left out, and the turn ends after 2 s
        ([5.0, 0.1], 5.0, 500, 1),  # a long answer is a turn of its own
        ([1.0, 1.0, 9.0], 1.0, 100, 1),
    ],
)
def test_a_turn_counts_as_its_median_answer(monkeypatch, seconds, told, peak, left):
    clock = [0.0]
    monkeypatch.setattr(latency.time, "monotonic", lambda: clock[0])
    pool = Answering(clock, seconds)
    given = latency.parse(["--contestants", "t5-base", "--turn-seconds", "2"])
    figures = latency.Run(given, pool).time_turn("t5-base", 64, turn=0)
    assert (figures["seconds"], figures["peak_bytes"], len(pool.left)) == (told, peak, left)


def test_a_device_that_is_not_there_is_named(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        latency.parse(["--device", "cuda"])
    assert "'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ctranslate2-t5-base", "llama-q8_0", "llama-q4_0"])
def test_other_engines_write_all_tokens(name, tmp_path):
    for package in ENGINES[name].packages:
        pytest.importorskip(package)
    pool = Pool(SETUP, tmp_path, 60, processes=False)
    pool.prepare(name)
    for turn in range(2):
        answer = pool.ask(name, 40, new_tokens=16, turn=turn)
        assert answer["tokens"] == 16 and answer["first"] + answer["decode"] <= answer["seconds"] * 1.01
    assert pool.loaded[name]["weight_bytes"] > 0
    pool.close()


# ---- sums


def answers_of(**seconds: float):
    parts = {"first": 0.25, "decode": 0.5, "peak_bytes": 100}
    return {name: {64: [{"seconds": value, **parts}]} for name, value in seconds.items()}


def test_targets_are_compared_by_ratio():
    answers = {"t5-large": {64: []}, **answers_of(closed=1.0, quarter=5.0)}
    answers["t5-large"][64] = [{"seconds": s, "first": 1, "decode": 1, "peak_bytes": 500} for s in (47.0, 49.0, 99.0)]
    summary = summarise(answers, {"mambaformer": {"peak_bytes": 120}})
    assert summary[MIXTURE][64] == {"seconds": 2.0, "first": 0.25, "decode": 0.5, "peak_bytes": 120, "rounds": 1}
    rows = target_rows(summary, [64], 64, {}, {"bytes_per_second": 1, "gemm_flops": 1})
    whole = {(row[1], row[3]): row[4:] for row in rows if row[0].startswith("MambaFormer int8, gate open for")}
    memory = whole["T5-Large, transformers, float32", 64]  # the last of that key
    assert memory == [4, "4.17", "yes", "–", "–", "–"]
    first = rows[0]
    assert first[4:] == [24.4, "24.50", "yes", "–", "–", "–"]
    asked = [target for target in TARGETS if {target.ours, target.peer} <= {MIXTURE, "closed", "t5-large"}]
    assert len(rows) == sum(64 in (target.lengths or [64]) for target in asked) == 3  # nobody asked for the others
    engine = {"step_bytes": 1, "source_products": 64, "encoder_products": 0, "encoder_pair_products": 0}
    speeds = {"bytes_per_second": 1e9, "gemm_flops": 1, "int8_ops": 8192, "exact_int8_ops": 4096}
    limited = target_rows(summary, [64], 64, {"mambaformer": {**engine, "pass_bytes": 0, "rounded": True}}, speeds)
    assert limited[0][8:] == ["49.0", "24.5"]  # 64 tokens of 2 x 64 operations are a second's, or half of one's
    failed = target_rows({**summary, "t5-large": {}}, [64], 64, {}, {"bytes_per_second": 1, "gemm_flops": 1})
    assert [row[5] for row in failed] == ["not measured"] * 3


def test_decoding_is_set_beside_reading_right_before_it():
    turns = [{"seconds": 1.0, "first": 0.4, "decode": 0.6, "tokens": 4, "bytes_per_second": b} for b in (15, 20, 90)]
    peer = [{"seconds": 2.0, "first": 0.8, "decode": 1.2}]
    answers = {"llama-q8_0": {64: peer}, "emamba-int8": {64: turns}}
    loaded = {"emamba-int8": {"step_bytes": 2}}
    summary = summarise(answers, loaded)
    assert summary["emamba-int8"][64]["x_reading"] == 2.0  # 3 steps of 2 bytes at 20 a second take 0.3 s
    assert "x_reading" not in summary["llama-q8_0"][64]
    rows = {row[2]: row for row in target_rows(summary, [64], 4, {}, {"bytes_per_second": 1, "gemm_flops": 1})}
    assert rows["decoding"][5:8] == ["2.00", "no", "4.0"] and rows["source"][7] == "–"


def test_the_least_time_reads_weights_and_makes_products_once():
    engine = {"step_bytes": 10, "source_products": 3, "encoder_products": 5, "encoder_pair_products": 2}
    loaded = {"mambaformer": {**engine, "pass_bytes": 40, "rounded": True}}
    summary = {"bursts": {4: {"encoder_calls": 1, "et5_passes": 2}}, "closed": {4: {}}}
    speeds = {"bytes_per_second": 20, "gemm_flops": 8, "int8_ops": 16}
    assert least_times("closed", 4, 3, summary, loaded, speeds) == {"first": 2.0, "decode": 1.0, "seconds": 3.0}
    et5 = 2 * (5 * 4 / 16 + 2 * 16 / 8) + 2 * 40 / 20
    assert least_times("bursts", 4, 3, summary, loaded, speeds)["seconds"] == 3.0 + et5
    loaded["mambaformer"]["rounded"] = False
    assert least_times("closed", 4, 3, summary, loaded, speeds) == {"first": 3.5, "decode": 1.0, "seconds": 4.5}
    assert least_times("t5-large", 4, 3, {"t5-large": {4: {}}}, {}, speeds) == {}


def test_every_contestant_has_an_engine_of_a_known_size():
    assert {contestant.engine for contestant in CONTESTANTS.values()} == set(ENGINES)
    assert set(SIZES["true"]) == set(SIZES["tiny"])
    large, none = ENGINES["t5-large"], ENGINES["emamba-int8"]
    assert large.working_bytes("true", 8192) > 10 * 2**30 and none.working_bytes("true", 65536) < 6 * 2**30


# ---- processes


@pytest.fixture
def small_engine(tmp_path, monkeypatch):
    """An engine of the standard library, so that its process starts at once."""
    (tmp_path / "sitecustomize.py").write_text("import small_engine\n")
    (tmp_path / "small_engine.py").write_text(
        "import os, sys, time, types\n"
        "class Small:\n"
        "    def __init__(self, setup, size): self.setup = setup\n"
        "    def prepare(self): pass\n"
        "    def load(self): self.held = bytearray(self.setup['longest']); return {'weight_bytes': 1}\n"
        "    def answer(self, length, new_tokens, turn):\n"
        "        print('chatter of a library')\n"
        "        if length == 13: raise ValueError('an unlucky source')\n"
        "        if length == 14: print('out of luck', file=sys.stderr); os._exit(9)\n"
        "        if length == 15: time.sleep(60)\n"
        "        big = b'x' * (length * 2**20)\n"
        "        return {'tokens': new_tokens, 'pid': os.getpid(), 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "module = types.ModuleType('mambaformer.benchmarks.latency_peers')\n"
        "module.TransformersT5 = Small\n"
        "sys.modules[module.__name__] = module\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {**SETUP, "engine": "t5-base", "folder": str(tmp_path), "threads": 3}


def test_an_engine_answers_from_a_process_of_its_own(small_engine):
    process = EngineProcess(small_engine, 30)
    assert process.ask("load")["weight_bytes"] == 1
    small, large = (process.ask("answer", length=length, new_tokens=5, turn=0) for length in (1, 80))
    assert small["tokens"] == 5 and small["threads"] == "3" and small["seconds"] > 0
    with pytest.raises(EngineError, match="ValueError: an unlucky source"):
        process.ask("answer", length=13, new_tokens=5, turn=0)
    again = process.ask("answer", length=1, new_tokens=5, turn=0)
    assert again["pid"] == small["pid"] and process.alive
    if latency_process.CLEAR.exists():
        assert large["peak_bytes"] - small["peak_bytes"] > 60 * 2**20
        assert large["peak_bytes"] - again["peak_bytes"] > 60 * 2**20  # each answer's own peak
    process.close()
    assert not process.alive


@pytest.mark.skipif(sys.platform == "win32", reason="exit codes differ")
def test_a_process_that_dies_says_why_and_the_next_answer_comes_from_a_new_one(small_engine, tmp_path):
    pool = Pool(small_engine, tmp_path, 30)
    pool.prepare("t5-base")
    pool.written()
    first = pool.ask("t5-base", 1, new_tokens=5, turn=0)
    with pytest.raises(EngineError, match="exit code 9: .*out of luck"):
        pool.ask("t5-base", 14, new_tokens=5, turn=0)
    second = pool.ask("t5-base", 1, new_tokens=5, turn=0)
    assert second["pid"] != first["pid"] and pool.reloads == {"t5-base": 1}
    pool.close()
    with pytest.raises(EngineError, match="no answer within 1 s"):
        Pool(small_engine, tmp_path, 1).ask("t5-base", 15, new_tokens=5, turn=0)


def test_engines_are_closed_for_want_of_memory(small_engine, tmp_path, monkeypatch):
    pool = Pool(small_engine, tmp_path, 30)
    monkeypatch.setitem(ENGINES, "t5-large", ENGINES["t5-base"])
    monkeypatch.setattr("mambaformer.benchmarks.latency_pool.available_memory", lambda: 10 * 2**30)
    for engine in ("t5-base", "t5-large"):
        pool.ask(engine, 1, new_tokens=5, turn=0)
    assert list(pool.running) == ["t5-base", "t5-large"]
    monkeypatch.setattr("mambaformer.benchmarks.latency_pool.available_memory", lambda: 2**20)
    pool.ask("t5-base", 1, new_tokens=5, turn=0)
    assert list(pool.running) == ["t5-base"] and pool.reloads == {}
    pool.ask("t5-large", 1, new_tokens=5, turn=0)
    assert list(pool.running) == ["t5-large"] and pool.reloads == {"t5-large": 1}
    pool.close()
