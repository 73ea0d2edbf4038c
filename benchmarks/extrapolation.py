"""Longer than trained: a model trained at S segments, evaluated at 2, 4, 8, 16 times as many.

A task is lengthened by its option `segments`. Where a sequence must not use a key or a name twice, a longer
one needs more of them, so the model is trained with as many as the longest asks for: the vocabulary is then
the same at all lengths. A task of another make says by itself how it grows, with

    @classmethod
    def longer(cls, options: Mapping[str, Any], factor: int) -> dict[str, Any]

which returns its options at `factor` times the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.settings import RunSpec, cached_task, evaluation_of, setting_of
from benchmarks.task import Task, tasks

LENGTH = "segments"
# By task: the option that must have room for every segment, and how many of it a segment uses.
ROOM = {"recall": ("keys", "writes"), "copy": ("names", "sequences"), "reverse": ("names", "sequences")}


@dataclass(frozen=True, kw_only=True)
class LongerPoint:
    """A trained model at another length."""

    factor: int
    spec: RunSpec


def training_assignments(task: str, factors: Sequence[int], options: Mapping[str, Any]) -> list[str]:
    """What the training must be given so that its model can be evaluated at these lengths, as for `--set`.

    Args:
        task: name of the task.
        factors: how many times longer.
        options: the task's options, where they differ from its defaults.

    Raises:
        ValueError: if a factor is less than 2, or the task cannot be lengthened.
    """
    if not factors or min(factors) < 2:
        raise ValueError(
            f"factors {list(factors)} must all be at least 2, for 1 is the training's own length"
        )
    config = cached_task(task, options).config
    if not _own_way(task) and not hasattr(config, LENGTH):
        raise ValueError(
            f"task {task!r} cannot be lengthened: it has no option {LENGTH!r} and no method 'longer' "
            "(see benchmarks.extrapolation)"
        )
    if task not in ROOM:
        return []
    name, used = ROOM[task]
    needed = max(factors) * getattr(config, LENGTH) * getattr(config, used)
    return [f"task.{name}={needed}"] if needed > getattr(config, name) else []


def longer_points(specs: Sequence[RunSpec], factors: Sequence[int]) -> list[LongerPoint]:
    """The runs that evaluate the models of `specs` on longer sequences, and `specs` themselves as factor 1.

    The models keep the memory they have; `full`, which by its meaning sees everything, sees more of it.

    Raises:
        ValueError: if a longer sequence would need another model: other tokens, or other segments.
    """
    points = [LongerPoint(factor=1, spec=spec) for spec in specs]
    for factor in sorted(set(factors)):
        points += [LongerPoint(factor=factor, spec=_longer(spec, factor)) for spec in specs]
    return points


def to_json(points: Sequence[LongerPoint]) -> list[dict[str, Any]]:
    """For the report."""
    return [{"id": p.spec.id, "model": p.spec.label, "seed": p.spec.seed, "factor": p.factor} for p in points]


def _longer(spec: RunSpec, factor: int) -> RunSpec:
    own = _own_way(spec.task)
    trained = cached_task(spec.task, spec.task_options)
    if own is not None:
        options = dict(own(spec.task_options, factor))
    else:
        options = {**spec.task_options, LENGTH: factor * getattr(trained.config, LENGTH)}
    task = cached_task(spec.task, options)
    for name in ("vocab_size", "segment_length"):
        before, after = getattr(trained, name), getattr(task, name)
        if before != after:
            raise ValueError(
                f"task {spec.task!r} at {factor} times the length has {name} {after} instead of {before}, "
                "which would need another model"
            )
    model = dict(spec.model_options)
    if spec.model == "full":
        model["context"] = factor * setting_of(spec, "model.context")
    point = dataclasses.replace(
        spec, model_options=model, task_options=options, fingerprint=task.fingerprint()
    )
    return evaluation_of(spec, point)


def _own_way(task: str) -> Any:
    kind: type[Task] = tasks.load(task)
    return getattr(kind, "longer", None)
