"""One model over the values of some of its options: a curve, a grid, an ablation.

Each point is a run like any other, with an id and a line in the results: skipped when it is finished, gone on
with when it was interrupted. A point is `trained` if a model is trained with the point's values, and
`evaluated` if one trained model, that of the settings without the varied values, is evaluated with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.results import FINISHED, Record, Results, plain, write_json

if TYPE_CHECKING:
    from benchmarks.progress import Display
    from benchmarks.settings import RunSpec

TRAINED, EVALUATED = "trained", "evaluated"
MODES = {"train": (TRAINED,), "evaluate": (EVALUATED,), "both": (TRAINED, EVALUATED)}


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option that a sweep varies.

    Attributes:
        name: as in `--set`, with or without its scope.
        texts: the values as they were typed.
        values: what they mean.
    """

    name: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def short(self) -> str:
        """The name without its scope."""
        return self.name.rpartition(".")[2]

    @property
    def labels(self) -> tuple[str, ...]:
        """The values for reading."""
        return tuple(label(value) for value in self.values)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of a sweep: where it stands among the values of each option, and how it came about."""

    spec: RunSpec
    place: tuple[int, ...]
    how: str


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All runs of a sweep.

    Attributes:
        options: what is varied; the first along the axis of a picture.
        points: a run for each combination of values, seed and way.
        bases: the runs whose weights are evaluated, one for each seed; empty if none are.
        bases_have: the values that the varied options have in `bases`, for reading.
    """

    options: tuple[Option, ...]
    points: tuple[Point, ...]
    bases: tuple[RunSpec, ...]
    bases_have: tuple[str, ...]

    @property
    def trainings(self) -> list[RunSpec]:
        """The runs that train."""
        return _distinct([*self.bases, *(p.spec for p in self.points if p.spec.trained is None)])

    @property
    def evaluations(self) -> list[RunSpec]:
        """The runs that evaluate what others have trained."""
        return _distinct([p.spec for p in self.points if p.spec.trained is not None])

    def names(self) -> dict[str, str]:
        """By run id, what to call a run while it works."""
        found = {spec.id: f"{spec.model} as it is seed {spec.seed}" for spec in self.bases}
        for point in self.points:
            values = ", ".join(
                f"{option.short} {option.labels[place]}"
                for option, place in zip(self.options, point.place, strict=True)
            )
            how = " evaluated" if point.spec.trained else ""
            found[point.spec.id] = f"{values}{how} seed {point.spec.seed}"
        return found


def parse_option(text: str) -> Option:
    """Read `"memories=0,64,256"`; values are written as for `--set`, tuples in brackets.

    Raises:
        ValueError: if there is no `=`, no value, or an empty one.
    """
    from benchmarks.settings import value_of

    name, equals, rest = text.partition("=")
    texts = [part.strip() for part in _split(rest)]
    if not equals or not name or not all(texts):
        raise ValueError(f"{text!r} is not of the form option=value,value such as memories=64,256")
    # 64 and 64.0 are written differently and mean different things to a model; True is not 1.
    different = {repr(value_of(part)): part for part in reversed(texts)}
    kept = [part for part in texts if different.pop(repr(value_of(part)), None) is not None]
    return Option(name=name, texts=tuple(kept), values=tuple(value_of(part) for part in kept))


