"""From a sweep to something to read: page, tables and pictures. Needs neither models nor tasks."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import Block, Code, Heading, Paragraph, Picture, Table
from benchmarks.formatting import count, number, size
from benchmarks.report import (
    blank,
    column,
    directions,
    failure_section,
    floor_name,
    introduction,
    is_finite,
    main_metrics,
    write_csv,
    write_document,
)
from benchmarks.summary import Figure
from benchmarks.sweep import EVALUATED, TRAINED
from benchmarks.sweep_summary import Line, Sweep, base_in_words


def write_sweep_report(sweep: Sweep, out: str | Path, *, plots: bool = True) -> list[Path]:
    """Write `sweep.html`, `sweep.md`, `sweep.csv` and the pictures into folder `out`; returns the files.

    Raises:
        OSError: if a file cannot be written.
        ImportError: if `plots` is wished for and matplotlib is missing, or jinja2 is.
    """
    out = Path(out)
    pictures: list[Path] = []
    if plots and sweep.runs.facts:
        from benchmarks.sweep_plots import draw_sweep

        pictures = draw_sweep(sweep, out)
    blocks = sweep_document(sweep, pictures)
    written = write_document(blocks, out, "sweep", page="sweep.html")
    return [*written, *write_csv(sweep_csv(sweep), out / "sweep.csv"), *pictures]


def sweep_table(sweep: Sweep, *, metrics: Sequence[Mapping[str, Any]], costs: bool) -> list[list[str]]:
    """Rows of text, the first being the header: each point, then floor and chance if all points share them.

    Args:
        sweep: what to show.
        metrics: the columns.
        costs: whether to add the state and the speed.
    """
    both = len(sweep.ways) > 1
    header = [option.short for option in sweep.options] + ["model"] * both
    first = len(header)
    header += [column(metric) for metric in metrics]
    if costs:
        header += ["state per row", "training tokens/s", "evaluation tokens/s"]
    lines = [header]
    for line in sweep.lines:
        cells = [option.labels[i] for option, i in zip(sweep.options, line.place, strict=True)]
        cells += [line.how] * both
        if line.row.status:
            cells[-1] += f" ({line.row.status})"
        cells += [number(line.row.figure("scores", metric["name"])) for metric in metrics]
        if costs:
            cells += [
                size(line.row.figure("state_bytes")),
                _training_speed(line),
                count(line.row.figure("evaluation_tokens_per_second")),
            ]
        lines.append(cells)
    for name, key in ((floor_name(sweep.runs).partition(" (")[0], "floor"), ("chance", "chance")):
        values = sweep.runs.facts.get(key, {})
        if any(is_finite(values.get(metric["name"])) for metric in metrics):
            cells = [name, *[""] * (first - 1)]
            cells += [number(Figure.of([values.get(metric["name"])])) for metric in metrics]
            lines.append(cells + [""] * (len(header) - len(cells)))
    return lines


def sweep_document(sweep: Sweep, pictures: Sequence[Path] = ()) -> list[Block]:
    """The whole report as blocks."""
    runs = sweep.runs
    blocks: list[Block] = [Heading(sweep.title, 1), *introduction(runs), Paragraph(ways_in_words(sweep))]
    main = main_metrics(runs)
    if sweep.lines:
        blocks += [
            Table(sweep_table(sweep, metrics=main, costs=True)),
            Paragraph(
                f"{directions(runs, main)} State per row: bytes carried from segment to segment. Tokens/s: "
                "beside the other runs of the sweep."
            ),
        ]
    for name, metrics in list(runs.series().items())[1:]:
        blocks += [Heading(name), Table(sweep_table(sweep, metrics=metrics, costs=False))]
    blocks += failure_section(runs)
    if pictures:
        blocks += [Heading("Pictures"), *(Picture(path, path.stem.replace("_", " ")) for path in pictures)]
    records = [record for row in runs.rows for record in row.records]
    lines = [runs.command, *dict.fromkeys(record["command"] for record in records)]
    return [*blocks, Heading("To do it again"), Code("\n".join(line for line in lines if line))]


def sweep_csv(sweep: Sweep) -> str:
    """One line for each point, numbers in full."""
    metrics = [metric["name"] for metric in sweep.runs.facts.get("metrics", ())]
    costs = {
        "parameters": ("parameters",),
        "state bytes per row": ("state_bytes",),
        "peak bytes": ("peak_bytes",),
        "training tokens per second": ("tokens_per_second",),
        "evaluation tokens per second": ("evaluation_tokens_per_second",),
        "training seconds": ("seconds", "training"),
        "evaluation seconds": ("seconds", "evaluation"),
        "cpu seconds": ("seconds", "cpu"),
        "training cpu seconds": ("seconds", "training cpu"),
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = [f"{name}{end}" for name in metrics for end in ("", " ±")]
    names = [option.name for option in sweep.options]
    writer.writerow([*names, "model", "runs", "finished", "status", *scores, *costs])
    for line in sweep.lines:
        row = line.row
        cells: list[Any] = [option.texts[i] for option, i in zip(sweep.options, line.place, strict=True)]
        cells += [line.how, len(row.records), len(row.finished), row.status]
        for name in metrics:
            figure = row.figure("scores", name)
            cells += ["", ""] if figure is None else [figure.mean, blank(figure.half_width)]
        for path in costs.values():
            figure = row.figure(*path)
            cells.append("" if figure is None else figure.mean)
        writer.writerow(cells)
    return text.getvalue()


def ways_in_words(sweep: Sweep) -> str:
    """What `trained` and `evaluated` mean here."""
    varied = " and ".join(f"`{option.short}`" for option in sweep.options)
    words = []
    if TRAINED in sweep.ways:
        words.append(f"Trained: a model is trained with each value of {varied}.")
    if EVALUATED in sweep.ways:
        words.append(
            f"Evaluated: one model, trained with {base_in_words(sweep)}, is evaluated with each value, "
            "without training again."
        )
    return " ".join(words)


def _training_speed(line: Line) -> str:
    # The evaluated point at the model's own values is the very run that trained it.
    return count(line.row.figure("tokens_per_second")) if line.how == TRAINED else ""
