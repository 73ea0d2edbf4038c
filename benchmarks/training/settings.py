"""What can be set of a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.members import known_options
from benchmarks.settings import TrainSettings, value_of
from memory_models.registry import nearest

# How each step is made: a checkpoint is gone on from with the same, unless `may_change` says otherwise.
OPTIMISATION = (
    "steps",
    "learning_rate",
    "warmup",
    "decay",
    "final",
    "weight_decay",
    "betas",
    "clip",
    "gradient",
    "precision",
)
MODEL_DEFAULTS = {"dim": 256, "depth": 4, "heads": 4, "segment_length": 256}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one model on your own text; the same command goes on where it was stopped."""

    data: Path
    """File (any bytes), folder of text files (each is a document) or .gz to train on."""
    model: str
    """Name of the model, as `memory-bench list` shows it, or package.module:Class."""
    out: Path
    """Folder for checkpoint.pt, log.jsonl and the trained model; seen by all machines."""
    tokenizer: str = "bytes"
    """`bytes`, or a tokenizer.json of Hugging Face tokenizers, or the folder that holds it."""
    end_token: str = ""
    """Token of the tokenizer that is put after each document, such as <|endoftext|>; empty: none."""
    set: tuple[str, ...] = ()
    """Options of the model as key=value; default dim=256 depth=4 heads=4 segment_length=256."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Rows: documents read side by side, over all processes together."""
    accumulate: int = 1
    """Parts in which each process reads its rows one after the other, to need less memory."""
    segments: int = 4
    """Segments a row reads in a step, through which the gradient flows (truncated back-propagation)."""
    gradient: Literal["bptt", "replay"] = "bptt"
    """How it flows: bptt, or replay (memory replay: activations of one segment only)."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up; never more than a quarter of all steps."""
    decay: float = 1.0
    """Share of the steps, at the end, over which a cosine lowers the learning rate."""
    final: float = 0.1
    """Share of the peak learning rate that is left at the end."""
    weight_decay: float = 0.01
    """Decay of matrices; embeddings, norms and scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the forward pass; auto: what `accelerate launch` was told, else fp32."""
    seed: int = 0
    """Seed of the weights and of the order of the documents."""
    device: str = "auto"
    """Where to train; auto: an accelerator if there is one. With several processes each has its own."""
    threads: int = 0
    """Threads of a process; 0: as torch chooses."""
    held_out: int = 32
    """Documents to hold out for evaluation, at most one in eight."""
    held_out_tokens: int = 20_000
    """First tokens of a held-out document that are evaluated."""
    min_bytes: int = 200
    """Shorter documents are left out."""
    document_start: str = ""
    """A line that starts with this text begins a new document."""
    evaluate_every: int = 200
    """Steps from one evaluation (and sample) to the next; 0: only at the end."""
    evaluation_rows: int = 16
    """Documents evaluated side by side, over all processes together."""
    sample_tokens: int = 100
    """Tokens of the sample drawn at each evaluation; 0: none."""
    sample_prompt: str = ""
    """What the sample continues; empty: the beginning of a held-out document."""
    checkpoint_seconds: float = 300.0
    """Most seconds of work that an interruption may cost."""
    may_change: tuple[str, ...] = ()
    """Settings in which the checkpoint to go on from may differ, such as steps or learning_rate."""
    keep_memory: bool = False
    """Save the rows' memories beside the trained model."""
    tensorboard: bool = False
    """Write figures for TensorBoard too."""

    def __post_init__(self) -> None:
        for name in ("accumulate", "segments", "evaluation_rows", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("threads", "min_bytes", "evaluate_every", "sample_tokens", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        if self.held_out_tokens < 2:
            raise ValueError(f"held_out_tokens ({self.held_out_tokens}) must be at least 2")
        if self.end_token and self.tokenizer == "bytes":
            raise ValueError(f"end_token ({self.end_token!r}) needs a tokenizer; bytes have none")
        for name in self.may_change:
            if name not in OPTIMISATION:
                raise ValueError(
                    f"may_change ({name!r}) is none of its settings. {nearest(name, OPTIMISATION)}"
                )
        self.optimisation()

    def optimisation(self) -> TrainSettings:
        """The part that the comparison knows too: optimiser and learning rate.

        Raises:
            ValueError: if one of them is out of range.
        """
        names = {field.name for field in dataclasses.fields(TrainSettings)}
        shared = {name: value for name, value in vars(self).items() if name in names - {"threads"}}
        return TrainSettings(**shared)

    def model_options(self) -> dict[str, Any]:
        """Options for `create_lm`: the defaults that the model knows, then those of `set`.

        Raises:
            LookupError: if there is no such model.
            TypeError: if it has no such option; the message names the nearest.
            ValueError: if one is not of the form key=value.
        """
        known = known_options(self.model)
        options: dict[str, Any] = {name: value for name, value in MODEL_DEFAULTS.items() if name in known}
        for assignment in self.set:
            name, equals, text = assignment.partition("=")
            name = name.removeprefix("model.")
            if not equals or not name:
                raise ValueError(f"{assignment!r} is not of the form key=value, such as dim=512")
            if name not in known:
                raise TypeError(f"unknown option {name!r} for model {self.model!r}. {nearest(name, known)}")
            options[name] = value_of(text)
        return options