def plan_sweep(
    model: str,
    task: str,
    vary: Sequence[str],
    seeds: Sequence[int],
    *,
    mode: str = "train",
    smoke: bool = False,
    assignments: Sequence[str] = (),
) -> SweepPlan:
    """All combinations of the values in `vary`, for each seed.

    Args:
        model: name of the member.
        task: name of the task.
        vary: options and their values, as `parse_option` reads them.
        seeds: seeds of each point.
        mode: `train` a model for each point, `evaluate` one trained model at each point, or `both`.
        smoke: tiny sizes and few steps.
        assignments: settings common to all points, as for `plan`. With those the evaluated model is trained.

    Raises:
        LookupError: if the model or the task is unknown.
        TypeError, ValueError: if an option or a value is refused, the model cannot be built with it, or a
            trained model's weights would not fit.
    """
    from benchmarks.settings import evaluation_of, plan, setting_of

    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    options = tuple(parse_option(text) for text in vary)
    if not options or not seeds:
        raise ValueError("nothing to do: give at least one option with values and one seed")
    short = [option.short for option in options]
    if len(set(short)) < len(short):
        raise ValueError(f"an option is varied twice ({', '.join(short)}); give its values together")
    seeds = list(dict.fromkeys(seeds))

    def planned(seed: int, changes: Sequence[str] = ()) -> RunSpec:
        return plan(model, task, seed, smoke=smoke, assignments=[*assignments, *changes])

    # Names first: what is wrong with one is best said by the plan.
    planned(seeds[0], [f"{option.name}={option.texts[0]}" for option in options])
    bases = {seed: planned(seed) for seed in seeds}
    usual = [setting_of(bases[seeds[0]], option.name) for option in options]
    points = []
    for how in MODES[mode]:
        for place in itertools.product(*(range(len(option.values)) for option in options)):
            # A value that is there anyway is no change: the point is the run that a comparison has made.
            changes = [
                f"{option.name}={option.texts[i]}"
                for option, i, value in zip(options, place, usual, strict=True)
                if repr(plain(option.values[i])) != repr(plain(value))
            ]
            for seed in seeds:
                spec = planned(seed, changes)
                if how == EVALUATED:
                    spec = evaluation_of(bases[seed], spec)
                points.append(Point(spec=spec, place=place, how=how))
            _check_builds(points[-1].spec, changes)
    evaluated = EVALUATED in MODES[mode]
    return SweepPlan(
        options=options,
        points=tuple(points),
        bases=tuple(bases.values()) if evaluated else (),
        bases_have=tuple(label(value) for value in usual) if evaluated else (),
    )


def run_sweep(
    plan: SweepPlan,
    results: Results,
    *,
    jobs: int,
    display: Callable[[], Display],
    checkpoint_seconds: float = 20.0,
) -> list[Record]:
    """Do all runs that are not finished: first those that train, then those that evaluate.

    Args:
        plan: what to run.
        results: where to keep it.
        jobs: processes at once.
        display: makes what is told of everything that happens, once for each of the two rounds.
        checkpoint_seconds: how much work an interruption may cost.

    Returns:
        The last line of every run that was tried. One whose trained model failed is not.

    Raises:
        InterruptedComparison, CannotWriteError, ValueError: as `compare`.
    """
    from benchmarks.compare import compare

    def do(specs: Sequence[RunSpec]) -> list[Record]:
        # Of runs that are guessed to take equally long, `compare` takes the first: values mostly ascend, and
        # what they cost with them.
        return compare(
            specs[::-1],
            results,
            jobs=jobs,
            display=display(),
            checkpoint_seconds=checkpoint_seconds,
            names=plan.names(),
        )

    records = do(plan.trainings)
    trained = {record["id"] for record in records if record["status"] == FINISHED}
    able = [spec for spec in plan.evaluations if spec.trained is not None and spec.trained.id in trained]
    return [*records, *(do(able) if able else [])]


def write_sweep(plan: SweepPlan, results: Results, command: str) -> None:
    """Note which runs belong together, for the report."""
    first = plan.points[0].spec
    write_json(
        results.sweep,
        {
            "task": first.task,
            "model": first.label,
            "command": command,
            "options": [{"name": o.name, "texts": o.texts, "values": o.values} for o in plan.options],
            "bases": [{"id": spec.id, "seed": spec.seed} for spec in plan.bases],
            "bases_have": plan.bases_have,
            "points": [
                {"id": point.spec.id, "seed": point.spec.seed, "place": point.place, "how": point.how}
                for point in plan.points
            ],
        },
    )


def label(value: Any) -> str:
    """A value for reading: `4,096`, `true`, `none`, `(-1, 2)`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(label(item) for item in value)})"
    return str(value)


def _split(text: str) -> list[str]:
    """At the commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _distinct(specs: Sequence[RunSpec]) -> list[RunSpec]:
    return list({spec.id: spec for spec in specs}.values())


def _check_builds(spec: RunSpec, changes: Sequence[str]) -> None:
    """Build the model now: a value that cannot work shall be heard of before hours of training."""
    from benchmarks.evaluate import check_weights_fit
    from benchmarks.members import build_model
    from benchmarks.settings import cached_task

    def built(of: RunSpec) -> Any:
        task = cached_task(of.task, of.task_options)
        return build_model(of.model, of.model_options, task.vocab_size)

    try:
        model = built(spec)
        if spec.trained is not None:
            check_weights_fit(model, built(spec.trained))
    except (TypeError, ValueError) as error:
        way = "; train one model for each value (--mode train)" if spec.trained is not None else ""
        raise ValueError(f"{' '.join(changes) or spec.model}: {error}{way}") from error
