"""The pictures of a comparison, and how every picture looks. Drawn without a screen."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'memory-models[bench]'") from error

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from benchmarks.results import write_atomically
from benchmarks.summary import Comparison, Figure, Row, point, title

# One colour for each member, the same in every picture of every report.
COLOURS = {
    "htm": "#d1495b",
    "memformer": "#2e7d32",
    "memorizing": "#1f6fb4",
    "memxl": "#e08e1b",
    "full": "#20242a",
    "transformer-xl": "#7d5ba6",
    "gru": "#8c6d4f",
    "window": "#8a939c",
}
SPARE = ("#00897b", "#c2185b", "#5c6bc0", "#9e9d24", "#0097a7", "#6d4c41", "#ef5350", "#26a69a")
MARKERS = "osD^vPX><p"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#3b4248",
    "xtick.color": "#3b4248",
    "ytick.color": "#3b4248",
}


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
        return write_pictures(pictures, out)


def write_pictures(pictures: Mapping[str, Canvas | None], out: Path) -> list[Path]:
    """Write what there is to draw as PNG, by file name; returns the files."""
    paths = []
    for name, canvas in pictures.items():
        if canvas is None:
            continue
        buffer = io.BytesIO()
        FigureCanvasAgg(canvas).print_png(buffer)
        write_atomically(out / name, buffer.getvalue())
        paths.append(out / name)
    return paths


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
        look = _look(comparison, row)
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
    # Dark is good, in both directions.
    axes.imshow(values, cmap="viridis_r" if up else "viridis", vmin=low, vmax=high, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                share = (value - low) / ((high - low) or 1)
                dark = share > 0.45 if up else share < 0.55
                text = f"{value:.2f}" if high <= 10 else f"{value:.1f}"
                axes.text(
                    x, y, text, ha="center", va="center", color="white" if dark else "#20242a", fontsize=9
                )
    axes.set_xticks(range(len(metrics)), [point(metric["name"]) for metric in metrics])
    axes.set_yticks(range(len(rows)), [row.model for row in rows])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{comparison.task}: {name} ({'higher' if up else 'lower'} is better)")
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
            look = _look(comparison, row)
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
    canvas, axes, points = made
    last = 2 ** math.ceil(math.log2(max(positive)))
    axes.set_xlim(first / 1.7, last * 1.7)
    every = max(1, round(math.log2(last / first) / 7))
    ticks = [first * 2**power for power in range(0, round(math.log2(last / first)) + 1, every)]
    axes.set_xticks(ticks, ["none" if nothing and t == first else byte_label(t) for t in ticks])
    axes.set_xlabel("state carried by a row")
    axes.set_title(f"{comparison.task}: quality against state")
    _label_points(canvas, axes, points)
    return canvas


def quality_by_time(comparison: Comparison) -> Canvas | None:
    """Headline score against the seconds of processor time that training and evaluation took."""
    drawn = [row for row in _drawn(comparison) if row.figure("seconds", "cpu")]
    places = {row.model: figure.mean for row in drawn if (figure := row.figure("seconds", "cpu")) is not None}
    made = _quality_against(comparison, drawn, places)
    if made is None:
        return None
    canvas, axes, points = made
    low, high = min(places.values()), max(places.values())
    axes.set_xlim(low / 1.35, high * 1.35)
    ticks = [t for power in range(-1, 6) for t in (10**power, 2 * 10**power, 5 * 10**power)]
    shown = [t for t in ticks if low / 1.35 <= t <= high * 1.35]
    axes.set_xticks(shown, [f"{t:g} s" for t in shown])
    axes.set_xlabel("processor time of a run")
    axes.set_title(f"{comparison.task}: quality against time")
    _label_points(canvas, axes, points)
    return canvas


def _quality_against(
    comparison: Comparison, rows: Sequence[Row], places: Mapping[str, float]
) -> tuple[Canvas, Any, list[tuple[str, float, float, str]]] | None:
    canvas = Canvas(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = canvas.add_subplot()
    points = []
    for row in rows:
        score = row.figure("scores", comparison.headline)
        if score is None:
            continue
        look = _look(comparison, row) | {"linestyle": "", "markersize": 9}
        ends = score.bounds or (score.mean, score.mean)
        # Rounding may put the mean outside the range of its own values.
        bars = [[max(score.mean - ends[0], 0.0)], [max(ends[1] - score.mean, 0.0)]]
        shown = bars if score.bounds else None
        axes.errorbar([places[row.model]], [score.mean], yerr=shown, capsize=3, **look)
        points.append((row.model, places[row.model], score.mean, look["color"]))
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
    return canvas, axes, points


def _drawn(comparison: Comparison) -> list[Row]:
    # Controls first, so that the families lie on top of them.
    return sorted((row for row in comparison.rows if row.finished), key=lambda row: not row.control)


def look_of(comparison: Comparison, row: Row) -> dict[str, Any]:
    """How the lines of a model look, the same in every picture."""
    return _look(comparison, row)


def _look(comparison: Comparison, row: Row) -> dict[str, Any]:
    names = sorted(r.model for r in comparison.rows if r.model not in COLOURS)
    colour = COLOURS.get(row.model)
    if colour is None:
        colour = SPARE[names.index(row.model) % len(SPARE)]
    known = [*COLOURS, *names]
    return {
        "color": colour,
        "marker": MARKERS[known.index(row.model) % len(MARKERS)],
        "markersize": 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "linewidth": 1.5 if row.control else 2.2,
        "linestyle": "--" if row.control else "-",
    }


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


def draw_band(axes: Any, places: Sequence[float], figures: Sequence[Figure | None], colour: str) -> None:
    """The intervals of a line's points as a band around it; nothing if there are none."""
    ends = [
        (math.nan, math.nan) if figure is None else figure.bounds or (figure.mean, figure.mean)
        for figure in figures
    ]
    if any(low < high for low, high in ends):
        low, high = zip(*ends, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def reference(
    axes: Any, comparison: Comparison, metrics: Sequence[Mapping[str, Any]], places: Sequence[float]
) -> None:
    """Lines for the floor and chance at the metrics' places, where the scale has room for them."""
    # Floor and chance of text are far above every model; drawn to scale they would flatten the rest.
    low, high = axes.get_ylim()
    room = high - low
    lines = []
    for key, style in (("floor", ":"), ("chance", (0, (5, 4)))):
        values = [comparison.facts.get(key, {}).get(metric["name"]) for metric in metrics]
        shown = [v for v in values if v is not None and math.isfinite(v)]
        if len(shown) < len(values):
            continue
        if (
            metrics[0]["unit"] != "accuracy"
            and not low - room / 2 < min(shown) <= max(shown) < high + room / 2
        ):
            continue
        line = shown if len(shown) == len(places) else [shown[0]] * len(places)
        words = key if key == "chance" else str(comparison.facts.get("floor_is", key)).partition(" (")[0]
        lines += axes.plot(
            places, line, color="#5b646c", linestyle=style, linewidth=1.3, zorder=1.5, label=words
        )
    if lines:
        legend = axes.legend(handles=lines, loc="best", fontsize=8.5, framealpha=0.85, edgecolor="none")
        legend.set_zorder(1.8)


def label_ends(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the right end of the lines, moved apart where they would lie on each other."""
    if not ends:
        return
    right = axes.get_xlim()[1]
    # In shares of the height, so that a logarithmic axis is no exception.
    to_share = axes.transData + axes.transAxes.inverted()
    places = _apart([to_share.transform((right, value))[1] for _, value, _ in ends], 0.058, 0.0, 1.0)
    for (name, value, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name,
            (right, value),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5)},
        )


def _label_points(canvas: Canvas, axes: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Each point's name beside it, at the first of some places where it covers nothing else."""
    canvas.draw_without_rendering()
    scale = canvas.dpi / 72
    pixels = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in pixels]
    for (name, x, y, colour), (px, py) in zip(points, pixels, strict=True):
        width, height = 6.3 * scale * len(name), 11 * scale
        best = None
        for dx, dy in _PLACES:
            left = px + dx * scale - (width / 2 if dx == 0 else width if dx < 0 else 0)
            box = (left, py + dy * scale - height / 2, left + width, py + dy * scale + height / 2)
            hits = sum(_overlap(box, other) for other in taken)
            if best is None or hits < best[0]:
                best = (hits, dx, dy, box)
        assert best is not None
        _, dx, dy, box = best
        taken.append(box)
        axes.annotate(
            name,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            color=colour,
            fontsize=9.5,
            ha="center" if dx == 0 else "right" if dx < 0 else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7}
            if abs(dy) > 16
            else None,
        )


