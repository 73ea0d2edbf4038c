"""One run: train a model on a task, evaluate it, ask whether its memory is used; stop and go on at will.

A run that was stopped, or killed at any moment, goes on from its checkpoint and ends with the numbers,
bit by bit, that it would have had without the interruption.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.diagnose import memory_gradients, summarise_stats
from benchmarks.evaluate import MODES, evaluate, take_weights
from benchmarks.learning import accumulate_gradients, learning_rate, make_optimizer
from benchmarks.members import build_model, tags_of
from benchmarks.provenance import peak_memory, versions
from benchmarks.results import DIVERGED, FAILED, FINISHED, Record, Results, write_atomically, write_json
from benchmarks.settings import RunSpec, TrainSettings, cached_task, command_of
from benchmarks.task import Task

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
MODEL = "model"
LOSS_POINTS = 50


class StoppedError(Exception):
    """The run was asked to stop; its checkpoint is written."""


class DivergedError(Exception):
    """The loss or the gradient is not finite."""


class CannotWriteError(OSError):
    """A result or a checkpoint cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    phase: str
    """`training`, `evaluating` or `probing` (is the memory used?)."""
    step: int
    """Optimiser steps done."""
    steps: int
    """Optimiser steps in all."""
    rate: float
    """Steps per second, over all of the training so far."""
    loss: float
    """Training loss of the last step."""


def run(
    spec: RunSpec,
    results: Results,
    *,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
    checkpoint_seconds: float = 20.0,
) -> Record | None:
    """Do the run, or what is left of it, and add its line to the results.

    A run that evaluates the weights of another (`spec.trained`) has no checkpoint: stopped, it starts afresh.

    Args:
        spec: what to run.
        results: where to keep it.
        stopped: asked after each step; when it says true the run saves itself and ends.
        progress: told after each step.
        checkpoint_seconds: how much work an interruption may cost.

    Returns:
        The line added, whatever its status; None if the run was stopped.

    Raises:
        CannotWriteError: if the disk refuses; all that was written before is still good.
        RunBusyError: if another process does this run.
    """
    with results.claim(spec.id) as folder:
        with _writing(folder):
            write_json(folder / "spec.json", spec.to_json())
        outcome: Record
        try:
            if spec.trained is None:
                found = _train_and_evaluate(spec, folder, stopped, progress, checkpoint_seconds)
            else:
                found = _evaluate_trained(spec, results.run_folder(spec.trained.id), stopped, progress)
            outcome = {"status": FINISHED, **found}
        except StoppedError:
            return None
        except CannotWriteError:
            raise
        except DivergedError as error:
            outcome = {"status": DIVERGED, "error": str(error)}
        except Exception as error:
            logger.exception("run %s failed", spec.id)
            outcome = {
                "status": FAILED,
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc().splitlines()[-30:],
            }
        record = {**heading(spec), **outcome, "versions": versions()}
        with _writing(results.lines):
            results.append(record)
        if record["status"] == FINISHED:
            # Only now: until the line is on the disk the checkpoint is all there is.
            for name in (CHECKPOINT, "store-*"):
                for path in folder.glob(name):
                    path.unlink(missing_ok=True)
        return record


def heading(spec: RunSpec) -> Record:
    """What every line of the results says about its run, whatever became of it."""
    return {
        "id": spec.id,
        "model": spec.model,
        "task": spec.task,
        "seed": spec.seed,
        "tags": tags_of(spec.model),
        "command": command_of(spec),
        "settings": spec.to_json(),
    }


def _train_and_evaluate(
    spec: RunSpec,
    folder: Path,
    stopped: Callable[[], bool],
    progress: Callable[[Progress], None],
    checkpoint_seconds: float,
) -> Record:
    torch.set_num_threads(spec.train.threads)
    task = cached_task(spec.task, spec.task_options)
    torch.manual_seed(spec.seed)
    before = peak_memory()
    training = Training(spec, task)
    training.restore(folder / CHECKPOINT)
    settings, model = spec.train, training.model
    saved = time.monotonic()

    def tell(phase: str) -> None:
        progress(
            Progress(
                phase=phase,
                step=training.step,
                steps=settings.steps,
                rate=training.rate,
                loss=training.last_loss,
            )
        )
        if stopped():
            training.save(folder / CHECKPOINT)
            raise StoppedError

    while training.step < settings.steps:
        training.advance()
        if time.monotonic() - saved > checkpoint_seconds or training.step == settings.steps:
            training.save(folder / CHECKPOINT)
            saved = time.monotonic()
        tell("training")

    with training.timed("evaluation"):
        final = evaluate(model, task, rows=settings.evaluation_rows, heartbeat=lambda: tell("evaluating"))
        memory_use = probe(model, task, settings, heartbeat=lambda: tell("probing"))
        diagnostics = summarise_stats(
            model, task, rows=settings.evaluation_rows, batches=settings.probe_batches
        )
        following = range(settings.steps * settings.unroll, (settings.steps + 1) * settings.unroll)
        batches = [
            task.batch(seed=spec.seed, step=number, batch_size=settings.batch_size) for number in following
        ]
        gradients = memory_gradients(model, spec.model, spec.model_options, batches)
    with _writing(folder):
        keep_model(model, task, folder)
    return {
        "task_facts": describe_task(task),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": final.state_bytes,
        "memory_bytes": final.memory_bytes,
        "peak_bytes": peak_memory(),
        "start_bytes": before,
        "tokens_per_second": training.tokens / max(training.seconds["training"], 1e-9),
        "evaluation_tokens_per_second": final.tokens_per_second,
        "tokens": training.tokens,
        "seconds": {name: round(value, 3) for name, value in training.seconds.items()},
        "loss": training.recent_loss,
        "curve": training.curve,
        "scores": final.scores,
        "memory_use": memory_use,
        "diagnostics": diagnostics,
        "memory_gradients": gradients,
    }


