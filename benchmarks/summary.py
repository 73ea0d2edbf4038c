"""What the runs of a results folder say together: the models of a comparison and their figures over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import FINISHED, Record, Results, read_json

SEEDS_FOR_INTERVAL = 3
# Two-sided 95 % points of Student's t for 2, 3, ... degrees of freedom; 1.96 beyond the list.
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class NothingToReportError(ValueError):
    """The folder holds no run."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value over seeds."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval (Student's t); None below three seeds."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        """Of the values that are there; None if none is."""
        found = [value for value in values if value is not None and math.isfinite(value)]
        if not found:
            return None
        half = None
        if len(found) >= SEEDS_FOR_INTERVAL:
            freedom = len(found) - 1
            t = _T95[freedom - 2] if freedom - 2 < len(_T95) else 1.96
            half = t * statistics.stdev(found) / math.sqrt(len(found))
        return cls(mean=statistics.fmean(found), half_width=half, count=len(found))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: its runs and what they say together."""

    model: str
    records: tuple[Record, ...]

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
        return Figure.of(values)

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
    """

    task: str
    facts: dict[str, Any]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    attempts: tuple[Record, ...]
    command: str

    @property
    def headline(self) -> str:
        """The metric to look at first."""
        return self.facts.get("headline", "")

    @property
    def failures(self) -> list[Record]:
        """Runs whose last word is a failure."""
        return [record for row in self.rows for record in row.records if record["status"] != FINISHED]

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


def load(folder: str | Path) -> Comparison:
    """Read a results folder: the runs of its last comparison or, if there was none, the last of each kind.

    Raises:
        NothingToReportError: if there is none.
    """
    results = Results(folder)
    latest, every = results.latest(), results.records()
    comparison = read_json(results.comparison)
    missing: list[str] = []
    if comparison is not None:
        chosen = [latest[run["id"]] for run in comparison["runs"] if run["id"] in latest]
        missing = [f"{r['model']} seed {r['seed']}" for r in comparison["runs"] if r["id"] not in latest]
        task, command = comparison["task"], comparison["command"]
    else:
        task = every[-1]["task"] if every else ""
        kinds = {(r["model"], r["seed"]): r for r in latest.values() if r["task"] == task}
        chosen, command = list(kinds.values()), ""
    if not chosen:
        raise NothingToReportError(
            f"{results.folder} holds no run that has ended; start one with memory-bench compare or run"
        )
    finished = [record for record in chosen if record["status"] == FINISHED]
    ids = {record["id"] for record in finished}
    return Comparison(
        task=task,
        facts=finished[-1]["task_facts"] if finished else {},
        rows=_rows(chosen),
        missing=tuple(missing),
        attempts=tuple(r for r in every if r["id"] in ids and r["status"] != FINISHED),
        command=command,
    )


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
