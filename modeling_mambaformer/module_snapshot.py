# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What compiled code asks of modules before it does their work: does anything forbid it, has anything changed?"""

from __future__ import annotations

import functools
from operator import attrgetter, is_, methodcaller

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.utils import logging

logger = logging.get_logger("transformers.mambaformer")

FORWARD_HOOKS, FORWARD_PRE_HOOKS = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")
COMPILED, VERSION, MEMORY = attrgetter("_compiled_call_impl"), attrgetter("_version"), methodcaller("data_ptr")


class Snapshot:
    """The modules and parameters below `roots` as they were, to notice a change of any of them cheaply."""

    def __init__(self, *roots: nn.Module):
        self.roots = roots
        self.modules = [module for root in roots for module in root.modules()]
        self.slots = [(m._parameters, name, p) for m in self.modules for name, p in m._parameters.items()]
        children = [(m._modules, name, child) for m in self.modules for name, child in m._modules.items()]
        # Checked at every token: lists side by side, so that Python's own loops in C can go through them.
        self.registries, self.names, self.entries = zip(*self.slots, *children, strict=True)
        self.dictionaries = [m.__dict__ for m in self.modules]
        self.plain = [p for p in self.entries if type(p) is nn.Parameter and not p.is_inference()]
        self.unversioned = [p for p in self.entries if type(p) is nn.Parameter and p.is_inference()]
        self.marks = self._marks()

    def holds(self, *roots: nn.Module) -> bool:
        """Whether `roots` still have these modules and parameters, unchanged as far as PyTorch knows, and no hooks."""
        return (
            self.roots == roots
            and all(map(is_, map(dict.get, self.registries, self.names), self.entries))
            and self._marks() == self.marks
            and not self.hooked()
        )

    def hooked(self) -> bool:
        """Whether someone listens to a module's forward pass, or has replaced it."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return (
            any(map(FORWARD_HOOKS, self.modules))
            or any(map(FORWARD_PRE_HOOKS, self.modules))
            or any("forward" in dictionary for dictionary in self.dictionaries)
            or any(map(COMPILED, self.modules))
        )

    def _marks(self) -> list[int]:
        """
        Memory and version of every plain parameter, and memory alone of those made in inference mode.

        Parameters of other types, which compiled code never reads, may have neither.
        """
        return [*map(MEMORY, self.plain), *map(VERSION, self.plain), *map(MEMORY, self.unversioned)]


@functools.cache
def report(what: str, reason: str, level: str) -> None:
    """One line for each reason why `what` is not used, in the life of the process."""
    getattr(logger, level)(f"{what} is not used, its modules are run instead: {reason}")


def is_plain_call(module: nn.Module) -> bool:
    """Whether nothing trains, differentiates, traces or casts what `module` is about to do."""
    return not (
        torch.is_grad_enabled() or module.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    )
