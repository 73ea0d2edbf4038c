"""From results to something to read: page, tables and pictures. Needs neither models nor tasks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    as_html,
    as_markdown,
)
from benchmarks.findings import warnings
from benchmarks.formatting import count, number, size, small
from benchmarks.groups import ENOUGH
from benchmarks.longer_report import draw_longer, longer_section
from benchmarks.results import write_atomically
from benchmarks.summary import (
    BOOTSTRAP,
    SEEDS_FOR_INTERVAL,
    Comparison,
    Figure,
    point,
    run_name,
    title,
    weight_by_age,
)
from benchmarks.terms_report import terms_columns, terms_section

MODES = {
    "none": "every segment starts with a fresh memory",
    "shuffled": "before every segment each row is handed the memory of the row beside it",
    "frozen": "the memory stays as it was after the first segment of the document",
}


def write_report(comparison: Comparison, out: str | Path, *, plots: bool = True) -> list[Path]:
    """Write `index.html`, `table.md`, `table.csv` and the plots into folder `out`; returns the files written.

    Raises:
        OSError: if a file cannot be written.
        ImportError: if `plots` is wished for and matplotlib is missing, or jinja2 is.
    """
    out = Path(out)
    pictures: list[Path] = []
    if plots and comparison.facts:
        from benchmarks.plots import draw_all

        pictures = [*draw_all(comparison, out), *draw_longer(comparison, out)]
    blocks = document(comparison, pictures)
    return [
        *write_document(blocks, out, "table"),
        *write_csv(as_csv(comparison), out / "table.csv"),
        *pictures,
    ]


def write_document(blocks: Sequence[Block], out: Path, name: str, *, page: str = "index.html") -> list[Path]:
    """Write the blocks as `name.md` and as the HTML page; returns the two files."""
    text, html = out / f"{name}.md", out / page
    write_atomically(text, as_markdown(blocks).encode())
    write_atomically(html, as_html(blocks).encode())
    return [text, html]


def write_csv(text: str, path: Path) -> list[Path]:
    """Write the file, atomically; returns it."""
    write_atomically(path, text.encode())
    return [path]


def table(comparison: Comparison, *, metrics: Sequence[Mapping[str, Any]], costs: bool) -> list[list[str]]:
    """Rows of text, the first being the header: each model, then the floor and chance.

    Args:
        comparison: what to show.
        metrics: the columns.
        costs: whether to add what the memory changes and what the model costs.
    """
    header = ["model", *(column(metric) for metric in metrics)]
    if costs:
        header += ["drop without memory", "parameters", "state per row", "peak memory", "tokens/s"]
        header += list(terms := terms_columns(comparison))
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
                *(cells_of.get(row.model, "–") for cells_of in terms.values()),
            ]
        lines.append(cells)
    for name, key in ((floor_name(comparison).partition(" (")[0], "floor"), ("chance", "chance")):
        values = comparison.facts.get(key, {})
        if any(is_finite(values.get(metric["name"])) for metric in metrics):
            cells = [name, *(number(Figure.of([values.get(metric["name"])])) for metric in metrics)]
            lines.append(cells + [""] * (len(header) - len(cells)))
    return lines


def main_metrics(comparison: Comparison) -> list[dict[str, Any]]:
    """The columns of the main table: what stands alone, and the main curve."""
    curves = list(comparison.series().values())
    return [*comparison.single(), *(curves[0] if curves else [])]


def markdown(comparison: Comparison, pictures: Sequence[Path] = ()) -> str:
    """The whole report as Markdown."""
    return as_markdown(document(comparison, pictures))


def document(comparison: Comparison, pictures: Sequence[Path] = ()) -> list[Block]:
    """The whole report as blocks."""
    main = main_metrics(comparison)
    blocks: list[Block] = [Heading(comparison.task, 1), *introduction(comparison)]
    suspicious = _warnings(comparison)
    if suspicious:
        blocks.append(Bullets(suspicious, warning=True))
    blocks += [
        Table(table(comparison, metrics=main, costs=True)),
        Paragraph(
            f"{directions(comparison, main)} Last but one row: {floor_name(comparison)}. Drop without "
            "memory: how much worse the first column gets (see below). State per row: bytes carried from "
            "segment to segment. Peak memory: of the whole process. Tokens/s: in training, beside the other "
            "runs of the comparison."
        ),
    ]
    for name, metrics in list(comparison.series().items())[1:]:
        blocks += [Heading(name), Table(table(comparison, metrics=metrics, costs=False))]
    blocks += longer_section(comparison)
    blocks += terms_section(comparison)
    # Ahead of the long tables for those who ask why.
    if pictures:
        blocks += [Heading("Pictures"), *(Picture(path, path.stem.replace("_", " ")) for path in pictures)]
    if comparison.facts:
        blocks += [Heading("Is the memory used?"), *_memory_section(comparison)]
        blocks += _diagnostics_section(comparison)
    blocks += failure_section(comparison)
    lines = [comparison.command] if comparison.command else []
    lines += [record["command"] for row in comparison.rows for record in row.records]
    return [*blocks, Heading("To do it again"), Code("\n".join(lines))]


def introduction(comparison: Comparison) -> list[Block]:
    """What the task is, what its data are, and what the runs were made with."""
    facts = comparison.facts
    stated = [f"{name}: {value}" for name, value in facts.get("facts", {}).items()]
    words = [
        facts.get("summary", ""),
        f"Data: {'; '.join(stated)}." if stated else "",
        circumstances(comparison),
    ]
    return [Paragraph(text) for text in words if text]


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
        "training cpu seconds": ("seconds", "training cpu"),
        **{f"drop with memory {mode}": ("memory_use", "drop", mode) for mode in MODES},
    }
    columns = ["model", "runs", "finished", "status"]
    # Both intervals: ± is half of Student's t, low and high are the ends of the bootstrap; and how many seeds
    # the mean is of, which may be fewer than have finished.
    ends = ("", " ±", " low", " high", " seeds")
    columns += [f"{name}{end}" for name in metrics for end in ends]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *costs])
    for row in comparison.rows:
        cells: list[Any] = [row.model, len(row.records), len(row.finished), row.status]
        for name in metrics:
            figure = row.figure("scores", name)
            if figure is None:
                cells += [""] * len(ends)
            else:
                cells += [
                    figure.mean,
                    blank(figure.half_width),
                    *(figure.bootstrap or ("", "")),
                    figure.count,
                ]
        for path in costs.values():
            figure = row.figure(*path)
            cells.append("" if figure is None else figure.mean)
        writer.writerow(cells)
    for key in ("floor", "chance"):
        values = comparison.facts.get(key, {})
        cells = [key, "", "", ""]
        for name in metrics:
            cells += [blank(values.get(name)), *[""] * (len(ends) - 1)]
        writer.writerow(cells + [""] * len(costs))
    return text.getvalue()


def column(metric: Mapping[str, Any]) -> str:
    """What stands above a metric's column."""
    return point(metric["name"]) if metric.get("series") else title(metric["name"])


