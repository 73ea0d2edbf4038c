"""What the runs of a sweep say together: its points and their figures over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import FINISHED, Record, Results, read_json
from benchmarks.summary import Comparison, NothingToReportError, Row
from benchmarks.sweep import EVALUATED, TRAINED, Option


@dataclass(frozen=True, kw_only=True)
class Line:
    """One point of a sweep over its seeds."""

    place: tuple[int, ...]
    how: str
    row: Row


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that the report of a sweep says.

    Attributes:
        model: name of the member.
        options: what is varied.
        lines: the points that have a run, trained ones first.
        bases_have: the values with which the evaluated model was trained; empty if none was evaluated.
        runs: the same runs as a comparison, a row for each line; its facts are those that all points share,
            and the metrics of any.
    """

    model: str
    options: tuple[Option, ...]
    lines: tuple[Line, ...]
    bases_have: tuple[str, ...]
    runs: Comparison

    @property
    def ways(self) -> list[str]:
        """Of `trained` and `evaluated` those that there are."""
        return [how for how in (TRAINED, EVALUATED) if any(line.how == how for line in self.lines)]

    @property
    def title(self) -> str:
        """`text: memorizing by memories`."""
        return f"{self.runs.task}: {self.model} by {' and '.join(option.short for option in self.options)}"

    def at(self, how: str, place: Sequence[int]) -> Row | None:
        """The runs of one point, None if there are none."""
        return next((li.row for li in self.lines if li.how == how and li.place == tuple(place)), None)


def load_sweep(folder: str | Path) -> Sweep:
    """Read the last sweep of a results folder.

    Raises:
        NothingToReportError: if there was none, or no run of it has ended.
    """
    results = Results(folder)
    written, latest, every = read_json(results.sweep), results.latest(), results.records()
    if written is None:
        raise NothingToReportError(f"{results.folder} holds no sweep; start one with memory-bench sweep")
    options = tuple(
        Option(name=o["name"], texts=tuple(o["texts"]), values=tuple(o["values"])) for o in written["options"]
    )
    groups: dict[tuple[str, tuple[int, ...]], list[Record]] = {}
    missing: list[str] = []
    for point in written["points"]:
        place = tuple(point["place"])
        name = f"{_values(options, place)} {point['how']}"
        if point["id"] in latest:
            groups.setdefault((point["how"], place), []).append(latest[point["id"]])
        else:
            missing.append(f"{name} seed {point['seed']}")
    lines = [
        Line(place=place, how=how, row=Row(model=f"{_values(options, place)} {how}", records=tuple(records)))
        for (how, place), records in groups.items()
    ]
    bases = [latest[base["id"]] for base in written["bases"] if base["id"] in latest]
    failed = [base for base in bases if base["status"] != FINISHED]
    failed = [base for base in failed if all(base not in line.row.records for line in lines)]
    if not lines and not failed:
        raise NothingToReportError(f"{results.folder}: no run of the sweep has ended; give its command again")
    rows = [line.row for line in lines]
    ids = {record["id"] for row in rows for record in row.finished}
    runs = Comparison(
        task=written["task"],
        facts=_shared([record["task_facts"] for row in rows for record in row.finished]),
        rows=(*rows, *([Row(model="model to evaluate", records=tuple(failed))] if failed else [])),
        missing=tuple(missing),
        attempts=tuple(r for r in every if r["id"] in ids and r["status"] != FINISHED),
        command=written["command"],
    )
    return Sweep(
        model=written["model"],
        options=options,
        lines=tuple(sorted(lines, key=lambda line: line.how != TRAINED)),
        bases_have=tuple(written["bases_have"]),
        runs=runs,
    )


def base_in_words(sweep: Sweep) -> str:
    """The values with which the evaluated model was trained."""
    return ", ".join(
        f"{option.short} {value}" for option, value in zip(sweep.options, sweep.bases_have, strict=True)
    )


def _values(options: Sequence[Option], place: Sequence[int]) -> str:
    return ", ".join(f"{o.short}={o.labels[i]}" for o, i in zip(options, place, strict=True))


def _shared(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all points say alike, and every metric that one of them has."""
    if not facts:
        return {}
    metrics: dict[str, Any] = {}
    for entry in facts:
        metrics |= {metric["name"]: metric for metric in entry["metrics"]}
    last = facts[-1]
    alike = {
        key: {
            name: value for name, value in last[key].items() if all(f[key].get(name) == value for f in facts)
        }
        for key in ("floor", "chance", "facts")
    }
    return {**last, **alike, "metrics": list(metrics.values())}
