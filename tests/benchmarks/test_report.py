"""Tables and plots from results, made up so that the right cells are known."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks import document, drawing, plots
from benchmarks.formatting import count, number, size
from benchmarks.report import (
    as_csv,
    main_metrics,
    markdown,
    table,
    write_report,
)
from benchmarks.results import DIVERGED, FAILED, FINISHED, Results, write_json
from benchmarks.summary import Comparison, Figure, NothingToReportError, load

GAPS = ("gap 0", "gap 1", "gap 2")


def metric(name: str, series: str | None = None) -> dict[str, Any]:
    return {"name": name, "higher_is_better": True, "unit": "accuracy", "series": series}


FACTS = {
    "summary": "a made-up task",
    "headline": "mean accuracy",
    "metrics": [
        *(metric(f"speed/{place}", "speed") for place in ("slow", "fast")),
        *(metric(f"mean accuracy/{gap}", "accuracy") for gap in GAPS),
        metric("worst accuracy"),
        metric("mean accuracy"),
    ],
    "floor": {f"mean accuracy/{gap}": value for gap, value in zip(GAPS, (1.0, 0.25, 0.25), strict=True)},
    "floor_is": "best without memory (exact)",
    "chance": {"mean accuracy": 0.25, "mean accuracy/gap 0": None},
    "facts": {"letters": 26},
}


def record(model: str, seed: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{model}-{seed}",
        "model": model,
        "task": "made-up",
        "seed": seed,
        "tags": ["control"] if model == "window" else ["family"],
        "status": FINISHED,
        "command": f"memory-bench run --model {model} --task made-up --seed {seed}",
        "settings": {"train": {"steps": 10, "batch_size": 2, "threads": 1}},
        "versions": {"cpu": "abacus", "torch": "2", "python": "3", "memory-models": "0"},
        "task_facts": FACTS,
        "parameters": 89_123,
        "state_bytes": 0 if model == "window" else 8400.0,
        "peak_bytes": 3 * 2**28,
        "tokens_per_second": 25_000.0,
        "seconds": {"training": 60.0, "evaluation": 5.0, "cpu": 64.0},
        "loss": 0.1,
        "curve": [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0 / (seed + 1), "score": 0.5}],
        "scores": scores,
        "memory_use": {
            "drop": {"none": 0.7, "shuffled": 0.6, "frozen": 0.5},
            "scores": {mode: {"mean accuracy": 0.3} for mode in ("carried", "none", "shuffled", "frozen")},
        },
        **changes,
    }


def scores(value: float) -> dict[str, float]:
    return {entry["name"]: value for entry in FACTS["metrics"]}  # type: ignore[index]


def failure(model: str, seed: int, status: str) -> dict[str, Any]:
    entry = record(model, seed, {})
    kept = {name: entry[name] for name in ("id", "model", "task", "seed", "tags", "command", "settings")}
    return {**kept, "status": status, "error": "the loss is nan at step 3 of 10"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = Results(tmp_path / "results")
    results.append(record("window", 0, scores(0.2)))
    for seed, value in enumerate((0.9, 0.95, 1.0)):
        if seed == 1:
            results.append(failure("htm", 1, FAILED))
        results.append(record("htm", seed, scores(value)))
    results.append(failure("memxl", 0, DIVERGED))
    ids = ["window-0", "htm-0", "htm-1", "htm-2", "memxl-0", "gru-0"]
    runs = [{"id": i, "model": i[:-2], "seed": int(i[-1])} for i in ids]
    write_json(results.comparison, {"task": "made-up", "command": "memory-bench compare", "runs": runs})
    return results.folder


def cells(folder: Path) -> dict[str, dict[str, str]]:
    comparison = load(folder)
    header, *body = table(comparison, metrics=main_metrics(comparison), costs=True)
    return {line[0]: dict(zip(header, line, strict=True)) for line in body}


def test_families_come_first_then_controls_then_floor_and_chance(folder: Path) -> None:
    assert list(cells(folder)) == ["htm", "memxl (diverged)", "window", "best without memory", "chance"]


def test_the_headline_comes_first_then_the_rest_and_its_own_curve(folder: Path) -> None:
    assert list(cells(folder)["htm"])[:6] == ["model", "mean accuracy", "worst accuracy", *GAPS]


def test_cells_are_means_with_an_interval_from_three_seeds_on(folder: Path) -> None:
    # Student's t for two degrees of freedom, from a printed table.
    half = 4.303 * statistics.stdev([0.9, 0.95, 1.0]) / math.sqrt(3)
    assert cells(folder)["htm"]["mean accuracy"] == f"0.950 ± {half:.3f}"
    assert cells(folder)["window"]["mean accuracy"] == "0.200"
    assert cells(folder)["memxl (diverged)"]["mean accuracy"] == "–"
    assert cells(folder)["best without memory"]["gap 1"] == "0.250"
    assert cells(folder)["best without memory"]["mean accuracy"] == "–"
    assert cells(folder)["chance"]["mean accuracy"] == "0.250"


def test_costs_stand_beside_the_score(folder: Path) -> None:
    window = cells(folder)["window"]
    assert window["drop without memory"] == "0.700"
    assert window["parameters"] == "89.1 k"
    assert window["state per row"] == "0 B"
    assert window["peak memory"] == "768 MiB"
    assert window["tokens/s"] == "25.0 k"
    assert cells(folder)["htm"]["state per row"].startswith("8.2 KiB")


def test_numbers_read_well() -> None:
    def one(value: float, half: float | None = None) -> Figure:
        return Figure(mean=value, half_width=half, count=3)

    assert number(one(0.98765)) == "0.988"
    assert number(one(32.6149, 0.51)) == "32.61 ± 0.51"
    assert number(one(-0.25)) == "−0.250"
    assert number(one(-0.0001)) == "0.000"
    assert number(None) == "–"
    assert [count(one(v)) for v in (12, 999, 1500, 123_456, 7_720_000)] == [
        "12",
        "999",
        "1.5 k",
        "123 k",
        "7.7 M",
    ]
    assert [size(one(v)) for v in (100, 2048, 5 * 2**20)] == ["100 B", "2.0 KiB", "5.0 MiB"]


def test_a_figure_leaves_out_what_is_not_there() -> None:
    assert Figure.of([None, math.nan]) is None
    assert Figure.of([1.0, None, 2.0]) == Figure(mean=1.5, half_width=None, count=2, missing=1)


def test_a_figure_that_some_seeds_do_not_have_says_so(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, value in enumerate((0.5, float("nan"), 0.75)):
        results.append(record("htm", seed, scores(value)))
    comparison = load(tmp_path)
    text = markdown(comparison)
    assert "| htm | 0.625 (2 of 3) |" in text
    assert "the others gave no number" in text
    assert document._NUMBER.match("0.625 [0.500 0.750] (2 of 3)")
    [line, *_] = csv.DictReader(io.StringIO(as_csv(comparison)))
    assert (line["finished"], line[f"{comparison.headline} seeds"]) == ("3", "2")
    # Where all seeds have it, nothing is added.
    assert number(Figure.of([0.5, 0.75])) == "0.625"


def test_the_markdown_says_what_went_wrong_and_how_to_do_it_again(folder: Path) -> None:
    text = markdown(load(folder))
    assert "memxl seed 0 diverged: the loss is nan at step 3 of 10" in text
    assert "htm seed 1 failed once, then succeeded" in text
    assert "gru seed 0 has not ended yet" in text
    assert "memory-bench run --model htm --task made-up --seed 2" in text
    assert "Data: letters: 26." in text
    assert "abacus" in text
    assert "## speed" in text
    assert "every segment starts with a fresh memory" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == rows[0].count("|") for line in rows[:7])


def test_every_commit_is_named_with_the_models_it_made(tmp_path: Path) -> None:
    results = Results(tmp_path)
    made = {"cpu": "abacus", "torch": "2", "python": "3", "memory-models": "0"}
    for model, seed, commit in (
        ("htm", 0, "aaa"),
        ("htm", 1, "aaa"),
        ("window", 0, "aaa"),
        ("gru", 0, "aaa"),
    ):
        results.append(record(model, seed, {"mean accuracy": 0.5}, versions={**made, "commit": commit}))
    assert "memory-models 0, commit aaa." in markdown(load(tmp_path))
    changed = {**made, "torch": "3", "commit": "bbb"}
    results.append(record("window", 1, {"mean accuracy": 0.5}, versions=changed))
    text = markdown(load(tmp_path))
    assert "torch 2 and 3, Python 3, memory-models 0, commits aaa (htm, " in text
    assert text.count("bbb (window).") == 1


def test_rarely_asked_points_are_named(tmp_path: Path) -> None:
    results = Results(tmp_path)
    scores = {f"mean accuracy/{gap}": 0.5 for gap in GAPS}
    asked = {f"mean accuracy/{gap}": n for gap, n in zip(GAPS, (500, 100, 12), strict=True)}
    results.append(record("htm", 0, {**scores, "mean accuracy": 0.5}, asked=asked))
    assert "Asked less than 100 times, and counted in proportion in a mean over all: gap 2 (12)." in markdown(
        load(tmp_path)
    )


def test_the_csv_holds_the_numbers_in_full(folder: Path) -> None:
    lines = {line["model"]: line for line in csv.DictReader(io.StringIO(as_csv(load(folder))))}
    assert float(lines["htm"]["mean accuracy"]) == pytest.approx(0.95)
    assert float(lines["htm"]["mean accuracy ±"]) == pytest.approx(0.1242, abs=1e-3)
    assert lines["htm"]["finished"] == "3"
    assert lines["memxl"]["status"] == "diverged"
    assert lines["memxl"]["mean accuracy"] == ""
    assert float(lines["window"]["drop with memory frozen"]) == 0.5
    assert float(lines["chance"]["mean accuracy"]) == 0.25


def test_without_a_comparison_the_last_run_of_each_kind_counts(folder: Path) -> None:
    (folder / "comparison.json").unlink()
    Results(folder).append(record("window", 0, scores(0.4), id="window-other"))
    assert cells(folder)["window"]["mean accuracy"] == "0.400"


def test_without_a_comparison_each_variant_of_a_model_has_a_row(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed in (0, 1):
        results.append(record("memformer", seed, scores(0.2), label="memformer"))
        replayed = {"id": f"replayed-{seed}", "label": "memformer gradient=replay"}
        results.append(record("memformer", seed, scores(0.8), **replayed))
    shown = cells(tmp_path)
    assert shown["memformer"]["mean accuracy"] == "0.200"
    assert shown["memformer gradient=replay"]["mean accuracy"] == "0.800"


def test_runs_of_one_label_are_told_apart_by_their_options(tmp_path: Path) -> None:
    # As old records are, without a label; the second kind was made by a library with one setting more.
    results = Results(tmp_path)
    train = {"steps": 10, "batch_size": 2, "threads": 1}
    for slots, value in ((None, 0.2), (8, 0.4), (16, 0.6)):
        options = {"dim": 4} if slots is None else {"dim": 4, "slots": slots}
        new = {"unroll": 1} if slots == 8 else {}
        settings = {"train": {**train, **new}, "model_options": options}
        for seed in (0, 1):
            results.append(record("memformer", seed, scores(value), id=f"{slots}-{seed}", settings=settings))
    shown = cells(tmp_path)
    rows = {name: line["mean accuracy"] for name, line in shown.items() if name.startswith("memformer")}
    assert rows == {"memformer": "0.200", "memformer slots=8": "0.400", "memformer slots=16": "0.600"}


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NothingToReportError, match="memory-bench compare"):
        load(tmp_path)


def test_a_comparison_in_which_all_failed_still_has_a_table(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append(failure("htm", 0, DIVERGED))
    paths = write_report(load(tmp_path), tmp_path)
    assert [path.name for path in paths] == ["table.md", "index.html", "table.csv"]
    assert "htm (diverged)" in (tmp_path / "table.md").read_text()


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


def test_a_suspicious_memory_is_warned_of_and_diagnostics_are_shown(tmp_path: Path) -> None:
    results = Results(tmp_path)
    unused = {
        "drop": {"none": 0.001, "shuffled": 0.0, "frozen": 0.0},
        "scores": {mode: {"mean accuracy": 0.3} for mode in ("carried", "none", "shuffled", "frozen")},
    }
    found = {"htm/hit age": {"mean": 12.5, "low": 1.0, "high": 40.0}}
    for seed in (0, 1):
        use = {"memory_use": unused} if seed else {}
        results.append(
            record("htm", seed, scores(0.3), diagnostics=found, memory_gradients={"gate": 0.0125}, **use)
        )
    text = markdown(load(tmp_path))
    assert "**Warning:** htm: the memory is not used: without it mean accuracy is 0.300" in text
    assert "(seed 1)" in text
    assert "| htm: htm/hit age | 12.50 | 1.000 | 40.00 |" in text
    assert "| htm: gate | 0.013 |" in text


def test_the_age_of_what_is_read_is_a_table_and_a_picture_up_to_the_oldest(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for model, shares in (("htm", (0.25, 0.75, 0.0, 0.0)), ("memorizing", (0.5, 0.25, 0.25, 0.0))):
        for seed in (0, 1):
            ages = {f"{model}/layer 1": dict(zip(("1", "2", "3-4", "5-8"), shares, strict=True))}
            results.append(record(model, seed, scores(0.9), weight_by_age=ages))
    results.append(record("window", 0, scores(0.2), weight_by_age={}))
    comparison = load(tmp_path)
    text = markdown(comparison)
    assert "| segments back | 1 | 2 | 3-4 |\n" in text
    assert "| htm: htm/layer 1 | 0.250 | 0.750 | 0.000 |\n" in text
    assert "| memorizing: memorizing/layer 1 | 0.500 | 0.250 | 0.250 |\n" in text
    canvas = plots.age_map(comparison)
    assert canvas is not None
    assert [t.get_text() for t in canvas.axes[0].texts] == ["0.25", "0.75", "0.00", "0.50", "0.25", "0.25"]


def test_the_pictures_come_before_the_long_tables(folder: Path, tmp_path: Path) -> None:
    write_report(load(folder), tmp_path)
    headings = re.findall(r"^## (.*)$", (tmp_path / "table.md").read_text(), flags=re.MULTILINE)
    assert (
        headings.index("Pictures") < headings.index("Is the memory used?") < headings.index("To do it again")
    )


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


@pytest.mark.parametrize(("count", "point"), [(3, 4.303), (16, 2.131), (17, 2.120), (21, 2.086), (61, 2.000)])
def test_students_t_is_that_of_the_tables(count: int, point: float) -> None:
    values = [float(i % 2) for i in range(count)]
    figure = Figure.of(values)
    assert figure is not None
    assert figure.half_width == pytest.approx(point * statistics.stdev(values) / math.sqrt(count), rel=1e-3)


@pytest.mark.parametrize("picture", [plots.learning_curves, plots.quality_by_state, plots.quality_by_time])
def test_the_legend_covers_no_panel(folder: Path, picture: Callable[[Comparison], Any]) -> None:
    canvas = picture(load(folder))
    canvas.draw_without_rendering()
    assert [axes.get_legend() for axes in canvas.axes] == [None] * len(canvas.axes)
    [legend] = canvas.legends
    below = legend.get_window_extent()
    assert all(not below.overlaps(axes.get_tightbbox()) for axes in canvas.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["chance"]
