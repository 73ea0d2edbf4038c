"""The pictures of a sweep: scores, and what they cost, over the values of an option."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from benchmarks.drawing import (
    COLOURS,
    MARKERS,
    SPARE,
    STYLE,
    byte_label,
    label_ends,
    legend_below,
    reference,
    write_pictures,
)
from benchmarks.summary import Figure, point, title
from benchmarks.sweep import EVALUATED, TRAINED, Option
from benchmarks.sweep_summary import Sweep, base_in_words

Metric = Mapping[str, Any]
Entry = tuple[str, ...]
_GREY = "#4a535b"


def draw_sweep(sweep: Sweep, out: Path) -> list[Path]:
    """Draw what the sweep has the figures for; returns the files."""
    with mpl.rc_context(STYLE):
        pictures = {"sweep.png": headlines(sweep)}
        for name, metrics in sweep.runs.series().items():
            pictures[f"sweep_{name.replace(' ', '_')}.png"] = by_distance(sweep, name, metrics)
        pictures["sweep_cost.png"] = costs(sweep)
        return write_pictures(pictures, out)


def headlines(sweep: Sweep) -> Canvas | None:
    """The metrics that stand alone, a line for each value of the other options."""
    metrics = sweep.runs.single()[:3]
    if not metrics:
        return None
    canvas = Canvas(figsize=(5.6 * len(metrics) + 0.6, 4.7), dpi=130, layout="constrained")
    drawn = 0
    for axes, metric in zip(canvas.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        ends = _draw_others(axes, sweep, ("scores", metric["name"]))
        drawn += len(ends)
        _finish_scores(axes, sweep, [metric])
        label_ends(axes, ends if len(sweep.options) > 1 else [])
        axes.set_title(title(metric["name"]))
    if not drawn:
        return None
    _finish(canvas, sweep)
    return canvas


def by_distance(sweep: Sweep, name: str, metrics: Sequence[Metric]) -> Canvas | None:
    """The points of a curve: a line for each, or a panel for each where other options need the lines."""
    if len(sweep.options) == 1:
        canvas = Canvas(figsize=(8.2, 4.9), dpi=130, layout="constrained")
        axes = canvas.add_subplot()
        colours = _ramp(len(metrics))
        ends = []
        for index, metric in enumerate(metrics):
            look = {"color": colours[index], "marker": MARKERS[index % len(MARKERS)]}
            ends += _draw_ways(
                axes,
                sweep,
                ("scores", metric["name"]),
                (),
                look=look,
                name=point(metric["name"]),
                beside=_beside(index, len(metrics), sweep),
            )
        if not ends:
            return None
        _finish_scores(axes, sweep, metrics)
        label_ends(axes, ends)
        axes.set_title(name)
    else:
        columns = min(3, len(metrics))
        rows = math.ceil(len(metrics) / columns)
        canvas = Canvas(figsize=(4.1 * columns + 0.9, 3.4 * rows + 0.4), dpi=130, layout="constrained")
        grid = canvas.subplots(rows, columns, sharey=True, squeeze=False)
        drawn = 0
        for index, axes in enumerate(grid.flat):
            if index >= len(metrics):
                axes.set_visible(False)
                continue
            ends = _draw_others(axes, sweep, ("scores", metrics[index]["name"]))
            drawn += len(ends)
            axes.set_title(point(metrics[index]["name"]))
        # Limits are shared, so nothing that depends on them comes before all lines are drawn.
        for index, metric in enumerate(metrics):
            axes = grid.flat[index]
            _finish_scores(axes, sweep, [metric])
            if index % columns:
                axes.set_ylabel("")
        if not drawn:
            return None
        _legend_of_lines(canvas, sweep)
    _finish(canvas, sweep)
    return canvas


def costs(sweep: Sweep) -> Canvas | None:
    """State per row and speed."""
    canvas = Canvas(figsize=(11.8, 4.5), dpi=130, layout="constrained")
    left, right = canvas.subplots(1, 2)
    drawn = []
    for axes, key in ((left, "state_bytes"), (right, "evaluation_tokens_per_second")):
        ends = _draw_others(axes, sweep, (key,))
        drawn += ends
        _set_places(axes, sweep.options[0])
        axes.set_ylim(bottom=0)
        label_ends(axes, ends if len(sweep.options) > 1 else [])
    if not drawn:
        return None
    left.set_title("state carried by a row")
    unit = 1024 ** max(0, math.floor(math.log(max(left.get_ylim()[1], 1), 1024)))
    left.yaxis.set_major_locator(MultipleLocator(_step(left.get_ylim()[1] / unit) * unit))
    left.yaxis.set_major_formatter(lambda value, _: byte_label(value) if value else "0")
    right.set_title("tokens per second in evaluation")
    right.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} k" if value else "0")
    _finish(canvas, sweep)
    return canvas


@dataclass(frozen=True)
class Places:
    """Where the values of an option stand on an axis.

    Attributes:
        at: a place for each value.
        gap: where the axis is broken between 0 and the least positive value of a logarithmic axis, or None.
    """

    at: tuple[float, ...]
    gap: float | None = None


def places_of(values: Sequence[Any]) -> Places:
    """Numbers to scale, those that span a factor of 8 or more by their logarithm; others side by side.

    On a logarithmic axis 0 has no place; it gets one to the left of the others.
    """
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numeric or len(values) < 2 or not all(math.isfinite(value) for value in values):
        return Places(tuple(float(index) for index in range(len(values))))
    positive = sorted(value for value in values if value > 0)
    if min(values) < 0 or len(positive) < 2 or positive[-1] < 8 * positive[0]:
        return Places(tuple(float(value) for value in values))
    logs = [math.log2(value) for value in positive]
    step = statistics.median(b - a for a, b in pairwise(logs))
    at = tuple(math.log2(value) if value else logs[0] - step for value in values)
    return Places(at, gap=logs[0] - step / 2 if len(positive) < len(values) else None)


def _draw_others(axes: Any, sweep: Sweep, path: Entry) -> list[tuple[str, float, str]]:
    """A line for each combination of the options but the first; returns the lines' names, ends, colours."""
    ends, number = [], len(_others(sweep))
    for index, (rest, name) in enumerate(_others(sweep)):
        colour = _colours(sweep)[index]
        look = {"color": colour, "marker": MARKERS[index % len(MARKERS)]}
        ends += _draw_ways(
            axes, sweep, path, rest, look=look, name=name, beside=_beside(index, number, sweep)
        )
    return ends


