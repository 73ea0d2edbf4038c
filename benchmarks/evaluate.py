"""Score a model on a task's held-out data, and ask whether its memory is used.

The memory reaches the model in one of four ways (`MODES`):

- `carried`: as the model left it, the normal way;
- `none`: every segment starts with a fresh memory;
- `shuffled`: before every segment each row is handed the memory of the row beside it, so that what is
  remembered is of the right kind but somebody else's;
- `frozen`: a row keeps the memory it had after the first segment of its document; later segments are read
  with it and change nothing.

A score that does not suffer in the other three is not due to the memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.endings import DivergedError
from benchmarks.task import IGNORED, Batch, Task

MODES = ("carried", "none", "shuffled", "frozen")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: flat metric names and their values.
        asked: how many answers or tokens each score is made of.
        state_bytes: bytes of a row's memory that carry something from segment to segment, those in a store
            outside it included. A tensor that is as in a fresh memory whenever a segment ends (room for the
            open segment) carries nothing.
        memory_bytes: bytes of a row's whole memory, likewise.
        tokens: tokens read.
        seconds: what the reading took.
    """

    scores: dict[str, float]
    asked: dict[str, int]
    state_bytes: float
    memory_bytes: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens read, padding included, by the time it took."""
        return self.tokens / max(self.seconds, 1e-9)


def segments(batch: Batch, length: int) -> Iterator[Batch]:
    """Cut a batch into segments of at most `length` tokens; a reset of whole rows goes to the first."""
    time = batch.tokens.shape[1]
    for start in range(0, time, length):
        part = slice(start, start + length)
        reset = batch.reset
        if reset is not None:
            reset = reset[:, part] if reset.dim() == 2 else reset if start == 0 else None
        yield Batch(
            tokens=batch.tokens[:, part],
            labels=batch.labels[:, part],
            groups=batch.groups[:, part],
            reset=reset,
            mask=None if batch.mask is None else batch.mask[:, part],
        )


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    rows: int,
    batches: int | None = None,
    mode: str = "carried",
    heartbeat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run over the task's evaluation data, or its first `batches` batches, without gradient.

    Args:
        model: called like a `MemoryLM`; left in the mode (training or not) it was in.
        task: gives the data and the scorer.
        rows: rows of a batch.
        batches: None means all.
        mode: how the memory is carried, one of `MODES`.
        heartbeat: called once for each batch; what it raises ends the evaluation.

    Raises:
        ValueError: if `mode` is unknown.
        DivergedError: if an answer is not finite, with the memory carried; a model need not stand what the
            other modes do to its memory.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    scorer = task.scorer()
    carrier = _Carrier(model, mode)
    was_training = model.training
    model.eval()
    tokens, began = 0, time.perf_counter()
    try:
        with torch.no_grad():
            for batch in itertools.islice(task.evaluation(batch_size=rows), batches):
                heartbeat()
                if not task.streaming:
                    carrier.start_afresh()
                logits = carrier.read(batch)
                if mode == "carried":
                    _check_finite(logits, batch)
                scorer.update(logits, batch)
                tokens += batch.tokens.numel()
    finally:
        model.train(was_training)
    return Evaluation(
        scores={name: float(value) for name, value in scorer.result().items()},
        asked=scorer.counts(),
        state_bytes=carrier.weight.state_bytes,
        memory_bytes=carrier.weight.memory_bytes,
        tokens=tokens,
        seconds=time.perf_counter() - began,
    )


def _check_finite(logits: Tensor, batch: Batch) -> None:
    wrong = int((~logits.isfinite().all(-1) & (batch.labels != IGNORED)).sum())
    if wrong:
        raise DivergedError(
            f"the logits are not finite in evaluation, at {wrong} of {batch.asked} positions asked for"
        )


class StateWeight:
    """What a row's memory weighs, over all memories that were added; outside stores count.

    Args:
        model: whose memories they are.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._fresh: dict[str, Tensor] = model.init_memory(1).tensors()
        self._carrying: dict[str, float] = {}
        self._outside = 0.0
        self.memory_bytes = 0.0
        """Of a row's whole memory."""

    @property
    def state_bytes(self) -> float:
        """Of those of its tensors that were ever other than in a fresh memory, and of the store."""
        return sum(self._carrying.values()) + self._outside

    def add(self, memory: Any) -> None:
        """Weigh a memory that goes from one segment to the next, committed."""
        rows = memory.batch_size
        outside = self._model.outside_bytes(memory) / rows
        self._outside = max(self._outside, outside)
        self.memory_bytes = max(self.memory_bytes, memory.nbytes / rows + outside)
        for name, leaf in memory.tensors().items():
            if name not in self._carrying and not torch.equal(leaf, self._fresh[name].expand_as(leaf)):
                self._carrying[name] = leaf.numel() * leaf.element_size() / rows


def take_weights(model: nn.Module, folder: Path) -> None:
    """Give `model` the weights of the model that `save_model` wrote into `folder`, whose options may differ.

    Raises:
        FileNotFoundError: if there is no model in the folder.
        ValueError: if the files are damaged, or hold not exactly the tensors that `model` has.
    """
    from memory_models.checkpoints import load_model

    check_weights_fit(model, loaded := load_model(folder))
    model.load_state_dict(loaded.state_dict(), strict=True)


def check_weights_fit(model: nn.Module, trained: nn.Module) -> None:
    """Refuse weights that are not of the names and shapes of the model's own.

    Raises:
        ValueError: naming what differs.
    """
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in trained.state_dict().items()}
    wrong = [
        f"{name} is {given.get(name, 'missing')}, expected {own.get(name, 'none of that name')}"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the trained weights do not fit: {'; '.join(wrong[:3])}{more}")


class _Carrier:
    """Feeds batches to a model, and its memory back to it in one of the four ways."""

    def __init__(self, model: Any, mode: str) -> None:
        self.model = model
        self.mode = mode
        self.memory: Any = None
        self.weight = StateWeight(model)

    def start_afresh(self) -> None:
        self.memory = None

    def read(self, batch: Batch) -> Tensor:
        """Logits `[batch, time, vocab]` of all the batch's segments."""
        rows = batch.tokens.shape[0]
        if self.memory is not None and self.memory.batch_size != rows:
            self.memory = None
        logits = []
        for segment in segments(batch, self.model.segment_length):
            given = self._given(rows)
            out = self.model(segment.tokens, given, mask=segment.mask, reset=segment.reset)
            logits.append(out.logits)
            self._keep(self.model.commit(out.memory), segment, rows)
        return torch.cat(logits, 1)

    def _given(self, rows: int) -> Any:
        if self.mode == "none" or self.memory is None:
            return None
        if self.mode == "shuffled":
            return self.memory.select(torch.arange(rows).roll(1))
        return self.memory

    def _keep(self, memory: Any, segment: Batch, rows: int) -> None:
        self.weight.add(memory)
        if self.mode == "frozen" and self.memory is not None:
            began = torch.zeros(rows, dtype=torch.bool) if segment.reset is None else segment.reset
            memory = memory.where(began if began.dim() == 1 else began.any(1), self.memory)
        self.memory = memory
