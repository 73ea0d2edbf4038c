"""Pictures of results, made up so that the right lines are known."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks import drawing, plots
from benchmarks.report import (
    write_report,
)
from benchmarks.results import Results
from benchmarks.summary import Comparison, load
from tests.benchmarks.made_up import GAPS, comparison_with_failures, record, scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison_with_failures(tmp_path)


def test_the_report_draws_every_picture(folder: Path, tmp_path: Path) -> None:
    paths = write_report(load(folder), tmp_path / "report")
    names = [path.name for path in paths]
    assert names == [
        "table.md",
        "index.html",
        "table.csv",
        "accuracy.png",
        "accuracy_map.png",
        "speed.png",
        "speed_map.png",
        "learning_curves.png",
        "quality_by_state.png",
        "quality_by_time.png",
    ]
    for path in paths[3:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"]({path.name})" in paths[0].read_text()


def test_quality_stands_against_the_time_of_training_where_it_was_told_apart(tmp_path: Path) -> None:
    labels = []
    for name, seconds in (("old", {"cpu": 64.0}), ("new", {"cpu": 64.0, "training cpu": 48.0})):
        results = Results(tmp_path / name)
        results.append(record("htm", 0, scores(0.5), seconds=seconds))
        canvas = plots.quality_by_time(load(results.folder))
        assert canvas is not None
        (axes,) = canvas.axes
        (point,) = [
            line.get_xdata() for line in axes.lines if line.get_marker() not in ("", "None", "|", "_")
        ]
        labels.append((axes.get_xlabel(), point[0]))
    assert labels == [("processor time of a run", 64.0), ("processor time of training", 48.0)]


def points(axes: Any) -> list[tuple[float, float]]:
    """Where the markers are that stand alone, one for each model."""
    alone = [line for line in axes.lines if line.get_marker() not in ("", "None", "|", "_")]
    return sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in alone)


def bands(axes: Any) -> list[dict[float, tuple[float, float]]]:
    """Of each band the lower and the upper end by place."""
    found = []
    for band in axes.collections:
        corners = [tuple(corner) for path in band.get_paths() for corner in path.vertices]
        ends = {x: [y for place, y in corners if place == x] for x in sorted({x for x, _ in corners})}
        found.append({x: (min(values), max(values)) for x, values in ends.items()})
    return found


def test_quality_stands_against_the_state(folder: Path) -> None:
    canvas = plots.quality_by_state(load(folder))
    assert canvas is not None
    (axes,) = canvas.axes
    # Two powers of two below the least that is carried, 8400 bytes, is the place of nothing.
    assert points(axes) == [(2048.0, 0.2), (8400.0, pytest.approx(0.95))]
    assert axes.get_xticklabels()[0].get_text() == "none"


def test_learning_curves_are_means_with_their_interval_as_a_band(folder: Path) -> None:
    canvas = plots.learning_curves(load(folder))
    assert canvas is not None
    losses, _ = canvas.axes
    final = [1.0, 1 / 2, 1 / 3]
    mean, half = statistics.mean(final), 4.303 * statistics.stdev(final) / math.sqrt(3)
    window, htm = [[*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in losses.lines]
    assert window == [(5, 2.0), (10, 1.0)]
    assert htm == [(5, 2.0), (10, pytest.approx(mean))]
    # One seed of the window has no interval.
    [band] = bands(losses)
    assert band == {5: (2.0, 2.0), 10: pytest.approx((mean - half, mean + half), rel=1e-3)}


def test_curves_have_their_interval_as_a_band(folder: Path) -> None:
    comparison = load(folder)
    name = "accuracy"
    canvas = plots.by_distance(comparison, name, comparison.series()[name])
    assert canvas is not None
    (axes,) = canvas.axes
    half = 4.303 * statistics.stdev([0.9, 0.95, 1.0]) / math.sqrt(3)
    [band] = bands(axes)
    assert len(band) == len(GAPS)
    assert all(ends == pytest.approx((0.95 - half, 0.95 + half), rel=1e-3) for ends in band.values())


def test_no_title_of_a_picture_leaves_it(folder: Path, tmp_path: Path) -> None:
    # Two columns are narrower than a title.
    results = Results(tmp_path)
    results.append(record("htm", 0, scores(0.9), weight_by_age={"htm/layer 1": {"1": 0.75, "2": 0.25}}))
    comparison, few = load(folder), load(tmp_path)
    [(name, metrics), *_] = comparison.series().items()
    with mpl.rc_context(drawing.STYLE):
        pictures = {
            "by age": plots.age_map(few),
            "by distance": plots.by_distance(comparison, name, metrics),
            "map": plots.heat_map(comparison, name, metrics),
            "learning": plots.learning_curves(comparison),
            "state": plots.quality_by_state(comparison),
            "time": plots.quality_by_time(comparison),
        }
        for kind, picture in pictures.items():
            assert picture is not None, kind
            FigureCanvasAgg(picture).draw()
            # Larger than the rest are titles alone. Ticks beyond the limits have a place but are not drawn.
            titles = [t for t in picture.findobj(Text) if t.get_text() and t.get_fontsize() >= 11]
            assert titles, kind
            for text in titles:
                box = text.get_window_extent()
                assert -1 <= box.x0 < box.x1 <= picture.bbox.x1 + 1, (kind, text.get_text())
                assert -1 <= box.y0 < box.y1 <= picture.bbox.y1 + 1, (kind, text.get_text())


def test_the_map_has_a_cell_for_each_model_and_point(folder: Path) -> None:
    comparison = load(folder)
    [(name, metrics), *_] = comparison.series().items()
    canvas = plots.heat_map(comparison, name, metrics)
    assert canvas is not None
    [axes] = canvas.axes
    finished = [row for row in comparison.rows if row.finished]
    assert axes.images[0].get_array().shape == (len(finished), len(metrics))
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.model for row in finished]
    wanted = [row.figure("scores", metric["name"]).mean for row in finished for metric in metrics]
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in wanted]
    assert plots.heat_map(comparison, name, metrics[:1]) is None


def test_a_member_keeps_its_colour(folder: Path) -> None:
    comparison = load(folder)
    looks = {row.model: drawing.look_of(comparison, row)["color"] for row in comparison.rows}
    assert len(set(looks.values())) == len(looks)
    (folder / "comparison.json").unlink()
    again = load(folder)
    assert looks == {row.model: drawing.look_of(again, row)["color"] for row in again.rows}


@pytest.mark.parametrize(
    "values", [[0.5], [1.0, 1.0, 1.0], [0.0, 0.02, 0.5, 0.98, 1.0], [1.0, 0.0, 1.0, 0.99]]
)
def test_labels_are_moved_apart_and_keep_their_order(values: list[float]) -> None:
    places = drawing.apart(values, 0.06, 0.0, 1.0)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    order = sorted(range(len(values)), key=lambda i: places[i])
    for below, above in itertools.pairwise(order):
        assert places[above] - places[below] >= 0.06 - 1e-9
        assert values[above] >= values[below]
    if len(values) == 1:
        assert places == values


def test_no_name_lies_on_an_interval() -> None:
    canvas = drawing.Canvas(figsize=(6, 4), dpi=100)
    axes = canvas.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 1))
    places = []
    for bars in ((), [(5.0, 0.2, 0.8)]):
        drawing.label_points(canvas, axes, [("htm", 5.0, 0.5, "black")], bars)
        canvas.draw_without_rendering()
        (text,) = axes.texts
        places.append(text.get_window_extent())
        text.remove()
    x, bottom = axes.transData.transform((5.0, 0.2))
    _, top = axes.transData.transform((5.0, 0.8))
    covers = [box.x0 < x < box.x1 and box.y0 < top and box.y1 > bottom for box in places]
    assert covers == [True, False]


@pytest.mark.parametrize("picture", [plots.learning_curves, plots.quality_by_state, plots.quality_by_time])
def test_the_legend_covers_no_panel(folder: Path, picture: Callable[[Comparison], Any]) -> None:
    canvas = picture(load(folder))
    canvas.draw_without_rendering()
    assert [axes.get_legend() for axes in canvas.axes] == [None] * len(canvas.axes)
    [legend] = canvas.legends
    below = legend.get_window_extent()
    assert all(not below.overlaps(axes.get_tightbbox()) for axes in canvas.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["chance"]
