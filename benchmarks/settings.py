"""What a run is made with: `plan` makes a `RunSpec` of `benchmarks.defaults` and of what the user says.

A `RunSpec` holds everything that changes the numbers of a run, and therefore names it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.defaults import (
    COST,
    EVERY,
    OPTIONS,
    SMOKE_OPTIONS,
    SMOKE_TRAINING,
    TRAINING,
    UNKNOWN_COST,
)
from benchmarks.members import build_model, code_digest, known_options
from benchmarks.provenance import version_of
from benchmarks.results import plain, run_id
from memory_models.lm import MemoryLM
from memory_models.models import check_options, config_fields
from memory_models.options import check_types
from memory_models.registry import nearest

if TYPE_CHECKING:
    from benchmarks.task import Task


logger = logging.getLogger(__name__)


class CodeChangedError(RuntimeError):
    """The code or a library is not what the run was planned with."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one model is trained and evaluated."""

    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 32
    """Rows: sequences of a step, or streams carried from step to step."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    warmup: int = 50
    """Steps of linear warm-up; never more than a quarter of all steps."""
    decay: float = 1.0
    """Share of the steps, at the end, over which a cosine lowers the learning rate."""
    final: float = 0.02
    """Share of the peak learning rate that is left at the end."""
    weight_decay: float = 0.01
    """Decay of matrices; embeddings, norms and scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    evaluation_rows: int = 128
    """Rows evaluated at once."""
    curve_points: int = 8
    """Evaluations during training, on the first few evaluation batches."""
    curve_batches: int = 1
    """Evaluation batches of a point of the learning curve."""
    probe_batches: int = 1
    """Evaluation batches of each test of whether the memory is used."""
    unroll: int = 1
    """Streams: segments read before each optimiser step, through which the gradient flows."""
    gradient: str = "bptt"
    """How it flows through segments: "bptt", or "replay" (memory replay, one segment's activations)."""
    threads: int = 1
    """Threads of a run; two runs at once with one thread each are the best use of two cores."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "evaluation_rows",
            "curve_batches",
            "probe_batches",
            "unroll",
            "threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("warmup", "curve_points", "weight_decay", "final"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if self.gradient not in ("bptt", "replay"):
            raise ValueError(f"gradient ({self.gradient!r}) must be 'bptt' or 'replay'")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay ({self.decay}) must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run: everything that changes its numbers."""

    model: str
    """Name of the member."""
    task: str
    """Name of the task."""
    seed: int
    """Seed of the weights and of the order of the data."""
    train: TrainSettings
    """How it is trained."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Options given to `create_lm`."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the task's config that differ from its defaults; the id has their `fingerprint`."""
    fingerprint: str = ""
    """Hash of the task's data."""
    code: str = ""
    """Hash of the code that is trained and that trains it."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that compute."""
    variant: str = field(default="", compare=False)
    """The assignments that came with the model's name, as `gradient=replay`, which tell rows of a table
    apart. What they change is in the other fields: runs that differ in nothing else are one run."""
    trained: RunSpec | None = None
    """A finished run of the same results folder whose weights are evaluated with these options of the model
    and the task, without training; None: train."""

    @property
    def id(self) -> str:
        """Name of the run: a hash of all the fields, the task standing for its data wherever they lie."""
        fields = dataclasses.asdict(self)
        del fields["task_options"], fields["trained"], fields["variant"]
        if self.trained is not None:
            fields["trained"] = self.trained.id
        return run_id(fields)

    @property
    def label(self) -> str:
        """Name of its row in a table."""
        return f"{self.model} {self.variant}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; `from_json` gives the same spec with the same id."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSpec:
        """The spec that `to_json` described."""
        train = {**data["train"], "betas": tuple(data["train"]["betas"])}
        trained = data.get("trained")
        return cls(
            **{
                **data,
                "train": TrainSettings(**train),
                "trained": None if trained is None else cls.from_json(trained),
            }
        )


