"""What a task is: batches that are a pure function of (seed, step), and a scorer that tells by distance.

A new task is one file in `benchmarks/tasks` with a `Task` subclass; `list`, `compare` and the tests over all
tasks find it by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.groups import weights
from memory_models.lm import IGNORED_LABEL
from memory_models.options import check_types
from memory_models.registry import Named, Registry, nearest

IGNORED = IGNORED_LABEL
"""The label of a position at which nothing is asked."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model is given in one step, and what it is asked.

    Labels are aligned with the logits: `labels[b, t]` is the answer wanted from the output at `t`.
    """

    tokens: Tensor
    """int64 `[batch, time]`."""
    labels: Tensor
    """int64 `[batch, time]`, -100 where nothing is asked."""
    groups: Tensor
    """int64 `[batch, time]`, index into the task's `groups`, -1 where no group is scored."""
    reset: Tensor | None = None
    """bool `[batch]` or `[batch, time]`, true where a new document begins; None: nowhere."""
    mask: Tensor | None = None
    """bool `[batch, time]`, false at padding; None: no padding."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What the task's own scorer and oracle need, each `[batch, time]`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            groups=self.groups.to(device),
            reset=None if self.reset is None else self.reset.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            extras={name: tensor.to(device) for name, tensor in self.extras.items()},
        )

    @property
    def asked(self) -> int:
        """How many positions carry a label."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a result, and how to read it."""

    name: str
    """As in `Scorer.result`, for example `"accuracy/gap 3"`."""
    higher_is_better: bool
    unit: str = ""
    """For an axis: `"accuracy"`, `"bits per byte"`."""
    series: str | None = None
    """The curve this is a point of, in the order of `Task.metrics`; None: it stands alone."""

    @property
    def label(self) -> str:
        """What stands under the point on the axis: the name after its last slash."""
        return self.name.rpartition("/")[2]


