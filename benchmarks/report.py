"""From results to something to read: `table.md`, `table.csv` and plots. Needs neither models nor tasks."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import FINISHED, Record, Results, read_json, write_atomically

SEEDS_FOR_INTERVAL = 3
# Two-sided 95 % points of Student's t for 2, 3, ... degrees of freedom; 1.96 beyond the list.
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

MODES = {
    "none": "every segment starts with a fresh memory",
    "shuffled": "before every segment each row is handed the memory of the row beside it",
    "frozen": "the memory stays as it was after the first segment of the document",
}


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


def write_report(comparison: Comparison, out: str | Path, *, plots: bool = True) -> list[Path]:
    """Write `table.md`, `table.csv` and the plots into folder `out`; returns the files written.

    Raises:
        OSError: if a file cannot be written.
        ImportError: if `plots` is wished for and matplotlib is missing.
    """
    out = Path(out)
    pictures: list[Path] = []
    if plots and comparison.facts:
        from benchmarks.plots import draw_all

        pictures = draw_all(comparison, out)
    table = out / "table.md"
    write_atomically(table, markdown(comparison, pictures).encode())
    data = out / "table.csv"
    write_atomically(data, as_csv(comparison).encode())
    return [table, data, *pictures]


def table(comparison: Comparison, *, metrics: Sequence[Mapping[str, Any]], costs: bool) -> list[list[str]]:
    """Rows of text, the first being the header: each model, then the floor and chance.

    Args:
        comparison: what to show.
        metrics: the columns.
        costs: whether to add what the memory changes and what the model costs.
    """
    header = ["model", *(_column(metric) for metric in metrics)]
    if costs:
        header += ["drop without memory", "parameters", "state per row", "peak memory", "tokens/s"]
    lines = [header]
    for row in comparison.rows:
        cells = [f"{row.model} ({row.status})" if row.status else row.model]
        cells += [number(row.figure("scores", metric["name"])) for metric in metrics]
        if costs:
            cells += [
                number(row.figure("memory_use", "drop", "none")),
                count(row.figure("parameters")),
                size(row.figure("state_bytes")),
                size(row.figure("peak_bytes")),
                count(row.figure("tokens_per_second")),
            ]
        lines.append(cells)
    for name, key in ((_floor_name(comparison).partition(" (")[0], "floor"), ("chance", "chance")):
        values = comparison.facts.get(key, {})
        if any(_finite(values.get(metric["name"])) for metric in metrics):
            cells = [name, *(number(Figure.of([values.get(metric["name"])])) for metric in metrics)]
            lines.append(cells + [""] * (len(header) - len(cells)))
    return lines


def main_metrics(comparison: Comparison) -> list[dict[str, Any]]:
    """The columns of the main table: what stands alone, and the main curve."""
    curves = list(comparison.series().values())
    return [*comparison.single(), *(curves[0] if curves else [])]


def markdown(comparison: Comparison, pictures: Sequence[Path] = ()) -> str:
    """The whole report as Markdown."""
    facts = comparison.facts
    parts = [f"# {comparison.task}", facts.get("summary", "")]
    stated = [f"{name}: {value}" for name, value in facts.get("facts", {}).items()]
    if stated:
        parts.append("Data: " + "; ".join(stated) + ".")
    parts.append(_circumstances(comparison))
    main = main_metrics(comparison)
    parts.append(_markdown_table(table(comparison, metrics=main, costs=True)))
    parts.append(_legend(comparison, main))
    for name, metrics in list(comparison.series().items())[1:]:
        parts += [f"## {name}", _markdown_table(table(comparison, metrics=metrics, costs=False))]
    if facts:
        parts += ["## Is the memory used?", *_memory_section(comparison)]
    if comparison.failures or comparison.attempts or comparison.missing:
        parts += ["## What went wrong", *_failure_section(comparison)]
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]
    parts += ["## To do it again", _commands(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line for each model, numbers in full."""
    metrics = [metric["name"] for metric in comparison.facts.get("metrics", ())]
    costs = {
        "parameters": ("parameters",),
        "state bytes per row": ("state_bytes",),
        "peak bytes": ("peak_bytes",),
        "tokens per second": ("tokens_per_second",),
        "training seconds": ("seconds", "training"),
        "evaluation seconds": ("seconds", "evaluation"),
        "cpu seconds": ("seconds", "cpu"),
        **{f"drop with memory {mode}": ("memory_use", "drop", mode) for mode in MODES},
    }
    columns = ["model", "runs", "finished", "status"]
    columns += [f"{name}{end}" for name in metrics for end in ("", " ±")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *costs])
    for row in comparison.rows:
        cells: list[Any] = [row.model, len(row.records), len(row.finished), row.status]
        for name in metrics:
            figure = row.figure("scores", name)
            cells += ["", ""] if figure is None else [figure.mean, _blank(figure.half_width)]
        for path in costs.values():
            figure = row.figure(*path)
            cells.append("" if figure is None else figure.mean)
        writer.writerow(cells)
    for key in ("floor", "chance"):
        values = comparison.facts.get(key, {})
        cells = [key, "", "", ""]
        for name in metrics:
            cells += [_blank(values.get(name)), ""]
        writer.writerow(cells + [""] * len(costs))
    return text.getvalue()


def title(metric: str) -> str:
    """A metric's name for reading: `identifier bits, 5+ back`."""
    return metric.replace("/", ", ")


