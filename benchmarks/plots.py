"""The pictures of a comparison. Drawn without a screen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawing import (
    STYLE,
    Canvas,
    byte_label,
    draw_band,
    draw_cells,
    label_ends,
    label_points,
    legend_below,
    look_of,
    mpl,
    reference,
    write_pictures,
)
from benchmarks.summary import Comparison, Figure, Row, point, title, weight_by_age


def draw_all(comparison: Comparison, out: Path) -> list[Path]:
    """Draw what the comparison has the figures for; returns the files."""
    pictures = {}
    with mpl.rc_context(STYLE):
        for name, metrics in comparison.series().items():
            file = re.sub(r"[^a-z0-9]+", "_", name.lower())
            pictures[f"{file}.png"] = by_distance(comparison, name, metrics)
            pictures[f"{file}_map.png"] = heat_map(comparison, name, metrics)
        pictures["learning_curves.png"] = learning_curves(comparison)
        pictures["quality_by_state.png"] = quality_by_state(comparison)
        pictures["quality_by_time.png"] = quality_by_time(comparison)
        pictures["weight_by_age.png"] = age_map(comparison)
        return write_pictures(pictures, out)


def by_distance(comparison: Comparison, name: str, metrics: Sequence[Mapping[str, Any]]) -> Canvas | None:
    """A line for each model over the points of a curve, with the floor and chance."""
    canvas = Canvas(figsize=(8.2, 4.6), dpi=130, layout="constrained")
    axes = canvas.add_subplot()
    ends = []
    places = range(len(metrics))
    rows = _drawn(comparison)
    for index, row in enumerate(rows):
        # A little beside each other, so that equal values do not hide each other's markers.
        beside = (index - (len(rows) - 1) / 2) * min(0.035, 0.3 / len(rows))
        figures = [row.figure("scores", metric["name"]) for metric in metrics]
        values = [math.nan if f is None else f.mean for f in figures]
        if all(math.isnan(value) for value in values):
            continue
        look = look_of(comparison, row)
        x = [place + beside for place in places]
        axes.plot(x, values, **look)
        draw_band(axes, x, figures, look["color"])
        ends.append((row.model, [v for v in values if not math.isnan(v)][-1], look["color"]))
    if not ends:
        return None
    reference(axes, comparison, metrics, places)
    labels = [point(metric["name"]) for metric in metrics]
    # "gap 0, gap 1, ..." reads better as 0, 1, ... by gap.
    word, shared = labels[0].partition(" ")[0], len({label.partition(" ")[0] for label in labels}) == 1
    axes.set_xticks(places, [label.partition(" ")[2] or label for label in labels] if shared else labels)
    axes.set_xlim(-0.2, len(metrics) - 0.8)
    up = metrics[0]["higher_is_better"]
    unit = metrics[0]["unit"] or name
    axes.set_ylabel(f"{unit} ({'higher' if up else 'lower'} is better)")
    if unit == "accuracy":
        axes.set_ylim(-0.03, 1.04)
    if shared:
        axes.set_xlabel(word)
    axes.set_title(f"{comparison.task}: {name}" + (f" by {word}" if shared and " by " not in name else ""))
    label_ends(axes, ends)
    legend_below(canvas)
    return canvas


def heat_map(comparison: Comparison, name: str, metrics: Sequence[Mapping[str, Any]]) -> Canvas | None:
    """Models by the points of a curve, the mean score as colour and number; None for a curve of one point."""
    rows = [row for row in comparison.rows if row.finished]
    values = [[_figure_mean(row, metric["name"]) for metric in metrics] for row in rows]
    finite = [value for line in values for value in line if math.isfinite(value)]
    if len(metrics) < 2 or not finite:
        return None
    canvas = Canvas(
        figsize=(2.2 + 0.95 * len(metrics), 1.3 + 0.42 * len(rows)), dpi=130, layout="constrained"
    )
    axes = canvas.add_subplot()
    up = metrics[0]["higher_is_better"]
    low, high = (0.0, 1.0) if metrics[0]["unit"] == "accuracy" else (min(finite), max(finite))
    worst, best = (low, high) if up else (high, low)
    shares = [[(value - worst) / ((best - worst) or 1) for value in line] for line in values]
    digits = 2 if high <= 10 else 1
    texts = [[f"{value:.{digits}f}" if math.isfinite(value) else "" for value in line] for line in values]
    draw_cells(axes, shares, texts, [row.model for row in rows])
    axes.set_xticks(range(len(metrics)), [point(metric["name"]) for metric in metrics])
    axes.set_title(f"{comparison.task}: {name} ({'higher' if up else 'lower'} is better)")
    return canvas


def age_map(comparison: Comparison) -> Canvas | None:
    """How far back lies what each memory layer reads; None if no model tells it."""
    ages = weight_by_age(comparison)
    if not ages:
        return None
    labels = list(next(iter(ages.values())))
    shares = [[math.nan if f is None else f.mean for f in line.values()] for line in ages.values()]
    texts = [[f"{value:.2f}" if math.isfinite(value) else "" for value in line] for line in shares]
    # Wide enough for the title, which belongs to the picture: few columns are narrower than it is.
    width = max(5.8, 3.2 + 0.8 * len(labels))
    canvas = Canvas(figsize=(width, 1.7 + 0.42 * len(ages)), dpi=130, layout="constrained")
    axes = canvas.add_subplot()
    draw_cells(axes, shares, texts, list(ages))
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("segments back")
    said = f"{comparison.task}: how old is what is read, shares of weight"
    canvas.suptitle(said, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return canvas


def learning_curves(comparison: Comparison) -> Canvas | None:
    """Training loss and headline score by step, means over the seeds with their interval as a band."""
    canvas = Canvas(figsize=(11.5, 4.4), dpi=130, layout="constrained")
    left, right = canvas.subplots(1, 2)
    for axes, key, label in (
        (left, "loss", "training loss (nats)"),
        (right, "score", title(comparison.headline)),
    ):
        ends = []
        for row in _drawn(comparison):
            steps, figures = _curve(row, key)
            if not steps:
                continue
            look = look_of(comparison, row)
            if key == "loss":
                look |= {"marker": ""}
            axes.plot(steps, [figure.mean for figure in figures], **look)
            draw_band(axes, steps, figures, look["color"])
            ends.append((row.model, figures[-1].mean, look["color"]))
        axes.set_xlabel("optimiser step")
        axes.set_title(label)
        if axes is right:
            # Before the labels are placed, for these change the scale.
            headline = next(m for m in comparison.facts["metrics"] if m["name"] == comparison.headline)
            reference(right, comparison, [headline], right.get_xlim())
            if headline["unit"] == "accuracy":
                right.set_ylim(-0.03, 1.04)
        label_ends(axes, ends)
    if not left.lines:
        return None
    legend_below(canvas)
    canvas.suptitle(f"{comparison.task}: learning", x=0.01, ha="left", fontweight="bold")
    return canvas


def quality_by_state(comparison: Comparison) -> Canvas | None:
    """Headline score against the bytes a row carries from segment to segment."""
    drawn = [row for row in _drawn(comparison) if row.figure("state_bytes")]
    carried = {row.model: _mean(row, "state_bytes") for row in drawn}
    if not drawn:
        return None
    # Nothing carried has no place on a logarithmic axis; it gets one of its own, at the left.
    positive = [value for value in carried.values() if value > 0] or [1.0]
    nothing = min(carried.values()) == 0
    first = 2 ** (math.floor(math.log2(min(positive))) - (2 if nothing else 0))
    places = {model: value or float(first) for model, value in carried.items()}
    made = _quality_against(comparison, drawn, places)
    if made is None:
        return None
    canvas, axes, points, bars = made
    last = 2 ** math.ceil(math.log2(max(positive)))
    axes.set_xlim(first / 1.7, last * 1.7)
    every = max(1, round(math.log2(last / first) / 7))
    ticks = [first * 2**power for power in range(0, round(math.log2(last / first)) + 1, every)]
    axes.set_xticks(ticks, ["none" if nothing and t == first else byte_label(t) for t in ticks])
    axes.set_xlabel("state carried by a row")
    axes.set_title(f"{comparison.task}: quality against state")
    # Before the points' names, whose places depend on the layout.
    legend_below(canvas)
    label_points(canvas, axes, points, bars)
    return canvas


def quality_by_time(comparison: Comparison) -> Canvas | None:
    """Headline score against the seconds of processor time that the training took.

    With the evaluation in older results, which do not tell it apart.
    """
    told = all(row.figure("seconds", "training cpu") for row in _drawn(comparison))
    name = "training cpu" if told else "cpu"
    drawn = [row for row in _drawn(comparison) if row.figure("seconds", name)]
    places = {row.model: figure.mean for row in drawn if (figure := row.figure("seconds", name)) is not None}
    made = _quality_against(comparison, drawn, places)
    if made is None:
        return None
    canvas, axes, points, bars = made
    low, high = min(places.values()), max(places.values())
    axes.set_xlim(low / 1.35, high * 1.35)
    ticks = [t for power in range(-1, 6) for t in (10**power, 2 * 10**power, 5 * 10**power)]
    shown = [t for t in ticks if low / 1.35 <= t <= high * 1.35]
    axes.set_xticks(shown, [f"{t:g} s" for t in shown])
    axes.set_xlabel("processor time of training" if told else "processor time of a run")
    axes.set_title(f"{comparison.task}: quality against time")
    # Before the points' names, whose places depend on the layout.
    legend_below(canvas)
    label_points(canvas, axes, points, bars)
    return canvas


def _quality_against(
    comparison: Comparison, rows: Sequence[Row], places: Mapping[str, float]
) -> tuple[Canvas, Any, list[tuple[str, float, float, str]], list[tuple[float, float, float]]] | None:
    canvas = Canvas(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = canvas.add_subplot()
    points, intervals = [], []
    for row in rows:
        score = row.figure("scores", comparison.headline)
        if score is None:
            continue
        look = look_of(comparison, row) | {"linestyle": "", "markersize": 9}
        ends = score.bounds or (score.mean, score.mean)
        # Rounding may put the mean outside the range of its own values.
        bars = [[max(score.mean - ends[0], 0.0)], [max(ends[1] - score.mean, 0.0)]]
        shown = bars if score.bounds else None
        axes.errorbar([places[row.model]], [score.mean], yerr=shown, capsize=3, **look)
        points.append((row.model, places[row.model], score.mean, look["color"]))
        intervals.append((places[row.model], *ends))
    if not points:
        return None
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    headline = next(m for m in comparison.facts["metrics"] if m["name"] == comparison.headline)
    axes.margins(y=0.15)
    axes.set_xlim(min(places.values()) / 1.7, max(places.values()) * 1.7)
    reference(axes, comparison, [headline], axes.get_xlim())
    if headline["unit"] == "accuracy":
        axes.set_ylim(-0.06, 1.12)
    up = headline["higher_is_better"]
    axes.set_ylabel(f"{title(comparison.headline)} ({'higher' if up else 'lower'} is better)")
    return canvas, axes, points, intervals


def _drawn(comparison: Comparison) -> list[Row]:
    # Controls first, so that the families lie on top of them.
    return sorted((row for row in comparison.rows if row.finished), key=lambda row: not row.control)


def _curve(row: Row, key: str) -> tuple[list[int], list[Figure]]:
    """Steps that every seed has reached, and the figure over the seeds at each."""
    by_step: dict[int, list[float]] = {}
    for record in row.finished:
        for entry in record["curve"]:
            if entry.get(key) is not None:
                by_step.setdefault(entry["step"], []).append(entry[key])
    found = {}
    for step, values in sorted(by_step.items()):
        figure = Figure.of(values, interval=row.interval)
        if len(values) == len(row.finished) and figure is not None:
            found[step] = figure
    return list(found), list(found.values())


def _figure_mean(row: Row, metric: str) -> float:
    figure = row.figure("scores", metric)
    return math.nan if figure is None else figure.mean


def _mean(row: Row, name: str) -> float:
    figure = row.figure(name)
    assert figure is not None
    return figure.mean
