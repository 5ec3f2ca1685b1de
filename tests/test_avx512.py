# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
What processors with AVX-512 and its int8 products would run, on one without: SIMDe says what each instruction does.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_tests import run_native_tests

pytestmark = pytest.mark.slow

TYPES = ["__m512i", "__m512"]
# What SIMDe lacks.
MISSING = """
static inline __m128i simde_mm512_cvtepi32_epi8(simde__m512i x) {
  int32_t wide[16];
  int8_t narrow[16];
  memcpy(wide, &x, sizeof wide);
  for (int i = 0; i < 16; ++i) narrow[i] = (int8_t)wide[i];
  __m128i bytes;
  memcpy(&bytes, narrow, sizeof bytes);
  return bytes;
}
"""


@pytest.fixture(scope="module")
def library(repo_root: Path, tmp_path_factory) -> Path:
    """The operators, every AVX-512 instruction being a function of SIMDe, on a processor that claims to have them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("avx512")
    for path in [*(repo_root / "native").glob("*.cpp"), *(repo_root / "native").glob("*.h")]:
        text = path.read_text(encoding="utf-8").replace(",avx512f,avx512bw,avx512vl,avx512vnni", "")
        (folder / path.name).write_text(
            re.sub(r'__builtin_cpu_supports\("avx512\w+"\)', "true", text), encoding="utf-8"
        )
    used = {
        name for path in folder.iterdir() for name in re.findall(r"\b_mm512_\w+", path.read_text(encoding="utf-8"))
    }
    assert used, "no AVX-512 instruction is named in native/"
    aliases = [f"#define {name} simde{name}\n" for name in TYPES]
    aliases += [f"#define {name} simde{name}\n" for name in sorted(used)]
    prefix = "#include <string.h>\n#include <immintrin.h>\n#include <simde/x86/avx512.h>\n" + MISSING
    (folder / "emulated.h").write_text(prefix + "".join(aliases), encoding="utf-8")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-w",
        "-Wno-psabi",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-include",
        "emulated.h",
    ]
    sources = sorted(path.name for path in folder.glob("*.cpp"))
    built = subprocess.run([*command, *sources, "-o", "_decode_step.so"], cwd=folder, capture_output=True, text=True)
    if "simde/x86/avx512.h" in built.stderr:
        pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
    assert built.returncode == 0, built.stderr
    (folder / "_selective_scan.so").symlink_to(folder / "_decode_step.so")
    return folder


def test_the_operators_with_avx512(library, repo_root):
    built = ctypes.CDLL(str(library / "_decode_step.so"))
    built.mambaformer_decode_isa.restype = ctypes.c_char_p
    assert built.mambaformer_decode_isa() == b"avx512vnni"
    environment = {**os.environ, "MAMBAFORMER_NATIVE": str(library), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    environment.pop("MAMBAFORMER_ISA", None)
    run_native_tests(repo_root, environment)