def floor_name(comparison: Comparison) -> str:
    """What the floor is, in words."""
    return str(comparison.facts.get("floor_is", "floor"))


def is_finite(value: Any) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def blank(value: Any) -> Any:
    """The value for a CSV cell: nothing for None."""
    return "" if value is None else value


def directions(comparison: Comparison, metrics: Sequence[Mapping[str, Any]]) -> str:
    """How to read the columns, and over how many seeds the figures are."""
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
    words += _rarely_asked(comparison, curve)
    if any(
        (figure := row.figure("scores", metric["name"])) is not None and figure.missing
        for row in comparison.rows
        for metric in metrics
    ):
        words.append("(2 of 3): a mean over two of three seeds; the others gave no number.")
    seeds = max((len(row.finished) for row in comparison.rows), default=0)
    if seeds >= SEEDS_FOR_INTERVAL:
        words.append(f"Means over {seeds} seeds with {_interval_in_words(comparison.interval, seeds)}.")
    elif seeds > 1:
        words.append(f"Means over {seeds} seeds.")
    elif seeds == 1:
        words.append("One seed, so small differences may be chance.")
    return " ".join(words)


def _rarely_asked(comparison: Comparison, curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence about the points of the curve that few questions were asked about, if there are any."""
    asked: Mapping[str, int] = next(
        (record["asked"] for row in comparison.rows for record in row.finished if "asked" in record), {}
    )
    unit_is_accuracy = [metric["name"] for metric in curve if metric["unit"] == "accuracy"]
    few = [f"{point(name)} ({asked[name]})" for name in unit_is_accuracy if asked.get(name, ENOUGH) < ENOUGH]
    if not few:
        return []
    return [
        f"Asked less than {ENOUGH} times, and counted in proportion in a mean over all: {', '.join(few)}."
    ]


def _interval_in_words(interval: str, seeds: int) -> str:
    if interval != BOOTSTRAP:
        return "a 95 % interval (Student's t)"
    words = "a 95 % interval (percentile bootstrap over the seeds)"
    if seeds == SEEDS_FOR_INTERVAL:
        words += (
            "; of three seeds that is the range from the lowest to the highest, and tells less than 95 % "
            "sounds: `--interval t` and the CSV have Student's t beside it"
        )
    return words


def circumstances(comparison: Comparison) -> str:
    """What the runs were made with: everything that any of them names, and each commit with its models."""
    records = [r for row in comparison.rows for r in row.records if "versions" in r]
    if not records:
        return ""
    lengths = {
        tuple(r["settings"]["train"][name] for name in ("steps", "batch_size", "threads"))
        for row in comparison.rows
        for r in row.records
    }
    training = ""
    if len(lengths) == 1:
        [(steps, rows, threads)] = lengths
        training = f"{steps} steps of {rows} rows, {threads} thread a run, on "

    def every(name: str) -> str:
        return " and ".join(sorted({str(r["versions"][name]) for r in records if name in r["versions"]}))

    return (
        f"{training}{every('cpu')}; torch {every('torch')}, Python {every('python')}, "
        f"memory-models {every('memory-models')}{_commits(comparison)}."
    )


def _commits(comparison: Comparison) -> str:
    """The commit, or, where the runs are of several, each with the models it made."""
    made: dict[str, dict[str, None]] = {}
    for row in comparison.rows:
        for record in row.records:
            if "commit" in record.get("versions", {}):
                made.setdefault(record["versions"]["commit"], {})[row.model] = None
    if not made:
        return ""
    if len(made) == 1:
        return f", commit {next(iter(made))}"
    parts = [f"{commit} ({', '.join(models)})" for commit, models in made.items()]
    return f", commits {', '.join(parts)}"


def _memory_section(comparison: Comparison) -> list[Block]:
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
        Paragraph(
            f"{title(comparison.headline).capitalize()} of the trained model on a part of the evaluation, "
            f"with its memory carried as usual and in three other ways. {meaning} A score that does not "
            "suffer is not due to the memory."
        ),
        Table(lines),
    ]


def _diagnostics_section(comparison: Comparison) -> list[Block]:
    stats, gradients = [["diagnostic", "mean", "5 %", "95 %"]], [["parameter", "gradient norm"]]
    for row in comparison.rows:
        names = [name for record in row.finished for name in record.get("diagnostics") or {}]
        for name in dict.fromkeys(names):
            cells = [row.figure("diagnostics", name, key) for key in ("mean", "low", "high")]
            stats.append([f"{row.model}: {name}", *map(number, cells)])
        names = [name for record in row.finished for name in record.get("memory_gradients") or {}]
        gradients += [
            [f"{row.model}: {name}", small(row.figure("memory_gradients", name))]
            for name in dict.fromkeys(names)
        ]
    blocks: list[Block] = []
    if len(stats) > 1:
        blocks += [
            Heading("What the memories do"),
            Paragraph(
                "The members' own diagnostics on a part of the evaluation, over all segments of a sequence "
                "but the first; means over the seeds. Ages and distances are in tokens; "
                "what is used is counted by the entropy of the weights with which it is read."
            ),
            Table(stats),
        ]
    ages = weight_by_age(comparison)
    if ages:
        labels = list(next(iter(ages.values())))
        blocks += [
            Heading("How old is what is read", 3),
            Paragraph(
                "Share of the weight with which a memory is read, by how many segments back lies what is "
                "read; 1 is the segment before. Means over the seeds."
            ),
            Table(
                [
                    ["segments back", *labels],
                    *([name, *map(number, line.values())] for name, line in ages.items()),
                ]
            ),
        ]
    if len(gradients) > 1:
        blocks += [
            Heading("What the memories learn from", 3),
            Paragraph(
                "Norm of the gradient that a training batch sends to each parameter that the same "
                "transformer without memory does not have, at the end of the training."
            ),
            Table(gradients),
        ]
    return blocks


def _warnings(comparison: Comparison) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        for record in row.finished:
            for text in warnings(record, headline=comparison.headline):
                found.setdefault(f"{row.model}: {text}", []).append(str(record["seed"]))
    return [f"{text} (seed {', '.join(seeds)})" for text, seeds in found.items()]


def failure_section(comparison: Comparison) -> list[Block]:
    """The runs that failed, now or before they succeeded, or have not ended; nothing if all is well."""
    lines = [
        f"{run_name(record)} {record['status']}: {record.get('error', '')} (`{record['command']}`)"
        for record in comparison.failures
    ]
    lines += [
        f"{run_name(record)} {record['status']} once, then succeeded: {record.get('error', '')}"
        for record in comparison.attempts
    ]
    lines += [f"{name} has not ended yet" for name in comparison.missing]
    return [Heading("What went wrong"), Bullets(lines)] if lines else []