class Scorer(ABC):
    """Adds up what a model answered, batch by batch; keeps only sums."""

    headline: str
    """The metric to look at first."""

    @abstractmethod
    def update(self, logits: Tensor, batch: Batch) -> None:
        """Count one batch.

        Args:
            logits: `[batch, time, vocab]` of any floating dtype, on any device.
            batch: what the model was given; may lie on another device than the logits.
        """

    @abstractmethod
    def result(self) -> dict[str, float]:
        """A value for every metric of the task; NaN where nothing was asked."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """For every metric, over how many answers (or bytes, or names) it was taken."""


class Task(ABC):
    """Something to learn that needs a memory.

    Args:
        config: an instance of the class's `Config`.
        cache: folder for what is expensive to prepare; None takes the user's cache folder. It never
            changes the data.
        options: fields of `Config`, in place of a whole one.

    Raises:
        TypeError: if there is no such option; the message names the nearest.
        ValueError: if an option has a value that makes no sense.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `memory-bench list`."""
    Config: ClassVar[type[Any]]
    """Frozen keyword-only dataclass: every setting that defines the data."""
    version: ClassVar[int] = 1
    """Raised by hand when the same settings come to mean other data or other scores."""
    streaming: ClassVar[bool]
    """False: a batch is whole sequences of several segments, each with a fresh memory. True: a batch is
    one segment of `batch_size` streams, and the memory is carried from step to step."""
    smoke: ClassVar[Mapping[str, Any]] = {}
    """Options under which the task is set up and evaluated in a second or two, for tests."""
    floor_is: ClassVar[str] = "best possible without memory"
    """What `floor` states, in words."""

    vocab_size: int
    segment_length: int
    groups: tuple[str, ...]
    """Names of the score groups in display order, nearest first."""
    metrics: tuple[Metric, ...]
    """Every figure of a result, in display order."""
    headline: str
    """The metric to look at first; also the scorer's."""

    def __init__(self, config: Any = None, *, cache: str | Path | None = None, **options: Any) -> None:
        if config is None:
            config = self.Config(**_known_options(type(self), options))
        elif options:
            raise TypeError(
                f"task {self.name!r} takes a config or single options ({', '.join(options)}), not both"
            )
        if not isinstance(config, self.Config):
            raise TypeError(f"task {self.name!r} takes a {self.Config.__name__}, not {type(config).__name__}")
        self.config = config
        self.cache = None if cache is None else Path(cache)

    @abstractmethod
    def batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        """Training batch number `step`: a pure function of the arguments and the configuration."""

    @abstractmethod
    def evaluation(self, *, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """The held-out set, the same every time; it shares nothing with training.

        Every batch has the same number of rows, `batch_size` or less. The first batch of a streaming task
        resets every row.
        """

    @abstractmethod
    def scorer(self) -> Scorer:
        """A fresh scorer."""

    @abstractmethod
    def oracle(self, batch: Batch) -> Tensor:
        """Logits `[batch, time, vocab]` that score perfectly."""

    @abstractmethod
    def floor(self) -> dict[str, float]:
        """What `floor_is` says, per metric."""

    @abstractmethod
    def chance(self) -> dict[str, float]:
        """What blind guessing scores, per metric."""

    def identity(self) -> dict[str, Any]:
        """Everything that defines the data, as plain values for JSON."""
        return dataclasses.asdict(self.config)

    def fingerprint(self) -> str:
        """Hash of everything that defines the data and its scores."""
        parts = {"task": self.name, "version": self.version, **self.identity()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, str | int | float]:
        """Figures about the data that a report should state."""
        return {}

    def keep(self, folder: Path) -> None:  # noqa: B027 - most tasks have nothing to keep
        """Copy into a run's folder what one needs to use its trained model elsewhere."""

    def metric(self, name: str) -> Metric:
        """The metric called `name`.

        Raises:
            LookupError: if the task has none of that name.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        known = nearest(name, [metric.name for metric in self.metrics])
        raise LookupError(f"task {self.name!r} has no metric {name!r}. {known}")


def stable_seed(*parts: str | int) -> int:
    """A 64-bit seed that depends on all parts and is the same in every process and on every machine."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*parts: str | int) -> np.random.Generator:
    """A random generator of its own for each combination of parts: task, split, seed, step."""
    return np.random.Generator(np.random.Philox(key=stable_seed(*parts)))


def one_hot_logits(answers: Tensor, vocab_size: int) -> Tensor:
    """Logits `[..., vocab_size]` that are sure of `answers`, and uniform where an answer is negative."""
    logits = torch.zeros(*answers.shape, vocab_size)
    sure = torch.where(answers >= 0, 100.0, 0.0).unsqueeze(-1)
    return logits.scatter_(-1, answers.clamp(min=0).unsqueeze(-1), sure)


class AccuracyScorer(Scorer):
    """Share of answers whose largest logit is the label, by group.

    Its metrics are those of `accuracy_metrics`: one per group, and the mean and the worst over the groups
    that need a memory, in which each group counts the same unless it is rarely asked (`benchmarks.groups`).
    """

    headline = "mean accuracy"

    def __init__(self, groups: Sequence[str], distant: Sequence[int]) -> None:
        self._groups = tuple(groups)
        self._distant = list(distant)
        self._right = torch.zeros(len(groups), dtype=torch.float64)
        self._asked = torch.zeros(len(groups), dtype=torch.float64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        labels, groups = batch.labels.to(logits.device), batch.groups.to(logits.device)
        counted = (labels != IGNORED) & (groups >= 0)
        right = logits[counted].argmax(-1) == labels[counted]
        index = groups[counted]
        size = len(self._groups)
        self._right += torch.bincount(index, right.double(), minlength=size).cpu()
        self._asked += torch.bincount(index, minlength=size).cpu()

    def result(self) -> dict[str, float]:
        values = (self._right / self._asked).tolist()
        return accuracies(self._groups, values, self._distant, self._asked.tolist())

    def counts(self) -> dict[str, int]:
        asked = [int(count) for count in self._asked.tolist()]
        counts = {f"accuracy/{group}": count for group, count in zip(self._groups, asked, strict=True)}
        total = sum(asked[i] for i in self._distant)
        return {**counts, "mean accuracy": total, "worst accuracy": total}


def accuracies(
    groups: Sequence[str],
    values: Sequence[float],
    distant: Sequence[int],
    asked: Sequence[float] | None = None,
) -> dict[str, float]:
    """A value per group, NaN where nothing was asked; mean and worst of those that need a memory.

    Args:
        groups: names.
        values: accuracy of each group.
        distant: places of the groups that need a memory.
        asked: questions of each group; None: as many in each. They weigh the mean (see `benchmarks.groups`);
            a group that counts less than half is not taken for the worst.
    """
    by_group = {f"accuracy/{group}": value for group, value in zip(groups, values, strict=True)}
    # In long sequences the longest gaps may never occur.
    far = [i for i in distant if not np.isnan(values[i])]
    if not far:
        return {**by_group, "mean accuracy": np.nan, "worst accuracy": np.nan}
    found = np.array([values[i] for i in far])
    weight = weights([1.0 if asked is None else asked[i] for i in far])
    mean, worst = float(np.average(found, weights=weight)), float(found[weight >= 0.5].min())
    return {**by_group, "mean accuracy": mean, "worst accuracy": worst}


def accuracy_metrics(groups: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of `AccuracyScorer`; groups such as `"rewritten/gap 1"` form a curve a first part."""
    curve = [
        Metric(
            name=f"accuracy/{group}",
            higher_is_better=True,
            unit="accuracy",
            series=", ".join(["accuracy", *group.split("/")[:-1]]),
        )
        for group in groups
    ]
    single = [
        Metric(name=name, higher_is_better=True, unit="accuracy")
        for name in ("mean accuracy", "worst accuracy")
    ]
    return (*curve, *single)


def create_task(name: str, *, cache: str | Path | None = None, **options: Any) -> Task:
    """The task called `name`, or `"package.module:Class"`.

    Args:
        name: as in `tasks.names()`.
        cache: folder for what is expensive to prepare.
        options: fields of the task's `Config`.

    Raises:
        LookupError: if there is no such task; the message names the nearest.
        TypeError: if the task has no such option; the message names the nearest.
        ValueError: if an option has a value that makes no sense.
    """
    return tasks.load(name)(cache=cache, **options)


def option_names(task_class: type[Task]) -> tuple[str, ...]:
    """Fields of the task's `Config`."""
    return tuple(option.name for option in dataclasses.fields(task_class.Config))


def _known_options(task_class: type[Task], options: dict[str, Any]) -> dict[str, Any]:
    known = option_names(task_class)
    for option in options:
        if option not in known:
            raise TypeError(f"task {task_class.name!r} has no option {option!r}. {nearest(option, known)}")
    check_types(task_class.Config, options)
    return options


def find_tasks() -> Iterator[Named]:
    """Each class with a name of its own in a file of `benchmarks/tasks`."""
    from benchmarks import tasks as folder

    for file in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{file.name}")
        for found in vars(module).values():
            own = isinstance(found, type) and issubclass(found, Task) and found.__module__ == module.__name__
            if own and "name" in vars(found):
                yield Named(found.name, f"{module.__name__}:{found.__name__}")


tasks: Registry[Named] = Registry("task", group="memory_models.tasks", find=find_tasks)
