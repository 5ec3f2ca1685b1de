# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""What a training run needs besides the training arguments; imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass, field


@dataclass
class RunArguments:
    """Model, data, stages and what happens at the end of a run of `run.py`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A composed MambaFormer: a folder or a Hub id. Or give et5 and emamba."}
    )
    et5: str | None = field(default=None, metadata={"help": "T5-family checkpoint to compose: a folder or a Hub id."})
    emamba: str | None = field(default=None, metadata={"help": "Mamba checkpoint to compose: a folder or a Hub id."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "The shared tokenizer; default the one beside the model or beside et5."}
    )
    router_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the router looks at, of complexity, length, domain, past; default all, or the model's own. "
            "Other than the model's own: a fresh router."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights in memory: float32 or bfloat16."})
    save_dtype: str | None = field(default=None, metadata={"help": "Of the saved weights; default that in memory."})
    save_form: str = field(
        default="merged",
        metadata={
            "help": "merged: one plain model, in output_dir/model. adapters: adapters and router on the named bases, "
            "in output_dir/adapters; joint then goes on with the adapters of adapt. both: both folders."
        },
    )
    stages: list[str] = field(
        default_factory=lambda: ["adapt", "distil"], metadata={"help": "In this order, of adapt, distil, joint."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Take up finished stages and the last checkpoint found in output_dir."}
    )

    dataset: str = field(
        default="dental_qa",
        metadata={
            "help": "dental_qa, a .csv, .tsv, .json, .jsonl or .parquet file, ori_pqal.json, a folder, a Hub id "
            "(qiaojin/PubMedQA: its expert-labelled questions with the official test split)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the data set's configuration."})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Where it is another file; default dataset."}
    )
    distil_dataset: str | None = field(
        default=None, metadata={"help": "Where the router is distilled on another one; default dataset."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to calibrate and score on."})
    distil_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to distil the router on; default train_split. Experts that know their training answers by "
            "heart differ little on them: with validation_split, the rows that are not calibrated on are used."
        },
    )
    question_column: str = field(default="question", metadata={"help": "Column of the questions."})
    context_column: str | None = field(default="context", metadata={"help": "Column of the contexts, may be absent."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the answers."})
    decision_column: str | None = field(
        default=None, metadata={"help": "Column of yes, no or maybe to put before the answer; PubMedQA needs none."}
    )
    max_source_length: int = field(default=512, metadata={"help": "Tokens of a source; longer contexts are cut."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of an answer, in training and generation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows at most."})
    max_distil_samples: int | None = field(default=None, metadata={"help": "Distil on so many of them at most."})
    max_validation_samples: int | None = field(
        default=256, metadata={"help": "Calibrate on so many validation rows at most."}
    )
    lexicon: str | None = field(
        default=None,
        metadata={"help": "Words and their log-odds for the router's domain feature: dental_qa, or a JSON file."},
    )

    cost_table: str = field(
        default="measure", metadata={"help": "measure: time both experts here before training. keep: the model's own."}
    )
    calibrate: bool = field(default=True, metadata={"help": "Set thresholds on validation answers at the end."})
    calibrate_gate: bool = field(default=True, metadata={"help": "Set the sequence gate too."})
    calibration_rounds: int = field(default=4, metadata={"help": "At most so many generations to find the threshold."})
    score_samples: int = field(default=128, metadata={"help": "Answer and score so many validation rows at the end."})
    bert_score_model: str | None = field(
        default=None, metadata={"help": "Encoder for BERTScore: minilm, a Hub id, a folder; default none."}
    )
    bert_score_layers: int | None = field(
        default=None, metadata={"help": "Layer of an encoder that it does not know."}
    )

    cross_validate: int | None = field(
        default=None,
        metadata={
            "help": "Train and score so often, each time without another fold of the training and validation rows."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Rows that share its value share a fold; default concept (dental_qa), id (PubMedQA), the question."
        },
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.et5 is None or self.emamba is None):
            raise ValueError(
                f"model_name_or_path is {self.model_name_or_path!r}, et5 {self.et5!r} and emamba {self.emamba!r}: "
                "give either a composed model or both experts."
            )
        for name, values in (("dtype", ("float32", "bfloat16")), ("save_dtype", (None, "float32", "bfloat16"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {list(values)}.")
        if self.save_form not in ("merged", "adapters", "both"):
            raise ValueError(f"save_form is {self.save_form!r}: choose merged, adapters or both.")
        if self.cost_table not in ("measure", "keep"):
            raise ValueError(f"cost_table is {self.cost_table!r}: choose measure or keep.")
        if self.cross_validate is not None and self.cross_validate < 2:
            raise ValueError(f"cross_validate is {self.cross_validate}: give a number of folds of 2 or more.")
        if self.cross_validate is not None and self.score_samples < 1:
            raise ValueError(f"score_samples is {self.score_samples}: cross-validation scores 1 or more a fold.")
        if not self.stages:
            raise ValueError("stages is empty: name at least one of adapt, distil, joint.")
