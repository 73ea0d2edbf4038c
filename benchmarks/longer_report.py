"""How models do on longer sequences than they were trained on. Needs neither models nor tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.document import Block, Heading, Paragraph, Table
from benchmarks.formatting import number
from benchmarks.groups import ENOUGH, weights
from benchmarks.summary import Comparison, Figure, Row, title

PICTURE = "longer.png"
Figured = Callable[[Comparison, Row], Figure | None]


def longer_section(comparison: Comparison) -> list[Block]:
    """The headline by length and, where there are gaps that no training had, the mean over these."""
    if not comparison.longer:
        return []
    blocks: list[Block] = [
        Heading("Longer than trained"),
        Paragraph(
            f"{title(comparison.headline).capitalize()} of the models, trained at the length of the table "
            "above (× 1), on sequences of so many times the segments. Their memories are as large as before; "
            "`full`, which sees everything, has its `context` grow along."
        ),
        Table(longer_table(comparison, headline)),
    ]
    if any(
        unseen(comparison, row) is not None for rows in comparison.longer.values() for row in rows.values()
    ):
        records = [r for rows in comparison.longer.values() for row in rows.values() for r in row.finished]
        rarely = f"; a gap that was asked for less than {ENOUGH} times counts in proportion"
        known = any("asked" in record for record in records)
        blocks += [
            Paragraph(f"Mean over the gaps that are longer than any in the training{rarely * known}:"),
            Table(longer_table(comparison, unseen)),
        ]
    return blocks


def longer_table(comparison: Comparison, figure: Figured) -> list[list[str]]:
    """Models by factors; `figure(comparison, row)` gives a cell."""
    factors = lengths(comparison)
    lines = [["model", *(f"× {factor}" for factor in factors)]]
    for model, rows in _in_order(comparison):
        cells = [number(_cell(comparison, rows, factor, figure)) for factor in factors]
        bad = {factor: row.status for factor, row in rows.items() if not row.finished}
        cells = [bad.get(factor, cell) for factor, cell in zip(factors, cells, strict=True)]
        lines.append([model, *cells])
    return lines


def headline(comparison: Comparison, row: Row) -> Figure | None:
    """The headline of the runs."""
    return row.figure("scores", comparison.headline)


def unseen(comparison: Comparison, row: Row) -> Figure | None:
    """For each run the mean over the points of the headline's curve that the training does not have.

    Each counts by the number of its questions (`benchmarks.groups`), or the same where a run of an
    older version does not tell them.
    """
    curves = list(comparison.series().values())
    if not curves:
        return None
    name = curves[0][0]["series"]
    known = {metric["name"] for metric in comparison.facts.get("metrics", ())}
    means = []
    for record in row.finished:
        new = [m["name"] for m in record["task_facts"]["metrics"] if m["series"] == name]
        found = [metric for metric in new if metric not in known and record["scores"].get(metric) is not None]
        asked = record.get("asked") or dict.fromkeys(found, ENOUGH)
        weight = weights([asked[metric] for metric in found])
        scores = [record["scores"][metric] for metric in found]
        means.append(float(np.average(scores, weights=weight)) if found else None)
    return Figure.of(means, interval=row.interval)


def lengths(comparison: Comparison) -> list[int]:
    """The factors that there are."""
    return sorted({factor for rows in comparison.longer.values() for factor in rows})


def draw_longer(comparison: Comparison, out: Path) -> list[Path]:
    """Draw both tables as lines over the length; returns the file."""
    from benchmarks import drawing

    if not comparison.longer:
        return []
    with drawing.mpl.rc_context(drawing.STYLE):
        canvas = drawing.Canvas(figsize=(11.5, 4.4), dpi=130, layout="constrained")
        factors = lengths(comparison)
        panels = [(headline, title(comparison.headline)), (unseen, "gaps longer than any in the training")]
        rows = {row.model: row for row in comparison.rows}
        metric = next(m for m in comparison.facts["metrics"] if m["name"] == comparison.headline)
        for axes, (figure, label) in zip(canvas.subplots(1, 2), panels, strict=True):
            ends = []
            for model, by_factor in _in_order(comparison):
                figures = [_cell(comparison, by_factor, factor, figure) for factor in factors]
                values = [math.nan if found is None else found.mean for found in figures]
                known = [value for value in values if math.isfinite(value)]
                if not known or model not in rows:
                    continue
                look = drawing.look_of(comparison, rows[model])
                axes.plot(factors, values, **look)
                drawing.draw_band(axes, factors, figures, look["color"])
                ends.append((model, known[-1], look["color"]))
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
            axes.set_xticks(factors, [f"× {factor}" for factor in factors])
            axes.set_xlim(factors[0] / 1.1, factors[-1] * 1.1)
            axes.set_xlabel("length of the sequences, × that of the training")
            if metric["unit"] == "accuracy":
                axes.set_ylim(-0.03, 1.04)
            axes.set_title(label)
            drawing.label_ends(axes, ends)
        canvas.suptitle(f"{comparison.task}: longer than trained", x=0.01, ha="left", fontweight="bold")
        return drawing.write_pictures({PICTURE: canvas}, out)


def _in_order(comparison: Comparison) -> list[tuple[str, Mapping[int, Row]]]:
    order = [row.model for row in comparison.rows]
    found = sorted(
        comparison.longer.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99
    )
    return list(found)


def _cell(comparison: Comparison, rows: Mapping[int, Row], factor: int, figure: Figured) -> Figure | None:
    row = rows.get(factor)
    found = None if row is None else figure(comparison, row)
    if row is None or found is None:
        return None
    # Runs that failed are named nowhere else in the table.
    return dataclasses.replace(found, missing=len(row.records) - found.count)
