"""The pictures of `memory-bench cost`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.document import Picture
from benchmarks.drawing import COLOURS, MARKERS, SPARE, STYLE, label_ends
from benchmarks.results import Record, write_atomically

_MIB = 2**20
_LINES = {"bptt": "-", "checkpoint": "--", "replay": "-", "truncated": ":"}
_SHADES = {"bptt": "#8a939c", "checkpoint": "#e08e1b", "replay": "#1f6fb4", "truncated": "#20242a"}


def draw_all(records: Sequence[Record], out: Path) -> list[Picture]:
    """Cost against length, and the trade-off between the ways of the gradient if there are several."""
    pictures = []
    with mpl.rc_context(STYLE):
        first = [record for record in records if record.get("decoding")]
        if len({record["case"]["length"] for record in first}) > 1:
            pictures.append(_keep(by_length(first), out / "cost_by_length.png", "Cost against length."))
        for model in dict.fromkeys(record["case"]["model"] for record in records):
            own = [record for record in records if record["case"]["model"] == model]
            if len({record["case"]["gradient"] for record in own}) > 1:
                caption = f"{model}: what the gradient through the segments costs, against their number."
                pictures.append(
                    _keep(trade_off(own), out / f"gradient_{model.replace(':', '.')}.png", caption)
                )
    return pictures


def by_length(records: Sequence[Record]) -> Canvas:
    """Four panels: training and decoding speed, peak memory, state, each a line for a model."""
    panels = (
        ("training: tokens/s", ("training", "tokens_per_second"), 1),
        ("decoding: tokens/s", ("decoding", "tokens_per_second"), 1),
        ("training: peak memory, MiB", ("training", "peak_bytes"), _MIB),
        ("state carried by a row, MiB", ("state_bytes",), _MIB),
    )
    canvas = Canvas(figsize=(12.4, 8.2), dpi=130, layout="constrained")
    names = list(dict.fromkeys(record["case"]["model"] for record in records))
    for axes, (title, path, unit) in zip(canvas.subplots(2, 2).flat, panels, strict=True):
        ends = []
        for name in names:
            points = sorted(
                (record["case"]["length"], value / unit)
                for record in records
                if record["case"]["model"] == name and (value := _at(record, path))
            )
            if not points:
                continue
            look = _look(name, names)
            axes.plot(
                *zip(*points, strict=True), **look, markersize=5.5, markeredgecolor="white", linewidth=2
            )
            ends.append((name, points[-1][1], look["color"]))
        _logarithmic(axes, sorted({record["case"]["length"] for record in records}))
        axes.set_title(title)
        axes.set_xlabel("tokens of a row")
        label_ends(axes, ends)
    return canvas


def trade_off(records: Sequence[Record]) -> Canvas:
    """Peak memory and time of a step against the number of segments, a line for each way of the gradient."""
    canvas = Canvas(figsize=(12.4, 4.6), dpi=130, layout="constrained")
    case = records[0]["case"]
    segment = case["options"]["segment_length"]
    ways = list(dict.fromkeys(record["case"]["gradient"] for record in records))
    panels = (
        ("held by autograd, MiB", ("training", "saved_bytes"), _MIB),
        ("peak memory of a step, MiB", ("training", "peak_bytes"), _MIB),
        ("seconds of a step", ("training", "seconds"), 1),
    )
    for axes, (title, path, unit) in zip(canvas.subplots(1, 3).flat, panels, strict=True):
        ends = []
        for way in ways:
            points = sorted(
                (record["case"]["length"] / segment, value / unit)
                for record in records
                if record["case"]["gradient"] == way and (value := _at(record, path))
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=_SHADES[way],
                    linestyle=_LINES[way],
                    marker="o",
                    linewidth=2,
                )
                ends.append((way, points[-1][1], _SHADES[way]))
        _logarithmic(axes, sorted({record["case"]["length"] // segment for record in records}))
        axes.set_title(title)
        axes.set_xlabel(f"segments of {segment} tokens")
        label_ends(axes, ends)
    canvas.suptitle(f"{case['model']}: gradients through the segments", x=0.01, ha="left", fontweight="bold")
    return canvas


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    others = [other for other in names if other not in COLOURS]
    colour = COLOURS.get(name) or SPARE[others.index(name) % len(SPARE)]
    return {"color": colour, "marker": MARKERS[[*COLOURS, *others].index(name) % len(MARKERS)]}


def _logarithmic(axes: Any, places: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _at(record: Record, path: Sequence[str]) -> float | None:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _keep(canvas: Canvas, path: Path, caption: str) -> Picture:
    buffer = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(buffer)
    write_atomically(path, buffer.getvalue())
    return Picture(path, caption)
