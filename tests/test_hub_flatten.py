# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The flattener: two-dot imports become siblings, everything needed comes along, anything else is refused by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from mambaformer.configuration.flatten import REQUIRED_PACKAGES, flatten
from mambaformer.configuration.remote_code import ENTRIES, FLAT, remote_code, write_remote_code


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write `room/file.py` -> text below `folder`, and return the first file's path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / next(iter(files))


def test_imports_are_followed_and_rewritten(tmp_path: Path) -> None:
    entry = write(
        tmp_path,
        {
            "high/top.py": "from ..low.base import (\n    a,  # kept\n    b as c,\n)\nfrom .near import d\nx = '.'\n",
            "high/near.py": "import math\n\ntry:\n    from ..low.other import e\nexcept ImportError:\n    e = None\n",
            "low/base.py": "import torch.nn as nn\n\na = b = 1\n",
            "low/other.py": "try:\n    import nowhere\nexcept ImportError:\n    nowhere = None\ne = 2\n",
            "low/unused.py": "from . import nothing\n",
        },
    )
    files = flatten([entry])
    assert set(files) == {"top.py", "near.py", "base.py", "other.py"}
    assert files["top.py"].startswith("from .base import (\n    a,  # kept\n    b as c,\n)\nfrom .near import d\n")
    assert files["top.py"].endswith("x = '.'\n")
    assert "    from .other import e\n" in files["near.py"]
    flat = write(tmp_path, {f"flat/{name}": text for name, text in files.items()})
    assert flatten([flat]) == files


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "x = 1\nfrom ..low.base import *\n",
            r"top.py, line 2: `from \.\.low\.base import \*`.*name what is imported",
        ),
        ("from . import near\n", r"line 1: `from \. import near`.*from \.file import name"),
        ("from .. import low\n", r"`from \.\. import low`.*from \.\.room\.file import name"),
        ("from ..low import a\n", r"from \.\.room\.file import name"),
        ("from .sub.near import a\n", r"from \.file import name"),
        ("from ...far.low.base import a\n", r"from \.\.room\.file import name"),
        ("def f():\n    from .near import a\n", r"line 2: .*move the relative import to the top"),
        ("class A:\n    from .near import a\n", r"line 2: .*move the relative import to the top"),
        ("from .absent import a\n", r"there is no file .*absent\.py"),
        ("from \\\n    .near import a\n", r"on one line"),
        ("x = 1; from .near import a\n", r"near must start its own line"),
        ('"""Text\nfrom .near import a\n"""\n', r"line 2: `from \.near import` is text"),
        ("import mambaformer\n", r"'mambaformer' is not one of"),
        ("def f():\n    import peft\n", r"line 2: `import peft`.*try/except"),
        ("from ..low.near import a\nfrom .near import b\n", r"same file name.*rename one"),
    ],
)
def test_what_cannot_be_flattened_is_refused(text: str, message: str, tmp_path: Path) -> None:
    files = {"high/top.py": text, "high/near.py": "a = b = 1\n", "low/base.py": "a = 1\n", "low/near.py": "a = 2\n"}
    with pytest.raises(ValueError, match=message):
        flatten([write(tmp_path, files)])


def test_this_package_is_flat_on_the_hub(tmp_path: Path) -> None:
    """From each file that saves transformers reaches every file, and none needs a package that is not required."""
    assert not FLAT
    written = {path.name for path in write_remote_code(tmp_path)}
    assert written == set(remote_code()) and len(written) > 20
    for name, (_, file) in ENTRIES.items():
        tree = ast.parse((tmp_path / f"{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        if name != "MambaFormerText2TextPipeline":  # which saves through its model
            reached = {Path(path).name for path in get_relative_import_files(tmp_path / f"{file}.py")}
            assert reached | {f"{file}.py"} == written
    for name in written:
        foreign = set(get_imports(tmp_path / name)) - REQUIRED_PACKAGES
        assert not foreign & {"mambaformer", "peft", "accelerate", "datasets"}
    assert flatten([tmp_path / f"{file}.py" for _, file in ENTRIES.values()]) == {
        name: (tmp_path / name).read_text(encoding="utf-8") for name in written
    }


def test_the_embedded_checkpoint_carries_todays_code(repo_root):
    folder = repo_root / "mambaformer" / "embedded"
    stale = [name for name, text in remote_code().items() if (folder / name).read_text(encoding="utf-8") != text]
    assert not stale, "write it again with mambaformer.hub.write_remote_code('mambaformer/embedded')"
