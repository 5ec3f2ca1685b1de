# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""
Make transformers' Auto classes and `pipeline` know MambaFormer, without loading either before it is needed.

Registering needs the classes, these need torch and transformers' modelling code, and loading those takes several
seconds. So `import mambaformer` only leaves notes: transformers' table of configurations names our model type as it
names its own, by a class to be loaded when it is looked up, and what has to wait for a module is done once that module
has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

MODEL_TYPE = "mambaformer"
TASK = "text2text-generation"
MODELING = f"{__package__}.modeling_mambaformer.modeling_mambaformer"
TOKENIZATION = f"{__package__}.tokenizer.tokenization_mambaformer"
PIPELINE = f"{__package__}.pipelines.pipeline_mambaformer"


class AfterImport(importlib.abc.MetaPathFinder):
    """A finder that leaves finding to the others, and calls an action once the module it waits for has been loaded."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[ModuleType], object]] = {}

    def add(self, name: str, action: Callable[[ModuleType], object]) -> None:
        """Call `action(module)` after the module `name` has been imported: now, if it has been."""
        if name in sys.modules:
            action(sys.modules[name])
        else:
            self.actions[name] = action

    def find_spec(self, fullname, path=None, target=None):
        """Return the spec that the other finders give, its loader followed by the action."""
        action = self.actions.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if action is not None else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            action(module)

        spec.loader.exec_module = load_and_act
        return spec


class PromisedModule:
    """Stands in transformers' table where the module of a model type would: loads ours when its class is wanted."""

    @property
    def MambaFormerConfig(self) -> type:  # noqa: N802, the name by which transformers looks it up
        return importlib.import_module(MODELING).MambaFormerConfig


def promise_configuration(configuration_auto: ModuleType) -> None:
    """Enter the model type in the table of configurations; looking it up registers everything (`register_classes`)."""
    mapping = configuration_auto.CONFIG_MAPPING
    if hasattr(mapping, "_mapping") and hasattr(mapping, "_modules"):
        mapping._modules[MODEL_TYPE] = PromisedModule()
        mapping._mapping[MODEL_TYPE] = "MambaFormerConfig"
    else:  # another transformers keeps its table otherwise: register at once
        importlib.import_module(MODELING)


def register_classes(modeling: ModuleType) -> None:
    """Register configuration, tokenizer and model with their Auto classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

    config, model = modeling.MambaFormerConfig, modeling.MambaFormerForConditionalGeneration
    tokenizer = importlib.import_module(TOKENIZATION).MambaFormerTokenizer
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForSeq2SeqLM.register(config, model, exist_ok=True)


def register_pipeline(module: ModuleType) -> None:
    """
    Bring the task `text2text-generation` back, in our implementation.

    transformers 5 removed it (huggingface/transformers#43256), and newer versions keep a list of removed tasks that is
    looked at before the registry: the task must leave that list, or registering it has no effect.
    """
    from transformers import AutoModelForSeq2SeqLM

    pipelines = sys.modules["transformers.pipelines"]
    getattr(pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    pipelines.PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)  # or a second registration is reported
    pipelines.PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=module.MambaFormerText2TextPipeline, pt_model=AutoModelForSeq2SeqLM, type="text"
    )


def register() -> None:
    """Leave the notes; called by `import mambaformer`."""
    after = AfterImport()
    sys.meta_path.insert(0, after)
    after.add("transformers.models.auto.configuration_auto", promise_configuration)
    after.add(MODELING, register_classes)
    after.add(PIPELINE, register_pipeline)
    after.add("transformers.pipelines", lambda _: importlib.import_module(PIPELINE))
