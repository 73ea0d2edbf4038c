"""All tasks in one table, from results made up so that the right cells are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.document import Table, as_markdown
from benchmarks.overview import Overview, document, draw, gather
from benchmarks.results import DIVERGED, Results
from benchmarks.study import write_overview
from tests.benchmarks.made_up import FACTS, failure, record, scores

BITS = {
    "headline": "bits",
    "metrics": [{"name": "bits", "higher_is_better": False, "unit": "bits", "series": None}],
    "floor": {"bits": 9.0},
}


def publish(folder: Path, task: str, facts: dict[str, Any], values: dict[str, list[float]]) -> None:
    results = Results(folder / task)
    for model, found in values.items():
        for seed, value in enumerate(found):
            got = scores(value) if facts["headline"] == "mean accuracy" else {facts["headline"]: value}
            results.append(record(model, seed, got, task=task, task_facts=facts))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    floor = {**FACTS, "floor": {"mean accuracy": 0.2}}
    publish(tmp_path, "recall", floor, {"window": [0.1], "htm": [0.9, 1.0, 0.8], "memxl": [0.3]})
    publish(tmp_path, "text", BITS, {"window": [4.0], "htm": [2.0], "gru-like": [3.0]})
    Results(tmp_path / "text").append(failure("memxl", 0, DIVERGED) | {"task": "text"})
    return tmp_path


def found(folder: Path) -> Overview:
    overview = gather(folder, ("text", "needle", "recall"))
    assert overview is not None
    return overview


def test_tasks_come_in_the_order_asked_for_and_families_first(published: Path) -> None:
    overview = found(published)
    assert [task.task for task in overview.tasks] == ["text", "recall"]
    assert list(overview.models)[-1] == "window"
    assert set(overview.models) == {"htm", "memxl", "gru-like", "window"}


def test_variants_of_a_model_are_rows_of_their_own(published: Path) -> None:
    words = {"label": "htm topk=1", "id": "htm topk=1-0"}
    results = Results(published / "text")
    results.append(record("htm", 0, {"bits": 3.5}, task="text", task_facts=BITS, **words))
    overview = found(published)
    assert set(overview.models) == {"htm", "htm topk=1", "memxl", "gru-like", "window"}
    figures = [overview.figure(model, overview.tasks[0]) for model in ("htm", "htm topk=1")]
    assert [figure.mean for figure in figures if figure is not None] == [2.0, 3.5]


def test_nothing_published_gives_nothing(tmp_path: Path) -> None:
    assert gather(tmp_path, ("recall", "text")) is None
    write_overview(tmp_path, tmp_path / "RESULTS.md")
    assert list(tmp_path.iterdir()) == []


def test_accuracy_counts_from_the_floor_and_other_scores_from_the_worst_model(published: Path) -> None:
    overview = found(published)
    text, recall = overview.tasks
    shares = {model: overview.share(model, recall) for model in ("htm", "memxl", "window")}
    assert shares == pytest.approx({"htm": 1.0, "memxl": (0.3 - 0.2) / (0.9 - 0.2), "window": 0.0})
    shares = {model: overview.share(model, text) for model in ("htm", "gru-like", "window")}
    assert shares == pytest.approx({"htm": 1.0, "gru-like": 0.5, "window": 0.0})
    assert math.isnan(overview.share("memxl", text))
    assert math.isnan(overview.share("gru-like", recall))


def test_all_models_alike_are_all_best(tmp_path: Path) -> None:
    publish(tmp_path, "text", BITS, {"htm": [2.0], "window": [2.0]})
    overview = found(tmp_path)
    assert [overview.share(model, overview.tasks[0]) for model in overview.models] == [1.0, 1.0]


def test_cells_are_headlines_with_their_interval_and_their_seeds(published: Path) -> None:
    table, *_ = document(found(published), published / "a.png")
    assert isinstance(table, Table)
    lines = {line[0]: list(line[1:]) for line in table.lines}
    assert lines["model"] == ["`text`", "`recall`"]
    assert lines["htm"] == ["2.000", "0.900 [0.800 1.000]"]
    assert lines["memxl"] == ["–", "0.300"]
    assert lines["best possible without memory"] == ["9.000", "0.200"]
    assert lines["seeds"] == ["1", "3"]
    words = as_markdown(document(found(published), published / "a.png"))
    assert "`text`: bits (lower is better); `recall`: mean accuracy (higher is better)." in words


def test_the_picture_is_drawn_with_gaps_where_nothing_ran(published: Path) -> None:
    picture = draw(found(published), published / "out")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_document_keeps_its_words_and_gets_the_table_anew(published: Path) -> None:
    file = published / "docs" / "RESULTS.md"
    file.parent.mkdir()
    file.write_text("# Results\n\n<!-- study: overview -->\nold\n<!-- end: overview -->\n\nWords.\n")
    write_overview(published, file)
    text = file.read_text()
    assert "| htm |" in text
    assert "old" not in text
    assert text.endswith("<!-- end: overview -->\n\nWords.\n")
    assert "](all-models-on-all-tasks.png)" in text
    assert (file.parent / "all-models-on-all-tasks.png").exists()
