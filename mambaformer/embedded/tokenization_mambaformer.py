# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""`MambaFormerTokenizer`: the shared vocabulary's fast tokenizer, read whole from a `tokenizer.json`.

Any T5-family tokenizer folder loads unchanged, whatever its normaliser and pre-tokenizer, because nothing is rebuilt
from parts of the file. What this class adds is the contract that the two experts rely on: padding, end-of-sequence and
unknown token known by role, an end-of-sequence token after every text, and a finite `model_max_length`.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from .remote_code import RemoteCodeMixin, tokenizer_auto_map
from .source_format import format_source

DEFAULT_MODEL_MAX_LENGTH = 512  # tokens; what T5 checkpoints were pretrained with
# Above this a stored `model_max_length` is the library's "no limit" sentinel, which overflows a 64-bit tensor library.
LARGEST_MODEL_MAX_LENGTH = 1 << 30

ROLE_NAMES = {
    "pad_token": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>"),
    "eos_token": ("</s>", "<eos>", "[EOS]", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
}


def special_tokens_by_role(backend: Tokenizer) -> dict[str, str]:
    """Find the special tokens that a `tokenizer.json` itself knows.

    The unknown token is the one its model falls back to, the padding token the one of its padding settings; what the
    file leaves open is looked up under the field's usual names.

    Args:
        backend: the tokenizer read from the file.

    Returns:
        Token text under "pad_token", "eos_token" and "unk_token"; a role that the file does not fill is missing.
    """
    roles: dict[str, str] = {}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    model = json.loads(backend.to_str())["model"]
    unknown_id = model.get("unk_id")
    unknown = model.get("unk_token") if unknown_id is None else backend.id_to_token(unknown_id)
    if unknown is not None:
        roles["unk_token"] = unknown
    if backend.padding is not None:
        roles["pad_token"] = backend.padding["pad_token"]
    for role, names in ROLE_NAMES.items():
        for name in names:
            if role not in roles and name in vocabulary:
                roles[role] = name
    return roles


class MambaFormerTokenizer(RemoteCodeMixin, PreTrainedTokenizerFast):
    """The tokenizer of both experts and of the answer.

    `from_pretrained` takes any folder or Hub repository with a `tokenizer.json`: one saved by this class, or that of
    a T5-family checkpoint, whose ids it reproduces exactly.

    Args:
        tokenizer_object (`tokenizers.Tokenizer`, *optional*): a tokenizer in memory.
        tokenizer_file (`str`, *optional*): path of a `tokenizer.json`; either this or `tokenizer_object` is needed.
        model_max_length (`int`, *optional*, defaults to 512): longest source in tokens; a missing or endless value is
            replaced by the default.
        kwargs: special tokens (`pad_token`, `eos_token`, `unk_token`, `extra_special_tokens`), `padding_side`
            ("right" or "left") and everything else that a fast tokenizer takes. A special token that is not given is
            taken by role from the file.

    Raises:
        ValueError: if neither source is given, or if no padding or end-of-sequence token can be found.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    _auto_map = tokenizer_auto_map()

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keep `tokenizer_file` as it is: the base class would rebuild the tokenizer from its vocabulary alone."""
        return kwargs

    def __init__(
        self,
        tokenizer_object: Tokenizer | None = None,
        tokenizer_file: str | None = None,
        model_max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer_object is not None:
            backend = tokenizer_object
        elif tokenizer_file is not None:
            backend = Tokenizer.from_file(tokenizer_file)
        else:
            raise ValueError(
                "no tokenizer.json was found (tokenizer_file=None, tokenizer_object=None); a spiece.model alone is "
                "not read: load it with T5Tokenizer and save_pretrained it once, then load that folder."
            )
        missing = [role for role in ROLE_NAMES if kwargs.get(role) is None]
        found = special_tokens_by_role(backend) if missing else {}
        kwargs |= {role: found[role] for role in missing if role in found}
        for role in ("pad_token", "eos_token"):
            if kwargs.get(role) is None:
                raise ValueError(
                    f"the tokenizer names no {role} (looked for {', '.join(ROLE_NAMES[role])}); "
                    f'pass {role}="..." with the token that has this role.'
                )
        if kwargs.get("extra_special_tokens") is None and kwargs.get("additional_special_tokens") is None:
            named = {str(kwargs.get(role)) for role in (*ROLE_NAMES, "bos_token")}
            added = sorted(backend.get_added_tokens_decoder().items())
            kwargs["extra_special_tokens"] = [
                token.content for _, token in added if token.special and token.content not in named
            ]
        if model_max_length is None or not 0 < model_max_length <= LARGEST_MODEL_MAX_LENGTH:
            model_max_length = DEFAULT_MODEL_MAX_LENGTH
        kwargs.setdefault("padding_side", self.padding_side)  # what is given here is what save_pretrained writes
        super().__init__(tokenizer_object=backend, model_max_length=model_max_length, **kwargs)
        for loading_option in ("is_local", "local_files_only"):  # how it was loaded is no property of the tokenizer
            self.init_kwargs.pop(loading_option, None)
        if self.backend_tokenizer.encode("a").ids[-1] != self.eos_token_id:
            self.update_post_processor()

    def update_post_processor(self) -> None:
        """Put the end-of-sequence token after every text: `text </s>`, for pairs `first </s> second </s>`."""
        eos = self.eos_token
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, self.eos_token_id)]
        )

    @property
    def sentinel_token_ids(self) -> list[int]:
        """Ids of T5's `<extra_id_n>` sentinels in the order of n; empty when the vocabulary has none."""
        vocabulary = self.get_vocab()
        found: list[int] = []
        while f"<extra_id_{len(found)}>" in vocabulary:
            found.append(vocabulary[f"<extra_id_{len(found)}>"])
        return found

    def encode_source(self, question: str, context: str | None = None) -> list[int]:
        """Return the ids of `format_source(question, context)`, the end-of-sequence token included.

        Raises:
            ValueError: if the question is empty or blank.
        """
        return self(format_source(question, context))["input_ids"]
