"""Tables from results, made up so that the right cells are known."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import document, plots
from benchmarks.formatting import count, number, size
from benchmarks.report import (
    as_csv,
    main_metrics,
    markdown,
    table,
    write_report,
)
from benchmarks.results import DIVERGED, Results
from benchmarks.summary import Figure, NothingToReportError, load
from tests.benchmarks.made_up import GAPS, comparison_with_failures, failure, record, scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison_with_failures(tmp_path)


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


@pytest.mark.parametrize(("count", "point"), [(3, 4.303), (16, 2.131), (17, 2.120), (21, 2.086), (61, 2.000)])
def test_students_t_is_that_of_the_tables(count: int, point: float) -> None:
    values = [float(i % 2) for i in range(count)]
    figure = Figure.of(values)
    assert figure is not None
    assert figure.half_width == pytest.approx(point * statistics.stdev(values) / math.sqrt(count), rel=1e-3)
