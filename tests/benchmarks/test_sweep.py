"""One model over the values of options: what is planned, trained, evaluated, shown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as compare_module
from benchmarks.cli import main
from benchmarks.compare import InterruptedComparison
from benchmarks.evaluate import evaluate, take_weights
from benchmarks.members import build_model
from benchmarks.progress import LineDisplay
from benchmarks.results import DIVERGED, FAILED, FINISHED, Record, Results, write_json
from benchmarks.settings import RunSpec, cached_task, command_of, evaluation_of, plan, setting_of
from benchmarks.summary import NothingToReportError
from benchmarks.sweep import (
    EVALUATED,
    TRAINED,
    SweepPlan,
    label,
    parse_option,
    plan_sweep,
    run_sweep,
    write_sweep,
)
from benchmarks.sweep_plots import Places, places_of
from benchmarks.sweep_report import sweep_csv, sweep_markdown, sweep_table, write_sweep_report
from benchmarks.sweep_summary import load_sweep
from benchmarks.train import run
from memory_models.checkpoints import load_model
from tests.benchmarks.tiny import STREAM, TINY


def planned(*vary: str, mode: str = "train", seeds: tuple[int, ...] = (0,), **options: Any) -> SweepPlan:
    return plan_sweep(TINY, STREAM, vary, seeds, mode=mode, smoke=True, **options)


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `compare` do its runs here, one after the other; returns the ids in the order of their starts."""
    started: list[str] = []

    def compare(specs: Any, results: Results, *, display: Any, **_: Any) -> list[Record]:
        display.start(total=len(specs), done=0)
        for spec in specs:
            if not results.is_finished(spec.id):
                started.append(spec.id)
                run(spec, results)
        return [results.latest()[spec.id] for spec in specs]

    monkeypatch.setattr(compare_module, "compare", compare)
    return started


def do(plan: SweepPlan, folder: Path) -> list[Record]:
    results = Results(folder)
    write_sweep(plan, results, "memory-bench sweep")
    return run_sweep(plan, results, jobs=1, display=lambda: LineDisplay(io.StringIO()))


# --- values and grids


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=0,64,1_024", (0, 64, 1024)),
        ("a=0.1,1e-3", (0.1, 0.001)),
        ("a=true,False,none", (True, False, None)),
        ("a=(-1,),(0, 1),none", ((-1,), (0, 1), None)),
        ("a=gate,softmax", ("gate", "softmax")),
        ("model.a=1,1.0,True,1", (1, 1.0, True)),
        ("a=3", (3,)),
    ],
)
def test_values_are_read_as_what_they_mean(text: str, values: tuple[Any, ...]) -> None:
    found = parse_option(text).values
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=1,,2", "a=1,"])
def test_a_malformed_option_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="memories=64,256"):
        parse_option(text)


def test_values_read_well() -> None:
    values = [4096, 0.5, True, None, (-1, 2000), "gate"]
    assert [label(v) for v in values] == ["4,096", "0.5", "true", "none", "(-1, 2,000)", "gate"]


def test_two_options_make_a_grid_of_ordinary_runs() -> None:
    sweep = planned("dim=4,8", "dropout=0.0,0.2", seeds=(0, 1, 1), assignments=["steps=3"])
    assert [(p.place, p.spec.seed) for p in sweep.points] == [
        ((i, j), seed) for i in (0, 1) for j in (0, 1) for seed in (0, 1)
    ]
    assert sweep.bases == ()
    for point in sweep.points:
        changes = [f"dim={(4, 8)[point.place[0]]}", f"dropout={(0.0, 0.2)[point.place[1]]}", "steps=3"]
        same = plan(TINY, STREAM, point.spec.seed, smoke=True, assignments=changes)
        assert point.spec.id == same.id
    names = sweep.names()
    assert len(set(names.values())) == len(names) == 8
    assert names[sweep.points[0].spec.id] == "dim 4, dropout 0.0 seed 0"


def test_a_value_that_is_there_anyway_makes_no_run_of_its_own() -> None:
    usual = plan(TINY, STREAM, 0, smoke=True)
    # A default, a setting of the table, one of the task; True is not 1.
    for vary in ("dropout=0.1,0.3", "dim=16,4", "task.symbols=4,3", "tie_embeddings=True,1"):
        assert [p.spec.id == usual.id for p in planned(vary).points] == [True, False]


def test_options_of_the_task_and_the_training_can_be_varied() -> None:
    sweep = planned("task.symbols=3,5", "train.steps=1,2")
    assert [(p.spec.task_options["symbols"], p.spec.train.steps) for p in sweep.points] == [
        (3, 1),
        (3, 2),
        (5, 1),
        (5, 2),
    ]