def _draw_ways(
    axes: Any,
    sweep: Sweep,
    path: Entry,
    rest: tuple[int, ...],
    *,
    look: Mapping[str, Any],
    name: str,
    beside: float = 0.0,
) -> list[tuple[str, float, str]]:
    """A line for the trained points and one for the evaluated; the end of the first that there is."""
    places, ends = places_of(sweep.options[0].values).at, []
    for how in sweep.ways:
        rows = [sweep.at(how, (index, *rest)) for index in range(len(places))]
        figures = [None if row is None else row.figure(*path) for row in rows]
        drawn = [(x + beside, f) for x, f in zip(places, figures, strict=True) if f is not None]
        there = sorted(drawn, key=lambda entry: entry[0])
        if not there:
            continue
        _draw_line(axes, there, look, how)
        ends.append((name, there[-1][1].mean, str(look["color"])))
    return ends[:1]


def _beside(index: int, lines: int, sweep: Sweep) -> float:
    """A little to the side, so that lines with equal values do not hide each other's markers."""
    places = places_of(sweep.options[0].values).at
    return (index - (lines - 1) / 2) * min(0.008, 0.04 / lines) * (max(places) - min(places))


def _draw_line(axes: Any, there: Sequence[tuple[float, Figure]], look: Mapping[str, Any], how: str) -> None:
    x, values = [place for place, _ in there], [figure.mean for _, figure in there]
    hollow = how == EVALUATED
    axes.plot(x, values, **_strokes(look, how))
    if any(figure.bounds for _, figure in there):
        low, high = zip(*(figure.bounds or (figure.mean, figure.mean) for _, figure in there), strict=True)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.08 if hollow else 0.14, linewidth=0)