def _evaluate_trained(
    spec: RunSpec, trained: Path, stopped: Callable[[], bool], progress: Callable[[Progress], None]
) -> Record:
    """Evaluate the weights that the run in folder `trained` kept, in a model with the options of `spec`."""
    torch.set_num_threads(spec.train.threads)
    task = cached_task(spec.task, spec.task_options)
    torch.manual_seed(spec.seed)
    before, cpu = peak_memory(), time.process_time()
    model = build_model(spec.model, spec.model_options, task.vocab_size)
    if not (trained / MODEL).exists():
        raise FileNotFoundError(
            f"{trained / MODEL} is gone, the model to evaluate; give another folder for the results (--out) "
            "to train it again"
        )
    take_weights(model, trained / MODEL)
    rows = spec.train.evaluation_rows
    # The first call of anything is slow, and the time is a result.
    evaluate(model, task, rows=rows, batches=1)
    batches = sum(1 for _ in task.evaluation(batch_size=rows))
    done, began = 0, time.perf_counter()

    def tell() -> None:
        nonlocal done
        rate = done / max(time.perf_counter() - began, 1e-9)
        progress(Progress(phase="evaluating", step=done, steps=batches, rate=rate, loss=math.nan))
        if stopped():
            raise StoppedError
        done += 1

    final = evaluate(model, task, rows=rows, heartbeat=tell)
    seconds = {"training": 0.0, "evaluation": final.seconds, "cpu": time.process_time() - cpu}
    return {
        "task_facts": describe_task(task),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": final.state_bytes,
        "memory_bytes": final.memory_bytes,
        "peak_bytes": peak_memory(),
        "start_bytes": before,
        "evaluation_tokens_per_second": final.tokens_per_second,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "curve": [],
        "scores": final.scores,
        "memory_use": {},
    }


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
        self.seconds = {"training": 0.0, "evaluation": 0.0, "cpu": 0.0}

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
        """Add the seconds of the block to `seconds[name]` and its processor time to `seconds["cpu"]`."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - wall
            self.seconds["cpu"] += time.process_time() - cpu

    def advance(self) -> None:
        """One optimiser step, and what the learning curve asks for after it.

        Raises:
            DivergedError: if the loss or the gradient is not finite; the weights are then as before.
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
            self.tokens += sum(batch.tokens.numel() for batch in batches)
            self.losses.append(value)
            self.last_loss = value
        self._draw_curve()

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
        with _writing(path):
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


def probe(
    model: Any, task: Task, settings: TrainSettings, *, heartbeat: Callable[[], None]
) -> dict[str, Any]:
    """Whether the memory is used: scores with it carried, taken away, shuffled and frozen.

    Returns:
        `scores` by mode, and `drop`: how much worse the headline gets in each of the other modes.
    """
    scores = {
        mode: evaluate(
            model,
            task,
            rows=settings.evaluation_rows,
            batches=settings.probe_batches,
            mode=mode,
            heartbeat=heartbeat,
        ).scores
        for mode in MODES
    }
    sign = 1 if task.metric(task.headline).higher_is_better else -1
    carried = scores["carried"][task.headline]
    drop = {mode: sign * (carried - scores[mode][task.headline]) for mode in MODES if mode != "carried"}
    return {"drop": drop, "scores": scores}


def describe_task(task: Task) -> dict[str, Any]:
    """What a report needs to know of the task, so that it need not make it again."""
    return {
        "summary": task.summary,
        "headline": task.headline,
        "metrics": [dataclasses.asdict(metric) for metric in task.metrics],
        "floor": task.floor(),
        "floor_is": task.floor_is,
        "chance": task.chance(),
        "facts": task.facts(),
    }


def keep_model(model: Any, task: Task, folder: Path) -> None:
    """Write the trained model for later use, and what the task adds to it."""
    from memory_models.checkpoints import save_model

    save_model(model, folder / MODEL)
    task.keep(folder / MODEL)


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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"cannot write {path}: {error.strerror or error}. What was finished is safe; make room, then "
            "give the same command again"
        ) from error
