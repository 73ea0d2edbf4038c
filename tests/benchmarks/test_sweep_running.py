"""A sweep is trained and evaluated, stopped and gone on with, and the command says how it went."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as compare_module
from benchmarks.cli import main
from benchmarks.compare import InterruptedComparison
from benchmarks.document import as_markdown
from benchmarks.evaluate import evaluate, take_weights
from benchmarks.members import build_model
from benchmarks.results import DIVERGED, FAILED, FINISHED, Record, Results
from benchmarks.settings import cached_task, evaluation_of, plan
from benchmarks.sweep import EVALUATED, TRAINED, plan_sweep
from benchmarks.sweep_report import sweep_document
from benchmarks.sweep_summary import load_sweep
from benchmarks.train import run
from memory_models.checkpoints import load_model
from tests.benchmarks.sweeps import do, in_this_process, planned
from tests.benchmarks.tiny import STREAM, TINY


def test_an_evaluated_point_equals_evaluating_the_rebuilt_model_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    # Another length of segment changes what the trained model reads; its weights are of no length.
    options = {"task": "recall", "vary": ["model.segment_length=4,16"], "assignments": ["steps=4"]}
    sweep = plan_sweep(TINY, seeds=[0], mode="evaluate", smoke=True, **options)  # type: ignore[arg-type]
    assert sweep.bases_have == ("16",)
    [base] = sweep.bases
    do(sweep, tmp_path)
    results = Results(tmp_path)
    latest = results.latest()
    four, sixteen = (point.spec for point in sweep.points)
    assert sixteen.id == base.id
    assert len(latest) == 2

    task = cached_task(base.task, base.task_options)
    trained: Any = load_model(results.run_folder(base.id) / "model")
    expected = {}
    for length in (4, 16):
        model = build_model(TINY, {**base.model_options, "segment_length": length}, task.vocab_size)
        model.load_state_dict(trained.state_dict())
        found = evaluate(model, task, rows=base.train.evaluation_rows)
        expected[length] = found.scores
        if length == 4:
            assert latest[four.id]["state_bytes"] == found.state_bytes
    assert latest[four.id]["scores"] == expected[4]
    assert latest[base.id]["scores"] == expected[16]
    assert expected[4] != expected[16]
    assert latest[four.id]["evaluation_tokens_per_second"] > 0
    assert latest[four.id]["settings"]["trained"]["seed"] == 0


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    base = plan(TINY, STREAM, 0, smoke=True)
    run(base, Results(tmp_path))
    folder = Results(tmp_path).run_folder(base.id) / "model"
    with pytest.raises(ValueError, match=r"mix\.bias is \[16\], expected \[4\]"):
        take_weights(build_model(TINY, {**base.model_options, "dim": 4}, 4), folder)
    with pytest.raises(FileNotFoundError):
        take_weights(build_model(TINY, base.model_options, 4), tmp_path)


def test_a_model_that_was_deleted_is_a_failed_run_that_says_so(tmp_path: Path) -> None:
    base = plan(TINY, STREAM, 0, smoke=True)
    spec = evaluation_of(base, plan(TINY, STREAM, 0, smoke=True, assignments=["dropout=0.3"]))
    results = Results(tmp_path)
    run(base, results)
    shutil.rmtree(results.run_folder(base.id) / "model")
    record = run(spec, results)
    assert record is not None
    assert record["status"] == FAILED
    assert "--out" in record["error"]


def test_a_stopped_evaluation_starts_afresh(tmp_path: Path) -> None:
    base = plan(TINY, STREAM, 0, smoke=True)
    spec = evaluation_of(base, plan(TINY, STREAM, 0, smoke=True, assignments=["dropout=0.3"]))
    results = Results(tmp_path)
    run(base, results)
    seen = []
    assert run(spec, results, stopped=lambda: len(seen) > 2, progress=seen.append) is None
    assert [(p.phase, p.step, p.steps) for p in seen] == [("evaluating", i, 6) for i in range(3)]
    assert not results.is_finished(spec.id)
    again = run(spec, results)
    assert again is not None
    assert again["status"] == FINISHED
    # Without dropout in evaluation nothing has changed.
    assert again["scores"] == results.latest()[base.id]["scores"]


def test_a_sweep_trains_then_evaluates_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = in_this_process(monkeypatch)
    sweep = planned("dropout=0.0,0.1,0.3", mode="both")
    records = do(sweep, tmp_path)
    # The table's value is 0.1: its run is the base, the trained point and the evaluated point in one.
    assert len(started) == len(records) == 5
    assert set(started[:3]) == {spec.id for spec in sweep.trainings}
    assert set(started[3:]) == {spec.id for spec in sweep.evaluations}
    do(sweep, tmp_path)
    assert len(started) == 5
    do(planned("dropout=0.0,0.2", mode="both"), tmp_path)
    assert len(started) == 7

    loaded = load_sweep(tmp_path)
    assert loaded.ways == [TRAINED, EVALUATED]
    assert [(line.how, line.place) for line in loaded.lines] == [
        (how, (index,)) for how in (TRAINED, EVALUATED) for index in (0, 1)
    ]


def test_where_training_fails_nothing_is_evaluated_and_all_of_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    sweep = planned("dropout=0.0,0.3", mode="evaluate", assignments=["trouble=nan"])
    [record] = do(sweep, tmp_path)
    assert record["status"] == DIVERGED
    text = as_markdown(sweep_document(load_sweep(tmp_path)))
    assert "diverged: the loss is nan at step 1" in text
    assert "dropout=0.3 evaluated seed 0 has not ended yet" in text


def test_an_interrupted_sweep_goes_on_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = in_this_process(monkeypatch)
    whole = compare_module.compare

    def interrupted(specs: Any, results: Results, **options: Any) -> list[Record]:
        whole(specs[:1], results, **options)
        raise InterruptedComparison

    monkeypatch.setattr(compare_module, "compare", interrupted)
    sweep = planned("dim=4,8")
    with pytest.raises(InterruptedComparison):
        do(sweep, tmp_path)
    assert len(started) == 1
    assert "dim=4 trained seed 0 has not ended yet" in as_markdown(sweep_document(load_sweep(tmp_path)))
    monkeypatch.setattr(compare_module, "compare", whole)
    do(sweep, tmp_path)
    assert sorted(started) == sorted(point.spec.id for point in sweep.points)
    assert "What went wrong" not in as_markdown(sweep_document(load_sweep(tmp_path)))


@pytest.mark.slow
def test_the_command_ends_with_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--model", TINY, "--task", STREAM, "--smoke", "--out", str(tmp_path)]
    assert main([*command, "--mode", "evaluate", "--vary", "dropout=0.1,0.3"]) == 0
    said = capsys.readouterr().out
    assert "dropout 0.1 seed 0: started" in said
    assert "dropout 0.3 evaluated seed 0: started" in said
    for name in ("sweep.md", "sweep.csv", "sweep.png", "sweep_accuracy.png", "sweep_cost.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in said
    text = (tmp_path / "sweep.md").read_text()
    assert f"# {STREAM}: {TINY} by dropout" in text
    assert "memory-bench sweep --model" in text
    assert "memory-bench run --model" in text

    lines = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "sweep.md").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "sweep.md").read_text() == text
    assert not (tmp_path / "table.md").exists()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "sweep.md").read_text() == text
    assert (tmp_path / "results.jsonl").read_bytes() == lines


def test_a_point_that_fails_is_shown_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    command = ["sweep", "--model", TINY, "--task", STREAM, "--smoke", "--out", str(tmp_path)]
    assert main([*command, "--vary", "trouble=nothing,nan", "--vary", "dim=4"]) == 1
    said = capsys.readouterr().out
    assert "the loss is nan at step 1 of 6" in said
    assert "diverged: the loss is nan" in (tmp_path / "sweep.md").read_text()
    [good, bad] = csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text()))
    assert (good["trouble"], good["dim"], good["status"]) == ("nothing", "4", "")
    assert (bad["trouble"], bad["status"], bad["mean accuracy"]) == ("nan", "diverged", "")


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise InterruptedComparison

    monkeypatch.setattr(compare_module, "compare", interrupted)
    command = ["sweep", "--model", TINY, "--task", STREAM, "--smoke", "--out", str(tmp_path)]
    assert main([*command, "--vary", "dim=4,8"]) == 130
    said = capsys.readouterr().out
    assert "0 of 2 runs are finished" in said
    assert "memory-bench sweep --model" in said


def test_help_explains_and_reading_a_report_does_not_wait_for_torch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sweep", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "memories=0,64,256",
        "evaluate one trained model with each",
        "three or more give intervals",
    ):
        assert words in said
    code = "import sys, benchmarks.sweep_report, benchmarks.sweep_plots\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_wrong_use_ends_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--model", TINY, "--task", STREAM, "--smoke", "--out", str(tmp_path / "new")]
    assert main([*command, "--vary", "dimm=4"]) == 2
    assert "Did you mean 'dim'" in capsys.readouterr().err
    assert main([*command, "--mode", "evaluate", "--vary", "dim=4"]) == 2
    assert "do not fit" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
