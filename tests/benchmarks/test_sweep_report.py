"""The report of a sweep, from results made up so that the right cells are known."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.document import as_markdown
from benchmarks.results import FINISHED, Results, write_json
from benchmarks.summary import NothingToReportError
from benchmarks.sweep import EVALUATED, TRAINED, write_sweep
from benchmarks.sweep_plots import Places, places_of
from benchmarks.sweep_report import sweep_csv, sweep_document, sweep_table, write_sweep_report
from benchmarks.sweep_summary import load_sweep
from tests.benchmarks.sweeps import planned


def made_up(
    folder: Path, options: dict[str, list[Any]], *, ways: tuple[str, ...] = (TRAINED,), seeds: int = 1
) -> Path:
    """Scores are 0.1 by the place of the first value, plus 0.01 by the second's and 0.001 by the seed."""
    results = Results(folder)
    metric = {"higher_is_better": True, "unit": "accuracy"}
    metrics = [
        *({"name": f"accuracy/{g}", "series": "accuracy", **metric} for g in ("near", "far")),
        {"name": "mean accuracy", "series": None, **metric},
    ]
    points = []
    sizes = [len(values) for values in options.values()]
    for how in ways:
        for index in range(math.prod(sizes)):
            place = [index] if len(sizes) == 1 else list(divmod(index, sizes[1]))
            for seed in range(seeds):
                identity = f"{how}-{index}-{seed}"
                value = 0.1 * place[0] + 0.01 * (place[1] if len(place) > 1 else 0) + 0.001 * seed
                points.append({"id": identity, "seed": seed, "place": place, "how": how})
                results.append(
                    {
                        "id": identity,
                        "model": "memorizing",
                        "task": "made-up",
                        "seed": seed,
                        "status": FINISHED,
                        "command": f"memory-bench run {identity}",
                        "settings": {"train": {"steps": 10, "batch_size": 2, "threads": 1}},
                        "task_facts": {
                            "summary": "a made-up task",
                            "headline": "mean accuracy",
                            "metrics": metrics,
                            "floor": {"mean accuracy": 0.25, "accuracy/near": 0.1 * place[0]},
                            "floor_is": "best without memory",
                            "chance": {},
                            "facts": {"letters": 26},
                        },
                        "state_bytes": 1024 * place[0],
                        "tokens_per_second": 1000.0,
                        "evaluation_tokens_per_second": 5000.0,
                        "scores": {entry["name"]: value for entry in metrics},
                    }
                )
    write_json(
        results.sweep,
        {
            "task": "made-up",
            "model": "memorizing",
            "command": "memory-bench sweep ...",
            "options": [
                {"name": name, "texts": [str(v) for v in values], "values": values}
                for name, values in options.items()
            ],
            "bases": [],
            "bases_have": ["64"] if EVALUATED in ways else [],
            "points": points,
        },
    )
    return folder


def test_the_table_has_a_column_for_each_option_and_a_line_for_each_point(tmp_path: Path) -> None:
    sweep = load_sweep(made_up(tmp_path, {"memories": [0, 4096], "model.topk": [4, 8]}, seeds=3))
    header, *lines = sweep_table(sweep, metrics=sweep.runs.single(), costs=True)
    assert header == [
        "memories",
        "topk",
        "mean accuracy",
        "state per row",
        "training tokens/s",
        "evaluation tokens/s",
    ]
    assert [line[:2] for line in lines] == [
        ["0", "4"],
        ["0", "8"],
        ["4,096", "4"],
        ["4,096", "8"],
        ["best without memory", ""],
    ]
    # 0.11, 0.111, 0.112: Student's t for two degrees of freedom is 4.303, the deviation 0.001.
    assert lines[3][2] == f"0.111 ± {4.303 * 0.001 / math.sqrt(3):.3f}"
    assert lines[3][3:] == ["1.0 KiB", "1.0 k", "5.0 k"]
    assert lines[4][2] == "0.250"


def test_a_floor_that_differs_between_points_is_nobodys(tmp_path: Path) -> None:
    sweep = load_sweep(made_up(tmp_path, {"memories": [0, 64]}))
    assert sweep.runs.facts["floor"] == {"mean accuracy": 0.25}


def test_trained_and_evaluated_points_are_told_apart(tmp_path: Path) -> None:
    sweep = load_sweep(made_up(tmp_path, {"memories": [0, 64]}, ways=(TRAINED, EVALUATED)))
    header, *lines = sweep_table(sweep, metrics=sweep.runs.single(), costs=True)
    assert header[:2] == ["memories", "model"]
    assert [line[:2] for line in lines[:4]] == [
        ["0", "trained"],
        ["64", "trained"],
        ["0", "evaluated"],
        ["64", "evaluated"],
    ]
    assert [line[4] for line in lines[:4]] == ["1.0 k", "1.0 k", "", ""]
    text = as_markdown(sweep_document(sweep))
    assert "one model, trained with memories 64, is evaluated with each value" in text
    assert "memory-bench sweep ..." in text
    assert "memory-bench run evaluated-1-0" in text
    lines_of_csv = list(csv.DictReader(io.StringIO(sweep_csv(sweep))))
    assert [line["model"] for line in lines_of_csv] == [TRAINED] * 2 + [EVALUATED] * 2
    assert float(lines_of_csv[3]["accuracy/far"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"memories": [0, 64, 256]},
        {"memories": [64]},
        {"shift_keys": [True, False], "tie_keys": [True, False]},
        {"memories": [0, 64], "topk": [1, 2, 3]},
        {"memory_layers": [None, [-1], "all"]},
    ],
)
def test_every_kind_of_sweep_is_drawn(tmp_path: Path, options: dict[str, list[Any]]) -> None:
    sweep = load_sweep(made_up(tmp_path, options, ways=(TRAINED, EVALUATED), seeds=3))
    sweep = dataclasses.replace(sweep, bases_have=("64",) * len(options))
    paths = write_sweep_report(sweep, tmp_path / "out")
    assert [path.name for path in paths] == [
        "sweep.md",
        "sweep.html",
        "sweep.csv",
        "sweep.png",
        "sweep_accuracy.png",
        "sweep_cost.png",
    ]
    for path in paths[3:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"]({path.name})" in paths[0].read_text()


def test_zero_stands_left_of_a_broken_logarithmic_axis() -> None:
    assert places_of([0, 64, 256, 1024]) == Places((4.0, 6.0, 8.0, 10.0), gap=5.0)
    assert places_of([64, 1024]) == Places((6.0, 10.0))
    # Little between the least and the greatest: to scale.
    assert places_of([0, 2, 4]) == Places((0.0, 2.0, 4.0))
    assert places_of([-1, 64]) == Places((-1.0, 64.0))
    # What is no number stands side by side.
    assert places_of([True, False]) == places_of([None, 64]) == Places((0.0, 1.0))


def test_a_folder_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(NothingToReportError, match="memory-bench sweep"):
        load_sweep(tmp_path)
    write_sweep(planned("dim=4"), Results(tmp_path), "")
    with pytest.raises(NothingToReportError, match="no run of the sweep has ended"):
        load_sweep(tmp_path)