def plan(
    model: str,
    task: str,
    seed: int,
    *,
    smoke: bool = False,
    assignments: Sequence[str] = (),
    check: bool = True,
) -> RunSpec:
    """Look up the settings of `model` on `task`, and put `assignments` such as `"steps=100"` on top.

    The model's name may be followed by assignments of its own, `"memformer gradient=replay"`; those of
    `assignments` are put on top of them.

    An assignment names a training setting, an option of the task, or an option of the model, in this
    order; `train.`, `task.` or `model.` before the name makes it certain.

    Unless `check` is false the model is built, without weights, to hear now what it refuses.

    Raises:
        LookupError: if the model or the task is unknown.
        TypeError, ValueError: if an assignment has no `=`, or its name or value is refused.
    """
    from benchmarks.task import tasks

    kind = tasks.load(task)
    model, *own = _words(model)
    train, task_options, model_options = _sort_assignments(kind, known_options(model), [*own, *assignments])
    chosen = task_options
    if smoke:
        task_options = {**kind.smoke, **task_options}
    with _naming(f"task {task!r}", chosen):
        built = cached_task(task, task_options)
    table = TRAINING.get(task, {})
    settings = {
        **table.get(EVERY, {}),
        **table.get(model, {}),
        **(SMOKE_TRAINING if smoke else {}),
        **train,
    }
    options = _model_options(model, task, built, smoke=smoke, chosen=model_options)
    if check:
        with _naming(f"model {model!r}", {**chosen, **model_options}):
            _check_builds(model, options, built.vocab_size)
    return RunSpec(
        model=model,
        task=task,
        seed=seed,
        train=_replace(TrainSettings(), settings),
        model_options=options,
        task_options=task_options,
        fingerprint=built.fingerprint(),
        code=_code_of(model, task),
        libraries=_libraries(),
        variant=" ".join(own),
    )


def check_code(spec: RunSpec) -> None:
    """Refuse to do the run with other code or libraries than those that its id stands for.

    The files are read again: in a process that was started to do the run they may be other ones than those
    that the run was planned with.

    Raises:
        CodeChangedError: if they are.
    """
    code, libraries = _code_of(spec.model, spec.task, afresh=True), _libraries()
    # A spec that was not planned may say nothing of them.
    others = {name: libraries[name] for name in spec.libraries if name in libraries}
    if spec.code not in ("", code) or others != spec.libraries:
        raise CodeChangedError(
            "the code changed since this run was planned, or a library, so its numbers would be filed under "
            "the name of other code; give the same command again"
        )


def applicable(model: str, task: str, assignments: Sequence[str]) -> list[str]:
    """Those of the assignments that are no options of other models only.

    Raises:
        LookupError: if the model or the task is unknown.
    """
    from benchmarks.task import tasks

    kind, known = tasks.load(task), known_options(model)

    def applies(assignment: str) -> bool:
        try:
            _, _, of_model = _sort_assignments(kind, known, [assignment])
        except ValueError:
            return False
        return of_model.keys() <= known

    return [assignment for assignment in assignments if applies(assignment)]


def relative_cost(spec: RunSpec) -> float:
    """A guess of how long the run takes, to start long ones first."""
    return COST.get(spec.model, UNKNOWN_COST) * spec.train.steps


def cached_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task with these options, made once in a process: making it may mean reading a corpus.

    Raises:
        LookupError, TypeError, ValueError: as `create_task`.
    """
    return _make_task(name, json.dumps(plain(options), sort_keys=True))


@functools.lru_cache(maxsize=4)
def _make_task(name: str, options: str) -> Task:
    from benchmarks.task import create_task

    return create_task(name, **json.loads(options))


def evaluation_of(trained: RunSpec, point: RunSpec) -> RunSpec:
    """The run that evaluates the weights of `trained` with the options of `point`.

    It is `trained` itself if the two do not differ.

    Raises:
        ValueError: if the two differ in more than options of the model and the task.
    """
    if trained.id == point.id:
        return trained
    changed = _changes("train", dataclasses.asdict(trained.train), dataclasses.asdict(point.train))
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changes the training, so a model that is trained already cannot be "
            "evaluated with it; train one for each value"
        )
    if (trained.model, trained.task, trained.seed) != (point.model, point.task, point.seed):
        raise ValueError("a trained model is evaluated with its own model, task and seed")
    return dataclasses.replace(point, trained=trained)


def command_of(spec: RunSpec) -> str:
    """The command that does this run again: the settings that differ from today's are spelt out."""
    base = spec.trained or spec
    changes = _changes_from(plan(base.model, base.task, base.seed, check=False), base)
    words = ["--model", base.model, "--task", base.task]
    if spec.trained is None:
        words = ["run", *words, "--seed", str(base.seed)]
    else:
        varied = _changes_from(base, dataclasses.replace(spec, trained=None), changes)
        words = ["sweep", *words, "--vary", *varied, "--mode", "evaluate", "--seeds", str(base.seed)]
    return shlex.join(["memory-bench", *words, *(["--set", *changes] if changes else [])])


def setting_of(spec: RunSpec, name: str) -> Any:
    """The value that the run has for a setting called as in an assignment, its default included.

    Raises:
        ValueError: if neither training, task nor model has such a setting.
    """
    from benchmarks.task import tasks

    kind = tasks.load(spec.task)
    of_train, of_task, of_model = _sort_assignments(kind, known_options(spec.model), [f"{name}=None"])
    for own in of_train:
        return getattr(spec.train, own)
    for own in of_task:
        return getattr(cached_task(spec.task, spec.task_options).config, own)
    [own] = of_model
    of_lm = inspect.signature(MemoryLM.__init__).parameters
    defaults = {option: parameter.default for option, parameter in of_lm.items()}
    return {**defaults, **config_fields(spec.model), **spec.model_options}[own]


