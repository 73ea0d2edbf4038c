"""Compare members on a task of your own: the task is the class below. Takes about half a minute.

`codeword`: each sequence begins with a code; every segment ends with a question mark, at which the code is
the answer. What a task must say is its batches, an answer key, and what is possible without a memory. Here
the runs are done one after the other in this process. The command does several at once, and draws plots:

    PYTHONPATH=examples memory-bench compare --task compare_on_my_task:Codeword --models memformer
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.results import Results
from benchmarks.sequences import Canvas, SequenceTask, gap_names
from benchmarks.settings import plan
from benchmarks.task import Batch, one_hot_logits
from benchmarks.train import run

MODELS = ("memformer", "memorizing", "transformer-xl", "window")
SETTINGS = (
    "train.steps=100",
    "train.learning_rate=0.01",
    "dim=32",
    "depth=1",
    # So few tokens are told apart sooner by large embeddings of their own.
    "embedding_std=0.5",
    "embedding_scale=1.0",
    "tie_embeddings=false",
)


@dataclass(frozen=True, kw_only=True)
class CodewordConfig:
    """What defines the data; `--set task.segments=8` changes it."""

    segments: int = 4
    segment_length: int = 8
    codes: int = 8
    evaluation_sequences: int = 256


class Codeword(SequenceTask):
    """Token ids: the codes, then as many kinds of noise, then the question mark."""

    name = "codeword"
    summary = "say the code that the sequence began with, by segments since"
    Config = CodewordConfig

    def set_up(self) -> None:
        self.vocab_size = 2 * self.config.codes + 1
        self.segment_length = self.config.segment_length
        self.groups = gap_names(self.config.segments)
        self.distant = range(1, self.config.segments)

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.segments, c.segment_length))
        canvas.tokens[:] = random.integers(c.codes, 2 * c.codes, size=canvas.tokens.shape)
        codes = random.integers(c.codes, size=rows)
        canvas.tokens[:, 0, 0] = codes
        canvas.tokens[:, :, -1] = 2 * c.codes
        canvas.labels[:, :, -1] = codes[:, None]
        canvas.groups[:, :, -1] = np.arange(c.segments)
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        return one_hot_logits(batch.tokens[:, :1].expand_as(batch.tokens), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        return [1.0] + [1 / self.config.codes] * (self.config.segments - 1)

    def by_guessing(self) -> Sequence[float]:
        return [1 / self.config.codes] * self.config.segments


def main(
    models: Sequence[str] = MODELS, settings: Sequence[str] = SETTINGS, out: Path | None = None
) -> dict[str, Mapping[str, Any]]:
    """Train and evaluate each model; its line of the results, by name."""
    folder = out or Path(tempfile.mkdtemp(prefix="codeword-"))
    found: dict[str, Mapping[str, Any]] = {}
    for model in models:
        record = run(plan(model, "compare_on_my_task:Codeword", 0, assignments=settings), Results(folder))
        if record is None or record["status"] != "finished":
            raise SystemExit(f"{model} did not finish: {record}")
        scores, drop = record["scores"], record["memory_use"]["drop"]["none"]
        gaps = " ".join(f"{v:.3f}" for name, v in scores.items() if name.startswith("accuracy/"))
        state = f"{record['state_bytes']:.0f} bytes of memory a row"
        print(f"{model:15} accuracy by gap {gaps}, memory emptied {0.0 - drop:+.3f}; {state}")
        found[model] = record
    print(f"every figure is in {folder}/results.jsonl")
    return found


if __name__ == "__main__":
    main()
