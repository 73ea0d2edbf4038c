"""What the options of `memory-bench compare` do: the runs that it plans, with workers that only pretend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from benchmarks import commands, fanout
from benchmarks import compare as compare_module
from benchmarks.cli import main
from benchmarks.match import TOLERANCE, count_parameters
from benchmarks.results import Results, read_json
from benchmarks.settings import RunSpec, cached_task
from tests.benchmarks.made_up import record, scores
from tests.benchmarks.tiny import TINY

# Made equal they still differ.
ROWS = (TINY, f"{TINY} dim=12 dropout=0.2")
BEST = 3e-3


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The runs in the order of their starts; each ends at once, and well if its learning rate is `BEST`."""
    found: list[RunSpec] = []

    def launch(arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Any:
        results = Results(arguments[0])
        spec = RunSpec.from_json(read_json(results.run_folder(arguments[1]) / "spec.json"))
        found.append(spec)
        score = float(spec.train.learning_rate == BEST)
        results.append(record(spec.model, spec.seed, scores(score), id=spec.id))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(fanout, "launch_here", launch)
    monkeypatch.setattr(compare_module, "POLL_SECONDS", 0.0)
    # The pictures have tests of their own.
    monkeypatch.setattr(commands, "_report", lambda *_: None)
    return found


def compared(out: Path, *options: str) -> int:
    return main(
        [
            "compare",
            "--task",
            "recall",
            "--models",
            *ROWS,
            "--no-controls",
            "--smoke",
            "--out",
            str(out),
            *options,
        ]
    )


def test_without_options_each_model_runs_as_it_is(tmp_path: Path, started: list[RunSpec]) -> None:
    assert compared(tmp_path, "--seeds", "4", "5") == 0
    assert {(spec.label, spec.seed) for spec in started} == {(row, seed) for row in ROWS for seed in (4, 5)}
    noted = read_json(Results(tmp_path).comparison)
    assert [noted[name] for name in ("match", "tuning", "longer")] == [None, None, []]


def test_models_are_made_equal_tuned_and_lengthened(tmp_path: Path, started: list[RunSpec]) -> None:
    smallest = 2000
    options = ["--match", "params", "--match-to", str(smallest), "--extrapolate", "2", "4"]
    options += ["--tune", "1e-3", "3e-3", "1e-2", "--tune-seed", "77", "--tune-steps", "3"]
    assert compared(tmp_path, *options) == 0
    noted = read_json(Results(tmp_path).comparison)

    trials = [spec for spec in started if spec.seed == 77]
    rates = {(row, rate) for row in ROWS for rate in (1e-3, 3e-3, 1e-2)}
    assert {(spec.label, spec.train.learning_rate) for spec in trials} == rates
    assert {spec.train.steps for spec in trials} == {3}
    assert started[: len(trials)] == trials
    assert (noted["tuning"]["seed"], noted["tuning"]["steps"]) == (77, 3)
    assert {name: one["rate"] for name, one in noted["tuning"]["chosen"].items()} == dict.fromkeys(ROWS, BEST)

    reported = {spec.id: spec for spec in started if spec.seed == 0 and spec.trained is None}
    assert {run["id"] for run in noted["runs"]} == reported.keys()
    assert {spec.label for spec in reported.values()} == set(ROWS)
    assert {spec.train.learning_rate for spec in reported.values()} == {BEST}
    assert noted["match"]["target"] == smallest
    for spec in (*trials, *reported.values()):
        assert count_parameters(spec) == pytest.approx(smallest, rel=TOLERANCE["params"])

    longer = {spec.id: spec for spec in started if spec.trained is not None}
    factors = {entry["id"]: entry["factor"] for entry in noted["longer"]}
    assert sorted(factors.values()) == [1, 1, 2, 2, 4, 4]
    assert factors.keys() == longer.keys() | reported.keys()
    for spec in longer.values():
        assert spec.trained in reported.values()
        trained = cached_task("recall", spec.trained.task_options).config.segments
        assert cached_task("recall", spec.task_options).config.segments == factors[spec.id] * trained


def test_the_seed_that_tunes_is_not_reported(
    tmp_path: Path, started: list[RunSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, "--tune", "1e-3", "3e-3", "--seeds", "6", "7", "--tune-seed", "7") == 2
    assert "--tune-seed 7 is reported too" in capsys.readouterr().err
    assert not started
