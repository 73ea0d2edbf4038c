"""Learning rates from a grid: which is taken, that the search goes on, that nobody takes it for a result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import DIVERGED, FINISHED, Results, write_json
from benchmarks.settings import RunSpec
from benchmarks.summary import NothingToReportError, load
from benchmarks.terms import Terms, tune
from benchmarks.tuning import Trial, choose, plan_trials
from tests.benchmarks.made_up import record, scores
from tests.benchmarks.tiny import STREAM, TINY

GRID = (1e-2, 1e-3, 3e-3)


def trials() -> list[Trial]:
    return plan_trials(STREAM, GRID, 1000, {TINY: ["dim=4"]}, steps=2, smoke=True)


def line(trial: Trial, score: float | None, *, higher: bool = True) -> dict[str, Any]:
    if score is None:
        return {"id": trial.spec.id, "status": DIVERGED, "model": TINY}
    metrics = [{"name": "a", "higher_is_better": higher}]
    return {
        "id": trial.spec.id,
        "status": FINISHED,
        "task_facts": {"headline": "a", "metrics": metrics},
        "scores": {"a": score},
    }


def test_a_trial_is_a_run_of_its_own_with_the_rate() -> None:
    found = trials()
    assert [trial.rate for trial in found] == sorted(GRID)
    for trial in found:
        assert trial.spec.train.learning_rate == trial.rate
        assert (trial.spec.train.steps, trial.spec.seed) == (2, 1000)
        assert trial.spec.model_options["dim"] == 4
    assert len({trial.spec.id for trial in found}) == len(GRID)


@pytest.mark.parametrize(
    ("higher", "values", "rate", "edge"),
    [
        (True, (0.1, 0.3, 0.2), 3e-3, False),
        (False, (0.1, 0.3, 0.2), 1e-3, True),
        (True, (0.5, 0.5, 0.5), 1e-3, False),
        (True, (0.2, 0.3, 0.4), 1e-2, True),
        (True, (None, 0.1, None), 3e-3, False),
        (True, (None, None, None), None, False),
    ],
)
def test_the_best_rate_is_taken(
    higher: bool, values: Sequence[float | None], rate: float | None, edge: bool
) -> None:
    found = trials()
    lines = [line(trial, value, higher=higher) for trial, value in zip(found, values, strict=True)]
    choice = choose(found, {entry["id"]: entry for entry in lines})[TINY]
    assert (choice.rate, choice.edge) == (rate, edge)
    assert choice.assignments == ([] if rate is None else [f"train.learning_rate={rate!r}"])


@pytest.mark.parametrize("grid", [(), (0.0, 1.0), (-1.0,), (float("inf"),)])
def test_a_grid_must_hold_rates(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="learning rates"):
        plan_trials(STREAM, grid, 0, {TINY: []}, smoke=True)


def test_the_chosen_rate_is_what_the_reported_runs_get_and_trials_are_not_reported(tmp_path: Path) -> None:
    results = Results(tmp_path)

    def do(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
        # Before they are begun, so that an interruption leaves nothing that looks like a result.
        assert results.tuning.exists()
        best = {spec.id: abs(spec.train.learning_rate - 3e-3) < 1e-9 for spec in specs}
        for spec in specs:
            results.append(record(TINY, 1000, scores(float(best[spec.id])), id=spec.id))
        return [results.latest()[spec.id] for spec in specs]

    terms = tune(Terms.of(STREAM, [TINY], [], smoke=True), results, do, grid=GRID, seed=1000)
    assert [spec.train.learning_rate for spec in terms.specs()] == [3e-3]
    assert terms.tuning is not None
    assert terms.tuning["chosen"][TINY]["rate"] == 3e-3
    assert [(trial["model"], trial["rate"]) for trial in terms.tuning["trials"]] == [
        (TINY, rate) for rate in sorted(GRID)
    ]
    assert {trial["id"] for trial in terms.tuning["trials"]} <= set(results.latest())
    with pytest.raises(NothingToReportError):
        load(tmp_path)


def test_the_report_shows_rates_and_widths(tmp_path: Path) -> None:
    from benchmarks.report import main_metrics, markdown, table

    results = Results(tmp_path)
    results.append(record("htm", 0, scores(0.5)))
    trial = [{"rate": 1e-3, "score": 0.25}, {"rate": 3e-3, "score": None}]
    tried = {"id": "htm-77", "model": "htm", "seed": 77, "rate": 3e-3}
    results.append(record("htm", 77, {}, status=DIVERGED, error="the loss is nan at step 4 of 6"))
    found = {"model": "htm", "options": {"dim": 60}, "value": 970, "note": ""}
    write_json(
        results.comparison,
        {
            "task": "made-up",
            "command": "",
            "runs": [{"id": "htm-0", "model": "htm", "seed": 0}],
            "match": {"by": "params", "reference": "window", "target": 1000.0, "models": {"htm": found}},
            "tuning": {
                "seed": 77,
                "steps": None,
                "chosen": {"htm": {"rate": 1e-3, "edge": True, "scores": trial}},
                "trials": [tried],
            },
        },
    )
    comparison = load(tmp_path)
    header, row, *_ = table(comparison, metrics=main_metrics(comparison), costs=True)
    cells = dict(zip(header, row, strict=True))
    assert (cells["matched by"], cells["learning rate"]) == ("dim 60", "0.001")
    text = markdown(comparison)
    assert "| htm | 970 | −3.0 % | dim 60 |" in text
    assert "| htm | 0.250 | diverged | 0.001 |" in text
    assert "htm seed 77 at learning rate 0.003 diverged: the loss is nan at step 4 of 6" in text
    assert comparison.failures[0]["id"] == "htm-77"
    assert "seed 77" in text
    assert "**Warning:** htm: the best rate is at the edge of the grid" in text
