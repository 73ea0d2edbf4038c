"""How every picture of every report looks: colours, the lines around a curve, labels that cover nothing."""

from __future__ import annotations

import io
import math
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
from benchmarks.summary import Comparison, Figure, Row

__all__ = [
    "COLOURS",
    "MARKERS",
    "SPARE",
    "STYLE",
    "Canvas",
    "apart",
    "byte_label",
    "draw_band",
    "draw_cells",
    "label_ends",
    "label_points",
    "legend_below",
    "look_of",
    "mpl",
    "reference",
    "write_pictures",
]

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


def look_of(comparison: Comparison, row: Row) -> dict[str, Any]:
    """How the lines of a model look, the same in every picture."""
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
    """Lines for the floor and chance at the metrics' places, where the scale has room for them.

    `legend_below` explains them.
    """
    # Floor and chance of text are far above every model; drawn to scale they would flatten the rest.
    low, high = axes.get_ylim()
    room = high - low
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
        axes.plot(places, line, color="#5b646c", linestyle=style, linewidth=1.3, zorder=1.5, label=words)


def legend_below(canvas: Canvas, more: Sequence[Any] = ()) -> None:
    """Explain what has a label, and the handles `more`, below the panels; the layout must be "constrained".

    Between the lines of eight models there is hardly ever a place that covers none of them.
    """
    labelled: dict[str, Any] = {}
    for line in (*more, *(line for axes in canvas.axes for line in axes.lines)):
        if not line.get_label().startswith("_"):
            labelled.setdefault(line.get_label(), line)
    if labelled:
        canvas.legend(
            handles=[*labelled.values()],
            loc="outside lower left" if more else "outside lower right",
            ncols=2,
            fontsize=9,
            frameon=False,
            handlelength=3.6,
        )


def draw_cells(
    axes: Any, shares: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], rows: Sequence[str]
) -> None:
    """A heat map with a text in each cell; dark is good.

    Args:
        axes: to draw on; the names of the columns are left to the caller.
        shares: lines of values from 0 (worst) to 1 (best), or NaN for no colour.
        texts: of the cells, alike.
        rows: names of the lines.
    """
    axes.imshow(shares, cmap="viridis_r", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(texts):
        for x, text in enumerate(line):
            colour = "white" if shares[y][x] > 0.45 else "#20242a"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def label_ends(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the right end of the lines, moved apart where they would lie on each other."""
    if not ends:
        return
    right = axes.get_xlim()[1]
    # In shares of the height, so that a logarithmic axis is no exception.
    to_share = axes.transData + axes.transAxes.inverted()
    places = apart([to_share.transform((right, value))[1] for _, value, _ in ends], 0.058, 0.0, 1.0)
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


def label_points(
    canvas: Canvas,
    axes: Any,
    points: Sequence[tuple[str, float, float, str]],
    bars: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Each point's name beside it, at the first of some places where it covers nothing else.

    Args:
        canvas: the picture.
        axes: where the points are drawn.
        points: name, x, y and colour of each.
        bars: x, lower and upper end of vertical lines that no name shall cover.
    """
    canvas.draw_without_rendering()
    scale = canvas.dpi / 72
    pixels = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in pixels]
    for x, low, high in bars:
        (px, bottom), (_, top) = (axes.transData.transform((x, y)) for y in (low, high))
        taken.append((px - 3, bottom, px + 3, top))
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


def apart(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
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
