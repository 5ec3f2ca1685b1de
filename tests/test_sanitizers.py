# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled operators under AddressSanitizer and UndefinedBehaviorSanitizer: built anew, and their tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_tests import run_native_tests

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
RUNTIMES = {"g++": ["libasan.so"], "clang++": ["libclang_rt.asan-x86_64.so", "libclang_rt.asan.so"]}
BEYOND = """
import torch
from mambaformer.modeling_mambaformer.causal_conv import ConvArgs
from mambaformer.modeling_mambaformer.native_library import call
small = {name: torch.zeros(8) for name in ("x", "weight", "out")}
call("mambaformer_conv_forward", ConvArgs, small, batch=1, length=1, dim=64, kernel=1)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def environment(request, repo_root: Path, tmp_path_factory) -> dict[str, str]:
    """Of a process that loads the operators as this compiler builds them with sanitizers, without a warning."""
    compiler = shutil.which(request.param)
    if compiler is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted(str(path) for path in (repo_root / "native").glob("*.cpp"))
    command = [compiler, "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", *WARNINGS, *SANITIZERS, "-fopenmp", *sources]
    command += ["-shared-libasan"] if request.param == "clang++" else []
    built = subprocess.run([*command, "-o", str(folder / "_selective_scan.so")], capture_output=True, text=True)
    if "omp.h" in built.stderr or "-lomp" in built.stderr:
        pytest.skip(f"{request.param} has no OpenMP: {built.stderr.splitlines()[0]}")
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip(f"{request.param} comes without its sanitizers")
    assert built.returncode == 0, built.stderr
    (folder / "_decode_step.so").symlink_to(folder / "_selective_scan.so")
    return {
        **os.environ,
        "LD_PRELOAD": runtime(compiler, RUNTIMES[request.param]),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaves memory to the system at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MAMBAFORMER_NATIVE": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }


def runtime(compiler: str, names: list[str]) -> str:
    """The sanitizer's library, which a process must load before anything else."""
    for name in names:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if os.path.isabs(found):
            return found
    pytest.skip(f"{compiler} comes without {names[0]}")


def test_the_operators_touch_nothing_that_is_not_theirs(environment, repo_root):
    run_native_tests(repo_root, environment)


def test_the_sanitizer_is_at_work(environment, repo_root):
    """A call whose sizes are larger than its memory ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", BEYOND], env=environment, cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
