# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The compiled operators, as optional extensions: where one cannot be built, the installation goes on without it and
its work is done by PyTorch. Everything else is in pyproject.toml."""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError


class BuildSharedLibrary(build_ext):
    """Builds a plain shared library, loaded by ctypes: no Python symbols in it, and OpenMP only where it exists."""

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, PlatformError):
            if "-fopenmp" not in ext.extra_compile_args:
                raise
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args.remove("-fopenmp")
            super().build_extension(ext)


LIBRARIES = {
    "_selective_scan": ["native/causal_conv.cpp", "native/selective_scan.cpp"],
    "_decode_step": [
        f"native/{name}.cpp"
        for name in (
            "decode_step",
            "router_step",
            "greedy_run",
            "draft",
            "prefill",
            "et5_pass",
            "et5_encoder",
            "et5_source",
            "linear",
        )
    ],
}

setup(
    cmdclass={"build_ext": BuildSharedLibrary},
    ext_modules=[
        Extension(
            f"mambaformer.native.{name}",
            sources=sources,
            depends=sorted(glob("native/*.h")),
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-Wall", "-Wextra", "-g0", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for name, sources in LIBRARIES.items()
    ],
)
