# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Write the Python files beside what is saved, so that the folder loads with `trust_remote_code=True` wherever it goes.

This file runs in two worlds. Installed, the files lie in the package's rooms and are flattened on the way out. Loaded
as remote code, they lie beside this one, flat already, and are copied; so a model saved again takes everything along,
its tokenizer's and its pipeline's files too.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from .flatten import flatten

ENTRIES = {
    "MambaFormerConfig": ("configuration", "configuration_mambaformer"),
    "MambaFormerForConditionalGeneration": ("modeling_mambaformer", "modeling_mambaformer"),
    "MambaFormerTokenizer": ("tokenizer", "tokenization_mambaformer"),
    "MambaFormerText2TextPipeline": ("pipelines", "pipeline_mambaformer"),
}
"""The classes that transformers loads by name -> room and file."""

HERE = Path(__file__).absolute().parent
FLAT = (HERE / "modeling_mambaformer.py").is_file()
"""Whether this file runs as remote code, with all others beside it."""


def _reference(name: str) -> str:
    return f"{ENTRIES[name][1]}.{name}"


def auto_map() -> dict[str, str]:
    """Return `auto_map` of `config.json`; both model classes are the one there is."""
    model = _reference("MambaFormerForConditionalGeneration")
    return {"AutoConfig": _reference("MambaFormerConfig"), "AutoModel": model, "AutoModelForSeq2SeqLM": model}


def tokenizer_auto_map() -> dict[str, list[str | None]]:
    """Return `auto_map` of `tokenizer_config.json`."""
    return {"AutoTokenizer": [_reference("MambaFormerTokenizer"), None]}


def custom_pipelines() -> dict[str, dict]:
    """Return `custom_pipelines` of `config.json`: the task that transformers 5 removed, in our implementation."""
    implementation = _reference("MambaFormerText2TextPipeline")
    return {"text2text-generation": {"impl": implementation, "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}}


@functools.cache
def remote_code() -> dict[str, str]:
    """
    Return the flat files, name -> source text.

    transformers copies the files that it reaches from the one it loads. So that whatever imports this file reaches all
    the others and none is lost on the way, its copy ends with imports of the entry files, which are never run.

    Raises:
        ValueError: for a file that cannot be flattened, see `flatten`.
    """
    folders = {room: HERE if FLAT else HERE.parent / room for room, _ in ENTRIES.values()}
    files = flatten(folders[room] / f"{file}.py" for room, file in ENTRIES.values())
    if not FLAT:
        links = [f"    from .{file} import {name}  # noqa: F401\n" for name, (_, file) in ENTRIES.items()]
        guard = "\n\nfrom typing import TYPE_CHECKING  # noqa: E402\n\nif TYPE_CHECKING:  # followed, never run\n"
        files[Path(__file__).name] += guard + "".join(links)
    return files


def write_remote_code(folder: str | os.PathLike) -> list[Path]:
    """Write the flat files into `folder`, which exists, over any of the same names; return their paths."""
    written = []
    for name, text in remote_code().items():
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8", newline="\n")
        written.append(path)
    return written


class OwnRemoteCodeMixin:
    """Keeps transformers from copying a class's files itself: it reaches neither other rooms nor the pipeline."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type | None = None) -> None:
        """Does nothing: what is saved always carries its files and names its classes."""


class RemoteCodeMixin(OwnRemoteCodeMixin):
    """Makes `save_pretrained` and `push_to_hub` write the Python files too; listed before transformers' class."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As transformers', and the flat Python files beside it. Raises `ValueError` where one cannot be flattened."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(save_directory)
        return saved

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """`save_pretrained(push_to_hub=True)` uploads from within: the files have to be there by then."""
        write_remote_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class RemoteCodeConfigMixin(RemoteCodeMixin):
    """The same for a configuration, which also names the classes that the files hold."""

    def __post_init__(self, **kwargs):
        if not FLAT:  # the installed classes and the registered pipeline serve this configuration
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As transformers', with `auto_map`, `custom_pipelines` and the flat Python files."""
        # Set afresh: transformers prefixes them on loading from the Hub, and puts classes into custom_pipelines.
        self.auto_map, self.custom_pipelines = auto_map(), custom_pipelines()
        return super().save_pretrained(save_directory, *args, **kwargs)


from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:  # followed, never run
    from .configuration_mambaformer import MambaFormerConfig  # noqa: F401
    from .modeling_mambaformer import MambaFormerForConditionalGeneration  # noqa: F401
    from .tokenization_mambaformer import MambaFormerTokenizer  # noqa: F401
    from .pipeline_mambaformer import MambaFormerText2TextPipeline  # noqa: F401
