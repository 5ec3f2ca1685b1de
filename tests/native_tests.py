# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The tests that make the compiled operators run through all they do, for builds of another kind than the usual."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = ["test_native_edges.py", "test_causal_conv.py", "test_selective_scan.py", "test_emamba_decoder.py"]
TESTS += ["test_quantized_checkpoint.py", "test_native_linear.py"]
TESTS += ["test_look_ahead.py", "test_emamba_prefill.py", "test_et5_pass.py", "test_et5_encoder.py"]
TESTS += ["test_router_step.py", "test_greedy_decoding.py", "test_look_ahead_heads.py"]
WITHIN = (
    "(test_look_ahead and (its_steps or no_place or latest_of)) or "
    "(test_look_ahead_heads and (proposals_are or stay_the_same or rounded_heads)) or "
    "(test_greedy_decoding and (as_long or rows_end)) or "
    "(test_native_linear and not steps_aside) or test_native_edges or test_causal_conv "
    "or (native and (left_out or two_halves or layout or extreme or 31-3-7)) "
    "or (test_emamba_decoder and (odd_sizes or depends_neither or bad_id or not_finite)) "
    "or (test_emamba_prefill and (odd_sizes or depends_neither or one_layer or checked or nothing or not_finite)) "
    "or (test_et5_pass and (depends_neither or far_distances or bad_ids)) "
    "or (test_et5_encoder and (depends_neither or any_width or rounded_weights or mt5)) "
    "or (test_router_step and (stay_as_they_are or past-9)) "
    "or (test_quantized_checkpoint and (rounded_modules_say or depends_neither or not_finite))"
)


def run_native_tests(repo_root: Path, environment: dict[str, str]) -> None:
    """Run them in a process of this environment, which names the build: all must run, and pass."""
    tests = [str(repo_root / "tests" / name) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", WITHIN, *tests],
        env=environment,
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-1000:]