@pytest.mark.parametrize(
    ("vary", "options", "message"),
    [
        (["dimm=4"], {}, "Did you mean 'dim'"),
        (["model.dimm=4"], {}, "Did you mean 'dim'"),
        (["dim=4", "model.dim=8"], {}, "varied twice"),
        ([], {}, "at least one option"),
        (["dim=4"], {"seeds": ()}, "one seed"),
        (["dim=4"], {"mode": "trane"}, "train, evaluate, both"),
        (["dim=4", "dropout=0.1,2"], {}, "dim=4 dropout=2: dropout"),
        (["steps=4"], {"mode": "evaluate"}, "steps=4 changes the training"),
        (["dim=4,8"], {"mode": "both"}, r"dim=4: .*do not fit: .* is \[16\], expected \[4\].*--mode train"),
        (["symbols=5"], {"mode": "evaluate"}, "do not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    vary: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        planned(*vary, **options)


def test_the_value_of_a_setting_is_found_wherever_it_comes_from() -> None:
    spec = plan(TINY, STREAM, 0, smoke=True, assignments=["dim=4"])
    names = ("dim", "model.pause", "symbols", "train.steps", "tie_embeddings")
    found = [setting_of(spec, name) for name in names]
    assert found == [4, 0.0, 4, 6, True]
    with pytest.raises(ValueError, match="Did you mean 'dim'"):
        setting_of(spec, "dimm")


# --- evaluating what was trained


def test_an_evaluation_is_named_by_the_trained_run_and_the_changed_options() -> None:
    base = plan(TINY, STREAM, 0, smoke=True)
    other = plan(TINY, STREAM, 0, smoke=True, assignments=["dropout=0.3"])
    spec = evaluation_of(base, other)
    assert spec.id not in (base.id, other.id)
    assert spec.id != evaluation_of(plan(TINY, STREAM, 1, smoke=True), dataclasses.replace(other, seed=1)).id
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.id == spec.id
    assert again.trained is not None
    assert again.trained.id == base.id
    # At its own values the trained model has been evaluated already.
    assert evaluation_of(base, base) is base


def test_a_run_that_trains_is_named_as_if_there_were_no_evaluations() -> None:
    spec = plan(TINY, STREAM, 0, smoke=True)
    fields = {
        name: value for name, value in spec.to_json().items() if name not in ("trained", "task_options")
    }
    from benchmarks.results import run_id

    assert spec.id == run_id(fields)


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


@pytest.mark.parametrize(
    "vary", [["dropout=0.3"], ["task.queries=3"], ["queries=2", "model.segment_length=5"]]
)
def test_the_command_of_an_evaluated_point_plans_the_same_point(vary: list[str]) -> None:
    changes = ["steps=9", "dim=4", "task.writes=1"]
    sweep = plan_sweep(TINY, "recall", vary, [2], mode="evaluate", assignments=changes, smoke=True)
    [point] = sweep.points
    words = shlex.split(command_of(point.spec))
    assert words[:2] == ["memory-bench", "sweep"]
    # What follows from the task is not spelt out.
    assert any("segment_length" in word for word in words) == (len(vary) == 2)
    assert words[words.index("--mode") + 1] == "evaluate"
    vary = words[words.index("--vary") + 1 : words.index("--mode")]
    changes = words[words.index("--set") + 1 :]
    again = plan_sweep(TINY, "recall", vary, [2], mode="evaluate", assignments=changes)
    assert [p.spec.id for p in again.points] == [point.spec.id]


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


# --- running


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
    text = sweep_markdown(load_sweep(tmp_path))
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
    assert "dim=4 trained seed 0 has not ended yet" in sweep_markdown(load_sweep(tmp_path))
    monkeypatch.setattr(compare_module, "compare", whole)
    do(sweep, tmp_path)
    assert sorted(started) == sorted(point.spec.id for point in sweep.points)
    assert "What went wrong" not in sweep_markdown(load_sweep(tmp_path))


# --- the command


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
    assert main([*command, "--vary", "trouble=none,nan", "--vary", "dim=4"]) == 1
    said = capsys.readouterr().out
    assert "the loss is nan at step 1 of 6" in said
    assert "diverged: the loss is nan" in (tmp_path / "sweep.md").read_text()
    [good, bad] = csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text()))
    assert (good["trouble"], good["dim"], good["status"]) == ("none", "4", "")
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


# --- the report, from results made up so that the right cells are known


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
    text = sweep_markdown(sweep)
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
