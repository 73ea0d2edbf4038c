"""The training of a run, step by step, its checkpoint, and how it goes on from one.

A training that was stopped, or killed at any moment, ends with the numbers, bit by bit, that it would have
had without the interruption.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.endings import DivergedError
from benchmarks.evaluate import evaluate
from benchmarks.learning import accumulate_gradients, learning_rate, make_optimizer
from benchmarks.members import build_model
from benchmarks.results import write_atomically
from benchmarks.settings import RunSpec
from benchmarks.task import Task

logger = logging.getLogger(__name__)

LOSS_POINTS = 50


class CannotWriteError(OSError):
    """A result or a checkpoint cannot be written."""


class Training:
    """The state of a training run, and how it moves by one step.

    Args:
        spec: the run.
        task: its data. The weights are drawn from torch's global generator here and now.
    """

    def __init__(self, spec: RunSpec, task: Task) -> None:
        self.spec = spec
        self.task = task
        self.settings = spec.train
        if spec.train.unroll > 1 and not task.streaming:
            raise ValueError(
                f"unroll ({spec.train.unroll}) is for streams; a batch of {task.name!r} is whole sequences, "
                "and the gradient goes through all their segments"
            )
        self.model: Any = build_model(spec.model, spec.model_options, task.vocab_size)
        self.optimizer = make_optimizer(self.model, spec.train)
        self.step = 0
        self.tokens = 0
        self.memory: Any = None
        self.curve: list[dict[str, float | None]] = []
        self.losses: list[float] = []
        self.last_loss = math.nan
        self.seconds = {"training": 0.0, "evaluation": 0.0, "cpu": 0.0, "training cpu": 0.0}

    @property
    def _store(self) -> Any:
        # What lies outside the memory, as in `memorizing` with store="outside".
        return getattr(self.model.module, "store", None)

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.step / max(self.seconds["training"], 1e-9)

    @property
    def recent_loss(self) -> float | None:
        """Mean training loss over the last stretch of the learning curve."""
        return self.curve[-1]["loss"] if self.curve else None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `seconds[name]`, and its processor time to `seconds["cpu"]`.

        That of the training is kept by itself as well: models differ much in what their evaluation costs.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - wall
            spent = time.process_time() - cpu
            self.seconds["cpu"] += spent
            if name == "training":
                self.seconds["training cpu"] += spent

    def advance(self) -> None:
        """One optimiser step, and what the learning curve asks for after it.

        Raises:
            DivergedError: if the loss or the gradient is not finite, the weights then being as before; or if
                the weights are not finite after the last step, or what the learning curve evaluates.
        """
        settings = self.settings
        with self.timed("training"):
            batches = [
                self.task.batch(seed=self.spec.seed, step=number, batch_size=settings.batch_size)
                for number in range(self.step * settings.unroll, (self.step + 1) * settings.unroll)
            ]
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            value, self.memory = accumulate_gradients(
                self.model, batches, self.memory, through=settings.gradient
            )
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} at step {self.step + 1} of {settings.steps}")
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip, foreach=True).item()
            if not math.isfinite(norm):
                raise DivergedError(
                    f"the gradient's norm is {norm} at step {self.step + 1} of {settings.steps}"
                )
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, settings)
            self.optimizer.step()
            if not self.task.streaming:
                self.memory = None
            self.step += 1
            if self.step == settings.steps:
                self._check_parameters()
            self.tokens += sum(batch.tokens.numel() for batch in batches)
            self.losses.append(value)
            self.last_loss = value
        self._draw_curve()

    def _check_parameters(self) -> None:
        # Of any other step the next one's loss tells; and a score of such a model may even look good.
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise DivergedError(
                    f"{name} is not finite after step {self.step} of {self.settings.steps}; try a smaller "
                    "learning_rate"
                )

    def _draw_curve(self) -> None:
        settings, step = self.settings, self.step
        evaluates = _is_mark(step, settings.steps, settings.curve_points)
        if not (evaluates or _is_mark(step, settings.steps, LOSS_POINTS)):
            return
        point: dict[str, float | None] = {"step": step, "loss": sum(self.losses) / len(self.losses)}
        self.losses = []
        if evaluates:
            with self.timed("evaluation"):
                found = evaluate(
                    self.model, self.task, rows=settings.evaluation_rows, batches=settings.curve_batches
                )
            point["score"] = found.scores[self.task.headline]
        self.curve.append(point)

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, atomically.

        Raises:
            CannotWriteError: if the disk refuses; the checkpoint before still stands.
        """
        state = {
            "id": self.spec.id,
            "step": self.step,
            "tokens": self.tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": None if self.memory is None else self.memory.detach().tensors(),
            "store": None if self._store is None else f"store-{self.step}",
            "generator": torch.get_rng_state(),
            "curve": self.curve,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with writing(path):
            if self._store is not None:
                # Under a name of its own: until the checkpoint is there, the one before needs its own store.
                self._store.save(path.with_name(state["store"]))
            write_atomically(path, buffer.getvalue())
            for old in path.parent.glob("store-*"):
                if old.name != state["store"]:
                    old.unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one that can be read."""
        try:
            state = torch.load(path, weights_only=True)
        except FileNotFoundError:
            return
        except Exception as error:
            logger.warning("%s cannot be read (%s); the run starts afresh", path, error)
            return
        if state["id"] != self.spec.id:
            raise ValueError(f"{path} belongs to run {state['id']}, not to {self.spec.id}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["memory"] is not None:
            self.memory = _memory_from(state["memory"], self.model.init_memory(self.settings.batch_size))
        self.step, self.tokens = state["step"], state["tokens"]
        self.curve, self.losses, self.seconds = state["curve"], state["losses"], state["seconds"]
        if self._store is not None:
            self._store.load(path.with_name(state["store"]))
        torch.set_rng_state(state["generator"])


def _is_mark(step: int, steps: int, points: int) -> bool:
    """Whether `step` is one of `points` evenly spread over `steps`, the last one included."""
    return points > 0 and step * points // steps != (step - 1) * points // steps


def _memory_from(tensors: dict[str, Tensor], like: Any) -> Any:
    names = list(like.tensors())
    if set(names) != set(tensors):
        raise ValueError("the checkpoint's memory is not the one of this model")
    _, structure = pytree.tree_flatten(like)
    return pytree.tree_unflatten([tensors[name] for name in names], structure)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let what the disk refuses in the block be a `CannotWriteError` that names `path` and the way out."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"cannot write {path}: {error.strerror or error}. What was finished is safe; make room, then "
            "give the same command again"
        ) from error