def point(metric: str) -> str:
    """What stands under one point of a curve: the name after its last slash."""
    return metric.rpartition("/")[2]


def number(figure: Figure | None) -> str:
    """A score: three decimals below 10, two above, with its interval if there is one."""
    if figure is None:
        return "–"
    digits = 3 if abs(figure.mean) < 10 else 2
    # Rounding must not print a minus before zero.
    text = f"{figure.mean:.{digits}f}"
    text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")
    return text if figure.half_width is None else f"{text} ± {figure.half_width:.{digits}f}"


def count(figure: Figure | None) -> str:
    """A count to three digits: `89.1 k`."""
    if figure is None:
        return "–"
    return _scaled(figure.mean, 1000, ("", " k", " M", " G"))


def size(figure: Figure | None) -> str:
    """Bytes to three digits: `8.2 KiB`."""
    if figure is None:
        return "–"
    return _scaled(figure.mean, 1024, (" B", " KiB", " MiB", " GiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value /= base
        step += 1
    digits = 0 if step == 0 or value >= 100 else 1
    return f"{value:.{digits}f}{units[step]}"


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    models: dict[str, list[Record]] = {}
    for record in records:
        models.setdefault(record["model"], []).append(record)
    rows = [Row(model=model, records=tuple(found)) for model, found in models.items()]
    # A stable sort: families first, controls last, otherwise in the order asked for.
    return tuple(sorted(rows, key=lambda row: row.control))


def _column(metric: Mapping[str, Any]) -> str:
    return point(metric["name"]) if metric.get("series") else title(metric["name"])


def _floor_name(comparison: Comparison) -> str:
    return str(comparison.facts.get("floor_is", "floor"))


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _blank(value: Any) -> Any:
    return "" if value is None else value


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    header, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def _legend(comparison: Comparison, metrics: Sequence[Mapping[str, Any]]) -> str:
    better: dict[str, list[str]] = {"Higher": [], "Lower": []}
    for metric in metrics:
        names = better["Higher" if metric["higher_is_better"] else "Lower"]
        name = metric.get("series") or title(metric["name"])
        if name not in names:
            names.append(name)
    words = [f"{word} is better: {', '.join(names)}." for word, names in better.items() if names]
    if len(words) == 1:
        words = [words[0].partition(":")[0] + "."]
    curve = [metric for metric in metrics if metric.get("series")]
    if curve:
        words.insert(
            0, f"From {point(curve[0]['name'])} to {point(curve[-1]['name'])}: {curve[0]['series']}."
        )
    words.append(f"Last but one row: {_floor_name(comparison)}.")
    seeds = max((len(row.finished) for row in comparison.rows), default=0)
    if seeds >= SEEDS_FOR_INTERVAL:
        words.append(f"Means over {seeds} seeds with a 95 % interval.")
    elif seeds > 1:
        words.append(f"Means over {seeds} seeds.")
    elif seeds == 1:
        words.append("One seed, so small differences may be chance.")
    words.append(
        "Drop without memory: how much worse the first column gets (see below). State per row: bytes carried "
        "from segment to segment. Peak memory: of the whole process. Tokens/s: in training, beside the other "
        "runs of the comparison."
    )
    return " ".join(words)


def _circumstances(comparison: Comparison) -> str:
    record = next((r for row in comparison.rows for r in (*row.finished, *row.records)), None)
    if record is None or "versions" not in record:
        return ""
    train = record["settings"]["train"]
    versions = record["versions"]
    commit = f", commit {versions['commit']}" if "commit" in versions else ""
    return (
        f"{train['steps']} steps of {train['batch_size']} rows, {train['threads']} thread a run, on "
        f"{versions['cpu']}; torch {versions['torch']}, Python {versions['python']}, "
        f"memory-models {versions['memory-models']}{commit}."
    )


def _memory_section(comparison: Comparison) -> list[str]:
    lines = [["model", "carried", *MODES]]
    lines += [
        [
            row.model,
            number(row.figure("memory_use", "scores", "carried", comparison.headline)),
            *(number(row.figure("memory_use", "scores", mode, comparison.headline)) for mode in MODES),
        ]
        for row in comparison.rows
        if row.finished
    ]
    meaning = " ".join(f"{mode.capitalize()}: {words}." for mode, words in MODES.items())
    return [
        f"{title(comparison.headline).capitalize()} of the trained model on a part of the evaluation, with "
        f"its memory carried as usual and in three other ways. {meaning} A score that does not suffer is "
        "not due to the memory.",
        _markdown_table(lines),
    ]


def _failure_section(comparison: Comparison) -> list[str]:
    lines = [
        f"- {record['model']} seed {record['seed']} {record['status']}: {record.get('error', '')} "
        f"(`{record['command']}`)"
        for record in comparison.failures
    ]
    lines += [
        f"- {record['model']} seed {record['seed']} {record['status']} once, then succeeded: "
        f"{record.get('error', '')}"
        for record in comparison.attempts
    ]
    lines += [f"- {name} has not ended yet" for name in comparison.missing]
    return ["\n".join(lines)]


def _commands(comparison: Comparison) -> str:
    lines = [comparison.command] if comparison.command else []
    lines += [record["command"] for row in comparison.rows for record in row.records]
    return "```\n" + "\n".join(lines) + "\n```"
