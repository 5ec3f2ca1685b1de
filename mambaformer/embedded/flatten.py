# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Flatten the package's rooms into sibling files, as the Hub needs remote code to be.

transformers loads remote code from one folder whose files import each other with a single dot. The rooms of this
package import each other with two. `flatten` follows the imports from a few entry files and returns every file it
reaches, with its cross-room imports turned into sibling imports and nothing else changed; files that are flat already
come out as they are. Whatever would load here and fail there is an error when saving, not a surprise for whoever
downloads it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

REQUIRED_PACKAGES = frozenset({"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"})
"""What remote code may import without a guard; anything else stands in a `try` block."""

IMPORT_HEAD = re.compile(r"from\s+\.+[\w.]*\s+import\b")
# What transformers' `dynamic_module_utils` takes for a relative import, in code and in text alike.
LOOKS_RELATIVE = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)


def flatten(entries: Iterable[Path]) -> dict[str, str]:
    """
    Return the flat files that `entries` and everything they import become.

    Args:
        entries: Python files of any room.

    Returns:
        file name -> source text, in the order in which the files were reached.

    Raises:
        ValueError: naming file, line, statement and remedy, for what cannot be flattened: a star import, an import of
            a whole module or room, a relative import inside a function, two files of one name, a package that remote
            code may not count on, or text that transformers would mistake for a relative import.
        OSError: for an entry that cannot be read.
    """
    reached: dict[str, Path] = {}
    texts: dict[str, str] = {}
    waiting = [(Path(entry).absolute(), "an entry file") for entry in entries]
    while waiting:
        path, importer = waiting.pop(0)
        if path.name in reached:
            if reached[path.name] != path:
                raise ValueError(
                    f"{path} ({importer}) and {reached[path.name]} have the same file name, and a flat folder holds "
                    "one of them only: rename one."
                )
            continue
        reached[path.name] = path
        texts[path.name], imported = _flatten_file(path)
        waiting.extend(imported)
    return texts


def _flatten_file(path: Path) -> tuple[str, list[tuple[Path, str]]]:
    """Return the flat text of one file, and the files it imports, each with the statement that imports it."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    imported, siblings = [], set()
    for node, local, guarded in _imports(ast.parse(text, filename=str(path))):
        statement = f"line {node.lineno}: `{ast.unparse(node)}`"

        def refuse(remedy: str, statement: str = statement):
            raise ValueError(f"{path}, {statement} cannot be flattened for the Hub: {remedy}.")

        if isinstance(node, ast.Import) or node.level == 0:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for package in {name.split(".")[0] for name in names}:
                if not guarded and package not in REQUIRED_PACKAGES and package not in sys.stdlib_module_names:
                    refuse(
                        f"{package!r} is not one of {sorted(REQUIRED_PACKAGES)}; import files of this package "
                        "relatively and optional packages inside try/except"
                    )
            continue
        parts = node.module.split(".") if node.module else []
        if any(alias.name == "*" for alias in node.names):
            refuse("name what is imported instead of *")
        if local:
            refuse("move the relative import to the top of the file")
        if len(parts) != node.level or node.level > 2:
            refuse("write `from .file import name`, or `from ..room.file import name` for another room")
        folder = path.parent if node.level == 1 else path.parent.parent / parts[0]
        target = folder / f"{parts[-1]}.py"
        if not target.is_file():
            refuse(f"there is no file {target}; import from the file that defines the name")
        line, column = lines[node.lineno - 1], node.col_offset
        head = IMPORT_HEAD.match(line, column)
        if head is None:
            refuse("keep `from … import` on one line")
        if node.level == 2:
            lines[node.lineno - 1] = f"{line[:column]}from .{parts[-1]} import{line[head.end() :]}"
        imported.append((target, f"{path.name}, {statement}"))
        siblings.add(parts[-1])
    flat = "".join(lines)
    seen = {match[1] or match[2]: match for match in LOOKS_RELATIVE.finditer(flat)}
    for name in seen.keys() ^ siblings:
        if name in siblings:
            raise ValueError(f"{path}: the import of .{name} must start its own line, or transformers overlooks it.")
        number = flat.count("\n", 0, seen[name].end()) + 1
        raise ValueError(
            f"{path}, line {number}: `{seen[name][0].strip()}` is text, but transformers takes it for an import of "
            f"{name}.py: reword the line, so that it does not start this way."
        )
    return flat, imported


def _imports(
    tree: ast.AST, local: bool = False, guarded: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Yield each import below `tree`, whether it stands in a function or class, and whether in a `try` block."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, local, guarded
        else:
            scope = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
            yield from _imports(node, local or scope, guarded or isinstance(node, ast.Try))