def _strokes(look: Mapping[str, Any], how: str) -> dict[str, Any]:
    """Trained: solid and filled. Evaluated: dashed and hollow, smaller and on top, so that both are seen."""
    hollow, colour = how == EVALUATED, look["color"]
    return {
        "color": colour,
        "marker": look["marker"],
        "linestyle": (0, (4, 2)) if hollow else "-",
        "linewidth": 1.6 if hollow else 2.2,
        "markersize": 5.0 if hollow else 7.0,
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "markeredgewidth": 1.2 if hollow else 0.7,
        "zorder": 2.3 if hollow else 2.1,
    }


def _finish_scores(axes: Any, sweep: Sweep, metrics: Sequence[Metric]) -> None:
    _set_places(axes, sweep.options[0])
    metric = metrics[-1]
    unit = metric["unit"] or metric.get("series") or title(metric["name"])
    axes.set_ylabel(f"{unit} ({'higher' if metric['higher_is_better'] else 'lower'} is better)")
    if unit == "accuracy":
        axes.set_ylim(-0.03, 1.04)
    reference(axes, sweep.runs, [metric], axes.get_xlim())


def _set_places(axes: Any, option: Option) -> None:
    places = places_of(option.values)
    low, high = min(places.at), max(places.at)
    margin = 0.06 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    labels = option.labels
    axes.set_xticks(places.at, labels, fontsize=10 if sum(map(len, labels)) < 36 else 8.5)
    axes.set_xlabel(option.short)
    axes.grid(axis="x", visible=False)
    if places.gap is not None:
        # Two strokes where the axis leaves out what lies between 0 and the first value.
        for shift in (-0.006, 0.006):
            middle = (places.gap - (low - margin)) / (high - low + 2 * margin) + shift
            axes.plot(
                [middle - 0.006, middle + 0.006],
                [-0.018, 0.018],
                transform=axes.transAxes,
                color="#9aa3ab",
                linewidth=1,
                clip_on=False,
            )


def _finish(canvas: Canvas, sweep: Sweep) -> None:
    canvas.suptitle(sweep.title, x=0.01, ha="left", fontweight="bold")
    if EVALUATED not in sweep.ways:
        legend_below(canvas)
        return
    words = {
        TRAINED: "trained with each value",
        EVALUATED: f"trained once with {base_in_words(sweep)}, evaluated with each value",
    }
    handles = [
        Line2D([], [], **_strokes({"color": _GREY, "marker": "o"}, how), label=words[how])
        for how in sweep.ways
    ]
    legend_below(canvas, handles)


def _legend_of_lines(canvas: Canvas, sweep: Sweep) -> None:
    handles = [
        Line2D([], [], color=colour, marker=MARKERS[index % len(MARKERS)], linewidth=2.2, label=name)
        for index, (colour, (_, name)) in enumerate(zip(_colours(sweep), _others(sweep), strict=True))
    ]
    canvas.legend(handles=handles, loc="outside right upper", fontsize=9.5, frameon=False)


def _others(sweep: Sweep) -> list[tuple[tuple[int, ...], str]]:
    """Places of the options but the first, and what to call each."""
    rest = sweep.options[1:]
    found = []
    for place in product(*(range(len(option.values)) for option in rest)):
        names = [f"{o.short} {o.labels[i]}" for o, i in zip(rest, place, strict=True)]
        found.append((place, ", ".join(names) or sweep.model))
    return found


def _colours(sweep: Sweep) -> list[str]:
    rest = sweep.options[1:]
    number = len(_others(sweep))
    if not rest:
        return [COLOURS.get(sweep.model, SPARE[0])]
    if len(rest) == 1 and number > 2:
        return _ramp(number)
    chosen = ("#1f6fb4", "#e08e1b", "#2e7d32", "#d1495b", *SPARE)
    return [chosen[index % len(chosen)] for index in range(number)]


def _ramp(number: int) -> list[str]:
    """Colours in order, light to dark, all of them legible on white."""
    ramp = mpl.colormaps["plasma"]
    return [mpl.colors.to_hex(ramp(0.82 - 0.8 * index / max(number - 1, 1))) for index in range(number)]


def _step(largest: float) -> float:
    """A power of two that parts 0 to `largest` into four to eight."""
    return 2.0 ** math.floor(math.log2(largest / 4))
