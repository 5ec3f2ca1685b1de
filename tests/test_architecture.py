# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The house rules that a machine can check: one-way imports, sizes, headers, docstrings, a light import, no paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("configuration", "tokenizer", "modeling_mambaformer", "pipelines")
MAY_IMPORT = {
    **{room: set(ORDER[:at]) for at, room in enumerate(ORDER)},
    "dental_qa": set(),
    "native": set(),
    "trainer": {*ORDER, "dental_qa"},
    "mambaformer": {*ORDER, "dental_qa", "trainer"},
    "hub": {*ORDER, "dental_qa", "trainer", "mambaformer"},
    "benchmarks": {*ORDER, "dental_qa", "trainer", "mambaformer", "hub"},
}
LONGEST = 450
LICENCE = "Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0."
TEXT = {".py", ".cpp", ".h", ".md", ".toml", ".yaml", ".yml", ".cff", ".txt", ".json", ".cfg", ""}
SKIPPED = {".git", ".venv", "build", "dist", "runs", "results", "__pycache__"}


def files(*suffixes: str) -> list[Path]:
    """The project's own files with one of these suffixes, as a clean clone has them."""
    found = []
    for folder in (ROOT, *(f for f in ROOT.iterdir() if f.is_dir() and not is_skipped(f))):
        found += [f for f in (folder.glob("*") if folder == ROOT else folder.rglob("*")) if f.is_file()]
    return sorted(f for f in found if f.suffix in suffixes and not any(is_skipped(part) for part in f.parents))


def is_skipped(folder: Path) -> bool:
    """Whether a folder holds what tools made: environments, caches, results of runs."""
    if folder.parent == ROOT and folder.name in SKIPPED:
        return True
    return folder.name == "__pycache__" or folder.name.endswith(("_cache", ".egg-info"))


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_rooms(path: Path, room: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import of another room, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "mambaformer"]
        elif isinstance(node, ast.ImportFrom):
            above = {0: [], 1: ["mambaformer"] if room == "mambaformer" else ["mambaformer", room], 2: ["mambaformer"]}
            base = [*above[node.level], *(node.module or "").split(".")]
            names = [".".join(part for part in [*base, alias.name] if part) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mambaformer":
                target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "mambaformer"
                if target != room:
                    yield node.lineno, target


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    wrong = [
        f"{identify(path)}:{line} imports {target}"
        for path in modules(room)
        for line, target in imported_rooms(path, room)
        if target not in MAY_IMPORT[room]
    ]
    assert not wrong


def test_the_check_sees_every_form_of_import(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "from ..trainer.losses import x\nimport mambaformer.hub.card\nfrom mambaformer import y\n"
        "def f():\n    from .. import dental_qa\nfrom .merger import z\nfrom transformers import w\n"
    )
    found = list(imported_rooms(path, "modeling_mambaformer"))
    assert sorted(found) == [(1, "trainer"), (2, "hub"), (3, "mambaformer"), (5, "dental_qa")]


def test_every_room_is_a_package_that_is_installed():
    listed = re.findall(r'^    "mambaformer\.(\w+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(MAY_IMPORT) - {"mambaformer"})


def test_files_that_share_a_folder_on_the_hub_have_names_of_their_own():
    names = Counter(path.name for room in ORDER for path in modules(room) if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_code_file_is_long():
    long = {identify(f): n for f in files(".py", ".cpp", ".h") if (n := len(f.read_text().splitlines())) > LONGEST}
    assert long == {}


def test_no_star_imports():
    starred = [identify(f) for f in files(".py") if re.search(r"^\s*from .* import \*", f.read_text(), re.MULTILINE)]
    assert starred == []


def test_code_files_carry_the_licence():
    bare = []
    for path in files(".py", ".cpp", ".h"):
        head = path.read_text(encoding="utf-8").splitlines()[:2]
        if not any(line.lstrip("#/* ").startswith(LICENCE) for line in head) and "embedded" not in path.parts:
            bare.append(identify(path))
    assert bare == []


def test_modules_say_what_they_do():
    silent = []
    for path in files(".py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(identify(path))
    assert silent == []


def test_importing_the_package_is_quick_and_needs_no_network():
    code = (
        "import socket, time\n"
        "def refuse(*_): raise OSError('the network is out of bounds')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "start = time.perf_counter(); import mambaformer; print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-c", code]
    seconds = [float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert min(seconds) < 3


def test_text_speaks_of_no_machine():
    """Assembled from parts, so that this file does not hold what it looks for."""
    words = ["/" + "work/", "/" + "root/", "/" + "home/", "/" + "Users/", "py" + "pi.org", "python" + "hosted"]
    words += ["find" + "-links", "index" + "-url", "conda." + "anaconda", "download." + "pytorch"]
    pattern = re.compile("|".join(re.escape(word) for word in words))
    found = []
    for path in files(*TEXT):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{identify(path)}:{at}: {line[:80]}" for at, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []
