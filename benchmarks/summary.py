"""What the runs of a results folder say together: the models of a comparison and their figures over seeds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.labels import rows_of
from benchmarks.results import FINISHED, Record, Results, read_json

SEEDS_FOR_INTERVAL = 3
# Two-sided 95 % points of Student's t for 2, 3, ... degrees of freedom.
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_INTERVAL, BOOTSTRAP = "t", "bootstrap"
INTERVALS = (T_INTERVAL, BOOTSTRAP)
# As many values as can be drawn in every way (5 ** 5 ways); beyond, so many drawings of a fixed seed.
_ALL_WAYS = 5
_DRAWINGS = 10_000


class NothingToReportError(ValueError):
    """The folder holds no run."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value over seeds."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval by Student's t; None below three seeds."""
    count: int
    values: tuple[float, ...] = field(default=(), compare=False, repr=False)
    """The single values, from which the bootstrap interval is taken."""
    interval: str = T_INTERVAL
    """Which interval to show, one of `INTERVALS`."""
    missing: int = 0
    """Seeds that have no value, or none that is finite."""

    @classmethod
    def of(cls, values: Iterable[float | None], *, interval: str = T_INTERVAL) -> Figure | None:
        """Of the values that are there; None if none is."""
        values = list(values)
        found = [value for value in values if value is not None and math.isfinite(value)]
        if not found:
            return None
        half = None
        if len(found) >= SEEDS_FOR_INTERVAL:
            half = _t95(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
        return cls(
            mean=statistics.fmean(found),
            half_width=half,
            count=len(found),
            values=tuple(found),
            interval=interval,
            missing=len(values) - len(found),
        )

    @property
    def bootstrap(self) -> tuple[float, float] | None:
        """The 95 % interval of `bootstrap_interval`; None below three seeds."""
        return bootstrap_interval(self.values) if len(self.values) >= SEEDS_FOR_INTERVAL else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Ends of the interval to show; None below three seeds."""
        if self.interval == BOOTSTRAP:
            return self.bootstrap
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def _t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t; beyond the list by its expansion in 1 / freedom.

    (Abramowitz and Stegun, 26.7.5; right to .001 from 16 degrees on.)
    """
    if freedom - 2 < len(_T95):
        return _T95[freedom - 2]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


@functools.lru_cache(maxsize=4096)
def bootstrap_interval(values: tuple[float, ...]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean (Efron 1979), the same whenever it is asked for.

    Up to five values are drawn, with replacement, in every way there is, so that nothing is left to chance.
    Of three values it is their range, for all three drawings of the lowest alone are likelier than 2.5 %;
    it then holds the middle of the values' distribution in three of four cases, not in 95 of 100. Student's t
    holds the mean in 95 of 100 if the values are normal, which accuracies near 1 are not.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    if len(values) <= _ALL_WAYS:
        means = np.sort([statistics.fmean(drawn) for drawn in itertools.product(values, repeat=len(values))])
    else:
        drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWINGS, len(values)))
        means = np.sort(np.asarray(values)[drawn].mean(1))
    # The smallest mean below which no more than 2.5 % of all lie, and its like from above.
    skipped = math.floor(0.025 * len(means))
    return float(means[skipped]), float(means[-1 - skipped])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: its runs and what they say together."""

    model: str
    records: tuple[Record, ...]
    interval: str = T_INTERVAL
    """Which interval its figures show, one of `INTERVALS`."""

    @property
    def finished(self) -> tuple[Record, ...]:
        """The runs that ended well."""
        return tuple(record for record in self.records if record["status"] == FINISHED)

    @property
    def control(self) -> bool:
        """Whether the model is there for comparison only."""
        return "control" in self.records[0].get("tags", ())

    def figure(self, *path: str) -> Figure | None:
        """Over the seeds, the entry of the record that lies at `path`."""
        values = []
        for record in self.finished:
            value: Any = record
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            values.append(value)
        return Figure.of(values, interval=self.interval)

    @property
    def status(self) -> str:
        """Empty if all is well, else what happened to how many runs."""
        bad = [record["status"] for record in self.records if record["status"] != FINISHED]
        if not bad:
            return ""
        kinds = " and ".join(sorted(set(bad)))
        return kinds if len(self.records) == 1 else f"{len(bad)} of {len(self.records)} {kinds}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a report says.

    Attributes:
        task: name of the task.
        facts: what the records say of the task (see `benchmarks.train.describe_task`); empty if no run
            ended well.
        rows: the models, families first.
        missing: runs that belong here and have not ended yet, as `model seed n`.
        attempts: failed lines of runs that ended well later.
        command: what made the comparison.
        match: on what terms the models were made equal (`benchmarks.match`); empty if they were not.
        tuning: how the learning rates were chosen (`benchmarks.tuning`); empty if they were not.
        longer: the runs evaluated on longer sequences, a row for each model and factor.
        trials: the runs that tried a learning rate.
    """

    task: str
    facts: dict[str, Any]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    attempts: tuple[Record, ...]
    command: str
    match: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    longer: dict[str, dict[int, Row]] = field(default_factory=dict)
    trials: tuple[Record, ...] = ()

    @property
    def interval(self) -> str:
        """Which interval the figures show, one of `INTERVALS`."""
        return self.rows[0].interval if self.rows else T_INTERVAL

    @property
    def headline(self) -> str:
        """The metric to look at first."""
        return self.facts.get("headline", "")

    @property
    def failures(self) -> list[Record]:
        """Runs whose last word is a failure, on longer sequences and in trials of rates too."""
        longer = [
            record
            for rows in self.longer.values()
            for factor, row in rows.items()
            if factor != 1  # that is the run in `rows`
            for record in row.records
        ]
        records = [*(record for row in self.rows for record in row.records), *longer, *self.trials]
        return [record for record in records if record["status"] != FINISHED]

    def series(self) -> dict[str, list[dict[str, Any]]]:
        """The metrics that form a curve, by the name of the curve; the headline's own curve first."""
        curves: dict[str, list[dict[str, Any]]] = {}
        for metric in self.facts.get("metrics", ()):
            if metric.get("series"):
                curves.setdefault(metric["series"], []).append(metric)
        kind = self.headline.partition("/")[0]
        first = [name for name, found in curves.items() if found[0]["name"].startswith(f"{kind}/")]
        return {name: curves[name] for name in (*first, *(name for name in curves if name not in first))}

    def single(self) -> list[dict[str, Any]]:
        """The metrics that stand alone, the headline first."""
        alone = [metric for metric in self.facts.get("metrics", ()) if not metric.get("series")]
        return sorted(alone, key=lambda metric: metric["name"] != self.headline)


def load(folder: str | Path, *, interval: str = T_INTERVAL) -> Comparison:
    """Read a results folder: the runs of its last comparison or, if there was none, the last of each kind.

    Runs that only chose a learning rate are never among the latter.

    Args:
        folder: of the results.
        interval: which interval the figures shall show, one of `INTERVALS`.

    Raises:
        NothingToReportError: if there is none.
        ValueError: if `interval` is unknown.
    """
    results = Results(folder)
    latest, every = results.latest(), results.records()
    comparison = read_json(results.comparison)
    tuning = read_json(results.tuning) or {}
    missing: list[str] = []
    if comparison is not None:
        # A row is called as the user called it, which may say more than the model's name.
        chosen = [
            {**latest[run["id"]], "model": run["model"]} for run in comparison["runs"] if run["id"] in latest
        ]
        missing = [run_name(run) for run in comparison["runs"] if run["id"] not in latest]
        missing += _longer_missing(comparison.get("longer", ()), latest)
        task, command = comparison["task"], comparison["command"]
    else:
        # Runs that chose a learning rate, or evaluate what another run has trained.
        hidden = {run["id"] for run in tuning.get("runs", ())}
        hidden |= {record["id"] for record in every if record.get("settings", {}).get("trained")}
        shown = [record for record in every if record["id"] not in hidden]
        task = shown[-1]["task"] if shown else ""
        chosen = rows_of(r for r in latest.values() if r["task"] == task and r["id"] not in hidden)
        command = ""
    if not chosen:
        raise NothingToReportError(
            f"{results.folder} holds no run that has ended; start one with memory-bench compare or run"
        )
    finished = [record for record in chosen if record["status"] == FINISHED]
    terms = (comparison or {}).get("tuning") or {}
    longer = _longer((comparison or {}).get("longer", ()), latest)
    trials = [{**latest[one["id"]], **one} for one in terms.get("trials", ()) if one["id"] in latest]
    further = [r for rows in longer.values() for row in rows.values() for r in row.finished]
    further += [trial for trial in trials if trial["status"] == FINISHED]
    # By id, so that a failure before it is called like the run.
    well = {record["id"]: record for record in (*further, *finished)}
    found = Comparison(
        task=task,
        facts=finished[-1]["task_facts"] if finished else {},
        rows=_rows(chosen),
        missing=tuple(missing),
        attempts=tuple(
            {**well[r["id"]], "status": r["status"], "error": r.get("error", "")}
            for r in every
            if r["id"] in well and r["status"] != FINISHED
        ),
        command=command,
        match=(comparison or {}).get("match") or {},
        tuning=terms,
        longer=longer,
        trials=tuple(trials),
    )
    return with_interval(found, interval)


def with_interval(comparison: Comparison, interval: str) -> Comparison:
    """The same comparison, its figures showing this interval.

    Raises:
        ValueError: if `interval` is none of `INTERVALS`.
    """
    if interval not in INTERVALS:
        raise ValueError(f"interval {interval!r} is none of {', '.join(INTERVALS)}")
    longer = {
        model: {factor: dataclasses.replace(row, interval=interval) for factor, row in rows.items()}
        for model, rows in comparison.longer.items()
    }
    rows = tuple(dataclasses.replace(row, interval=interval) for row in comparison.rows)
    return dataclasses.replace(comparison, rows=rows, longer=longer)


def _longer(points: Iterable[Mapping[str, Any]], latest: Mapping[str, Record]) -> dict[str, dict[int, Row]]:
    found: dict[str, dict[int, list[Record]]] = {}
    for point in points:
        if point["id"] in latest:
            entry = {**latest[point["id"]], "model": point["model"]}
            if point["factor"] != 1:
                entry["factor"] = point["factor"]
            found.setdefault(point["model"], {}).setdefault(point["factor"], []).append(entry)
    return {
        model: {factor: Row(model=model, records=tuple(records)) for factor, records in sorted(rows.items())}
        for model, rows in found.items()
    }


def weight_by_age(comparison: Comparison) -> dict[str, dict[str, Figure | None]]:
    """By model and layer, what share of what is read lies so many segments back; up to the oldest of all."""
    lines: dict[str, dict[str, Figure | None]] = {}
    for row in comparison.rows:
        layers = [record.get("weight_by_age") or {} for record in row.finished]
        for layer, ages in {name: ages for found in layers for name, ages in found.items()}.items():
            lines[f"{row.model}: {layer}"] = {age: row.figure("weight_by_age", layer, age) for age in ages}
    read = [
        place
        for figures in lines.values()
        for place, figure in enumerate(figures.values())
        if figure is not None and figure.mean > 0
    ]
    last = max(read, default=-1) + 1
    return {name: dict(itertools.islice(figures.items(), last)) for name, figures in lines.items()}


def _longer_missing(points: Sequence[Mapping[str, Any]], latest: Mapping[str, Record]) -> list[str]:
    # Where the training failed nothing is to come.
    trained = {
        (point["model"], point["seed"])
        for point in points
        if point["factor"] == 1 and latest.get(point["id"], {}).get("status") == FINISHED
    }
    return [
        run_name(point)
        for point in points
        if point["factor"] != 1 and point["id"] not in latest and (point["model"], point["seed"]) in trained
    ]


def run_name(run: Mapping[str, Any]) -> str:
    """What a run of a comparison is called, whether reported, on longer sequences or a trial of a rate."""
    name = f"{run['model']} seed {run['seed']}"
    if "factor" in run:
        name += f" at × {run['factor']}" if run["factor"] != 1 else ""
    return f"{name} at learning rate {run['rate']:g}" if "rate" in run else name


def title(metric: str) -> str:
    """A metric's name for reading: `identifier bits, 5+ back`."""
    return metric.replace("/", ", ")


def point(metric: str) -> str:
    """What stands under one point of a curve: the name after its last slash."""
    return metric.rpartition("/")[2]


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    models: dict[str, list[Record]] = {}
    for record in records:
        models.setdefault(record["model"], []).append(record)
    rows = [Row(model=model, records=tuple(found)) for model, found in models.items()]
    # A stable sort: families first, controls last, otherwise in the order asked for.
    return tuple(sorted(rows, key=lambda row: row.control))