_PLACES = (
    (0, 13),
    (0, -13),
    (9, 0),
    (-9, 0),
    (9, -13),
    (-9, -13),
    (0, -28),
    (0, 26),
    (12, -28),
    (0, -43),
    (0, -58),
)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _figure_mean(row: Row, metric: str) -> float:
    figure = row.figure("scores", metric)
    return math.nan if figure is None else figure.mean


def _mean(row: Row, name: str) -> float:
    figure = row.figure(name)
    assert figure is not None
    return figure.mean


def _apart(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places as near as may be to `values`, in their order, at least `step` from each other."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Groups of labels that touch: the sum of their wishes and their number.
    groups: list[list[float]] = []
    for index in order:
        groups.append([values[index], 1])
        while (
            len(groups) > 1 and _start(groups[-1], step, low, high) < _end(groups[-2], step, low, high) + step
        ):
            total, number = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += number
    places = [
        _start(group, step, low, high) + place * step for group in groups for place in range(int(group[1]))
    ]
    found = [0.0] * len(values)
    for index, place in zip(order, places, strict=True):
        found[index] = place
    return found


def _start(group: Sequence[float], step: float, low: float, high: float) -> float:
    total, number = group
    length = (number - 1) * step
    return max(low, min(total / number - length / 2, high - length))


def _end(group: Sequence[float], step: float, low: float, high: float) -> float:
    return _start(group, step, low, high) + (group[1] - 1) * step


def byte_label(value: float) -> str:
    """Bytes as a tick: `64 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} GiB"
