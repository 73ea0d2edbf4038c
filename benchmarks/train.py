"""One run: train a model on a task, evaluate it, ask whether its memory is used; stop and go on at will.

A run that was stopped, or killed at any moment, goes on from its checkpoint and ends with the numbers,
bit by bit, that it would have had without the interruption.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.diagnose import diagnose, memory_gradients
from benchmarks.endings import DivergedError
from benchmarks.evaluate import MODES, evaluate, take_weights
from benchmarks.members import build_model, tags_of
from benchmarks.provenance import peak_memory, versions
from benchmarks.results import DIVERGED, FAILED, FINISHED, Record, Results, write_json
from benchmarks.resumable import CannotWriteError, Training, writing
from benchmarks.settings import (
    CodeChangedError,
    RunSpec,
    TrainSettings,
    cached_task,
    check_code,
    command_of,
)
from benchmarks.task import Task

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
MODEL = "model"


class StoppedError(Exception):
    """The run was asked to stop; its checkpoint is written."""


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
        The line added, whatever its status, or the one that the run already has if it is finished; None if
        the run was stopped.

    Raises:
        CannotWriteError: if the disk refuses; all that was written before is still good.
        RunBusyError: if another process does this run.
    """
    with results.claim(spec.id) as folder:
        # Whoever asked before it had the claim may have waited while another process did the run.
        before = results.latest().get(spec.id)
        if before is not None and before["status"] == FINISHED:
            return before
        with writing(folder):
            write_json(folder / "spec.json", spec.to_json())
        outcome: Record
        try:
            check_code(spec)
            if spec.trained is None:
                found = _train_and_evaluate(spec, folder, stopped, progress, checkpoint_seconds)
            else:
                found = _evaluate_trained(spec, results.run_folder(spec.trained.id), stopped, progress)
            # Again: some modules are only imported on the way.
            check_code(spec)
            outcome = {"status": FINISHED, **found}
        except StoppedError:
            return None
        except CannotWriteError:
            raise
        except DivergedError as error:
            outcome = {"status": DIVERGED, "error": str(error)}
        except CodeChangedError as error:
            outcome = {"status": FAILED, "error": str(error)}
        except Exception as error:
            logger.exception("run %s failed", spec.id)
            outcome = {
                "status": FAILED,
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc().splitlines()[-30:],
            }
        record = {**heading(spec), **outcome, "versions": versions()}
        with writing(results.lines):
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
        "label": spec.label,
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
        diagnosis = diagnose(model, task, rows=settings.evaluation_rows, batches=settings.probe_batches)
        following = range(settings.steps * settings.unroll, (settings.steps + 1) * settings.unroll)
        batches = [
            task.batch(seed=spec.seed, step=number, batch_size=settings.batch_size) for number in following
        ]
        gradients = memory_gradients(model, spec.model, spec.model_options, batches, training.memory)
    with writing(folder):
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
        "asked": final.asked,
        "memory_use": memory_use,
        "diagnostics": diagnosis.summaries,
        "weight_by_age": diagnosis.weight_by_age,
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
        "asked": final.asked,
        "memory_use": {},
    }


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
