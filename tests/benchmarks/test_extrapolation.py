"""Longer than trained: which sequences, which models, and what the report says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drawing
from benchmarks.cli import main
from benchmarks.extrapolation import longer_points, to_json, training_assignments
from benchmarks.longer_report import draw_longer, longer_table, unseen
from benchmarks.report import markdown
from benchmarks.results import FAILED, Results, write_json
from benchmarks.settings import cached_task, plan
from benchmarks.summary import BOOTSTRAP, Figure, bootstrap_interval, load
from tests.benchmarks.made_up import FACTS, metric, record, scores


@pytest.mark.parametrize("task", ["needle", "selective-copy", "rewrite", "recall", "copy", "reverse"])
def test_a_longer_sequence_has_more_segments_of_the_same_tokens(task: str) -> None:
    first = plan("window", task, 0, smoke=True)
    room = training_assignments(task, (2, 4), first.task_options)
    spec = plan("window", task, 0, smoke=True, assignments=room)
    before = cached_task(task, spec.task_options)
    points = longer_points([spec], (2, 4))
    assert [point.factor for point in points] == [1, 2, 4]
    assert points[0].spec is spec
    for point in points[1:]:
        after = cached_task(task, point.spec.task_options)
        assert after.config.segments == point.factor * before.config.segments
        assert (after.vocab_size, after.segment_length) == (before.vocab_size, before.segment_length)
        assert point.spec.trained == spec
        assert point.spec.model_options == spec.model_options
        assert point.spec.id != spec.id
        [batch] = list(after.evaluation(batch_size=64))
        assert batch.tokens.shape[1] == point.factor * before.config.segments * before.segment_length
    assert len({entry["id"] for entry in to_json(points)}) == 3


def test_the_upper_control_sees_all_of_the_longer_sequence() -> None:
    spec = plan("full", "needle", 0, smoke=True, assignments=["context=10"])
    assert [p.spec.model_options["context"] for p in longer_points([spec], (2, 4))] == [10, 20, 40]


def test_what_cannot_be_lengthened_is_refused() -> None:
    with pytest.raises(ValueError, match="'ballet' cannot be lengthened"):
        training_assignments("ballet", (2,), {})
    with pytest.raises(ValueError, match="at least 2"):
        training_assignments("needle", (1, 2), {})


def test_the_report_tells_seen_gaps_from_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    results.append(record("htm", 0, scores(0.5)))
    more = [metric(f"mean accuracy/gap {gap}", "accuracy") for gap in (3, 4)]
    facts = {**FACTS, "metrics": [*FACTS["metrics"], *more]}  # type: ignore[misc]
    longer = {**scores(0.4), "mean accuracy/gap 3": 0.3, "mean accuracy/gap 4": 0.1}
    results.append(record("htm", 0, longer, id="htm-longer", task_facts=facts))
    run = {"id": "htm-0", "model": "htm", "seed": 0}
    points = [{**run, "factor": 1}, {**run, "id": "htm-longer", "factor": 2}]
    write_json(results.comparison, {"task": "made-up", "command": "", "runs": [run], "longer": points})
    comparison = load(tmp_path)
    assert longer_table(comparison, unseen) == [["model", "× 1", "× 2"], ["htm", "–", "0.200"]]
    assert "| htm | 0.500 | 0.400 |" in markdown(comparison)
    asked = {"mean accuracy/gap 3": 300, "mean accuracy/gap 4": 50}
    results.append(record("htm", 0, longer, id="htm-longer", task_facts=facts, asked=asked))
    # The second gap was asked for half of a hundred times: (0.3 + 0.5 * 0.1) / 1.5.
    assert longer_table(load(tmp_path), unseen) == [["model", "× 1", "× 2"], ["htm", "–", "0.233"]]
    [picture] = draw_longer(comparison, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn: list[Any] = []
    monkeypatch.setattr(drawing, "write_pictures", lambda pictures, out: drawn.extend(pictures.values()))
    draw_longer(comparison, tmp_path)
    lines = [
        [[*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in axes.lines]
        for axes in drawn[0].axes
    ]
    assert lines[0] == [[(1, 0.5), (2, 0.4)]]
    [[(_, trained), longer_point]] = lines[1]
    assert math.isnan(trained)
    assert longer_point == (2, pytest.approx(0.2))


def test_what_failed_on_longer_sequences_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path)
    runs, points = [], []
    for model, seed in (("htm", 0), ("htm", 1), ("memxl", 0), ("gru", 0)):
        runs.append({"id": f"{model}-{seed}", "model": model, "seed": seed})
        results.append(record(model, seed, scores(0.5)))
        points += [{**runs[-1], "factor": 1}, {**runs[-1], "id": f"{model}-{seed}-longer", "factor": 4}]
    bad = {"status": FAILED, "error": "too long"}
    results.append(record("htm", 0, scores(0.4), id="htm-0-longer"))
    results.append(record("htm", 1, {}, id="htm-1-longer", **bad))
    results.append(record("memxl", 0, {}, id="memxl-0-longer", **bad))
    noted = {"task": "made-up", "command": "", "runs": runs, "longer": points}
    write_json(results.comparison, noted)
    comparison = load(tmp_path)
    assert [entry["id"] for entry in comparison.failures] == ["htm-1-longer", "memxl-0-longer"]
    text = markdown(comparison)
    assert "| htm | 0.500 | 0.400 (1 of 2) |" in text
    assert "| memxl | 0.500 | failed |" in text
    assert "htm seed 1 at × 4 failed: too long" in text
    assert "gru seed 0 at × 4 has not ended yet" in text
    assert main(["report", str(tmp_path)]) == 0
    assert "memxl seed 0 at × 4 failed: too long" in capsys.readouterr().out
    assert "memxl seed 0 at × 4 failed: too long" in (tmp_path / "index.html").read_text()
    results.append(record("memxl", 0, scores(0.4), id="memxl-0-longer"))
    assert "memxl seed 0 at × 4 failed once, then succeeded: too long" in markdown(load(tmp_path))


def test_a_bootstrap_interval_is_that_of_all_drawings() -> None:
    # Of three values all drawings are known: the lowest alone has 1 in 27, more than 2.5 %.
    assert bootstrap_interval((0.9, 1.0, 0.7)) == pytest.approx((0.7, 1.0))
    # Of four, 256 drawings: six are left out at either end. Of 0, 0, 0, 1 the mean is 0 in 81 drawings, three
    # quarters in 12 and 1 in one, so that the seventh from above is three quarters.
    assert bootstrap_interval((0.0, 0.0, 0.0, 1.0)) == (0.0, 0.75)
    many = tuple(float(value) for value in range(100))
    low, high = bootstrap_interval(many)
    # Normal theory: the mean 49.5, and 1.96 times 28.87 / 10 on both sides.
    assert (low, high) == (pytest.approx(49.5 - 5.66, abs=0.4), pytest.approx(49.5 + 5.66, abs=0.4))
    bootstrap_interval.cache_clear()
    assert bootstrap_interval(many) == (low, high)


def test_a_figure_shows_the_interval_that_was_asked_for(tmp_path: Path) -> None:
    figure = Figure.of([0.9, 0.95, 1.0], interval=BOOTSTRAP)
    assert figure is not None
    assert figure.bounds == pytest.approx((0.9, 1.0))
    two = Figure.of([0.9, 0.95], interval=BOOTSTRAP)
    assert two is not None
    assert two.bounds is None
    results = Results(tmp_path)
    for seed, value in enumerate((0.9, 0.95, 1.0)):
        results.append(record("htm", seed, scores(value)))
    text = markdown(load(tmp_path, interval=BOOTSTRAP))
    assert "| htm | 0.950 [0.900 1.000] |" in text
    assert "percentile bootstrap over the seeds" in text
    assert "Student's t)." in markdown(load(tmp_path))
    with pytest.raises(ValueError, match="bootstrap"):
        load(tmp_path, interval="exact")