def value_of(text: str) -> Any:
    """What the text after the `=` of an assignment means: a number, a tuple, true, false, none or itself."""
    return _value(text)


def _code_of(model: str, task: str, *, afresh: bool = False) -> str:
    from benchmarks.task import tasks

    return code_digest(model, "benchmarks.train", tasks.load(task).__module__, afresh=afresh)


def _libraries() -> dict[str, str]:
    return {name: version_of(name) for name in ("torch", "x-transformers")}


def _words(model: str) -> list[str]:
    words = model.split()
    if not words:
        raise LookupError("the name of a model is empty")
    return words


def _changes_from(usual: RunSpec, wanted: RunSpec, before: Sequence[str] = ()) -> list[str]:
    """Assignments that turn `usual`, itself made by those in `before`, into `wanted`."""
    of_task = _changes("task", usual.task_options, wanted.task_options)
    if of_task:
        # The task has a say in the model's options: what follows from it is not spelt out.
        usual = plan(usual.model, usual.task, usual.seed, assignments=[*before, *of_task], check=False)
    return [
        *_changes("train", dataclasses.asdict(usual.train), dataclasses.asdict(wanted.train)),
        *of_task,
        *_changes("model", usual.model_options, wanted.model_options),
    ]


def _changes(scope: str, usual: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    # As plain JSON: a record that was read back has lists where the tables have tuples.
    usual = plain(usual)
    changed = {
        name: value for name, value in plain(wanted).items() if name not in usual or usual[name] != value
    }
    return [f"{scope}.{name}={_text(value)}" for name, value in changed.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and _value(value) == value else repr(value)


def _sort_assignments(
    task: type[Task], model_names: set[str], assignments: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    from benchmarks.task import option_names

    train: dict[str, Any] = {}
    of_task: dict[str, Any] = {}
    model: dict[str, Any] = {}
    scopes = {"train": train, "task": of_task, "model": model}
    names = [
        (train, {f.name for f in dataclasses.fields(TrainSettings)}),
        (of_task, set(option_names(task))),
        (model, model_names),
    ]
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"{assignment!r} is not of the form key=value, such as steps=100")
        scope, dot, rest = name.partition(".")
        if dot and scope in scopes:
            scopes[scope][rest] = _value(text)
            continue
        for settings, known in names:
            if name in known:
                settings[name] = _value(text)
                break
        else:
            every = set().union(*(known for _, known in names))
            raise ValueError(f"neither training, task nor model has {name!r}. {nearest(name, every)}")
    return train, of_task, model


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _replace(settings: TrainSettings, changes: Mapping[str, Any]) -> TrainSettings:
    names = {f.name for f in dataclasses.fields(TrainSettings)}
    for name in changes:
        if name not in names:
            raise ValueError(f"no training setting {name!r}. {nearest(name, names)}")
    check_types(TrainSettings, changes)
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def _naming(what: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Say with which options it was that something went wrong: Python's own messages do not."""
    try:
        yield
    except (TypeError, ValueError) as error:
        named = ", ".join(f"{name}={value!r}" for name, value in options.items())
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}{' with ' * bool(named)}{named}: {error}") from error


def _check_builds(model: str, options: Mapping[str, Any], vocab_size: int) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                build_model(model, options, vocab_size)
            return
        except Exception as refusal:
            # Or it cannot do without memory, which is no fault of its options.
            logger.debug("%s cannot be built without memory: %s", model, refusal)
        try:
            build_model(model, options, vocab_size)
        except (TypeError, ValueError):
            raise
        except Exception as error:
            raise ValueError(f"it cannot be built: {type(error).__name__}: {error}") from error


def _model_options(
    model: str, task: str, built: Task, *, smoke: bool, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    table = OPTIONS.get(task, OPTIONS[EVERY])
    known = known_options(model)
    common = {
        "segment_length": built.segment_length,
        **table.get(EVERY, {}),
        **(SMOKE_OPTIONS if smoke else {}),
    }
    own = {
        name: value for name, value in table.get(model, {}).items() if not (smoke and name in SMOKE_OPTIONS)
    }
    # What every model gets is a wish, for a plug-in need not have it all. The model's own options and the
    # user's are meant, and a wrong one must be heard of.
    options = {name: value for name, value in common.items() if name in known} | own | dict(chosen)
    for name in options:
        if name not in known:
            raise ValueError(f"model {model!r} has no option {name!r}. {nearest(name, known)}")
    # Here, because a "no" that a model took for a yes would be trained for hours.
    check_options(model, options)
    return options
