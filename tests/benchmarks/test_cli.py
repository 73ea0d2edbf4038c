"""The command as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import compare as compare_module
from benchmarks.cli import main
from benchmarks.members import shown
from benchmarks.results import Results, read_json
from benchmarks.settings import RunSpec
from memory_models.models import ModelInfo, register
from tests.benchmarks.tiny import STREAM, TINY
from tests.plug_in import NAME, install


def test_a_smoke_comparison_ends_with_table_plots_and_exit_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--task", "recall", "--models", TINY, "window", "--smoke", "--out", str(tmp_path)]
    command.append("--no-controls")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 runs" in said
    assert "drop without memory" in said
    for name in ("table.md", "table.csv", "accuracy.png", "learning_curves.png", "quality_by_state.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in said
    assert "memory-bench compare --task recall" in (tmp_path / "table.md").read_text()

    # Again: nothing is left to do, the report is made anew.
    lines = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "table.md").unlink()
    assert main(command) == 0
    assert "2 of them finished before" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_bytes() == lines
    assert (tmp_path / "table.md").exists()

    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "table.md").read_text() == (tmp_path / "table.md").read_text()


def test_a_diverged_run_is_shown_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", STREAM, "--smoke", "--out", str(tmp_path), "--set", "trouble=nan"]
    assert main(["compare", "--no-controls", "--models", TINY, *options]) == 1
    said = capsys.readouterr().out
    assert "(diverged)" in said
    assert "the loss is nan at step 1 of 6" in said
    assert "diverged: the loss is nan" in (tmp_path / "table.md").read_text()
    assert main(["run", "--model", TINY, *options]) == 1
    assert "DIVERGED" in capsys.readouterr().out


def test_run_prints_the_scores_and_is_not_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--model", TINY, "--task", STREAM, "--smoke", "--steps", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "mean accuracy" in first
    [record] = Results(tmp_path).records()
    assert record["settings"]["train"]["steps"] == 4
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(Results(tmp_path).records()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "windw", "--task", "recall"], "Did you mean 'window'"),
        (["--model", TINY, "--task", "recal"], "Did you mean 'recall'"),
        (["--model", TINY, "--task", "recall", "--set", "steps"], "key=value"),
        (["--model", TINY, "--task", "recall", "--set", "stepz=3"], "Did you mean 'steps'"),
        (["--model", TINY, "--task", "recall", "--data", "x"], "no option 'data'"),
        (["--model", "window", "--task", "recall", "--set", "model.token_shift=no"], "true or false"),
        (["--model", "window", "--task", "recall", "--set", "steps=many"], "steps ('many') must be an int"),
        (["--model", "window", "--task", "recall", "--set", "segment_length=8.0"], "must be an int"),
        (["--model", TINY, "--task", "recall", "--set", "model.stepz=3"], "no option 'stepz'"),
    ],
)
def test_wrong_use_is_answered_with_the_way_out(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", *words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--set", "steps=abc"], "steps ('abc') must be an int"),
        (["--set", "learning_rate=fast"], "learning_rate ('fast') must be a float"),
        (["--set", "dim=abc"], "dim ('abc') must be an int"),
        (["--set", "dim=-3"], "dim="),
        (["--set", "symbols=abc"], "symbols="),
        (["--match-to", "window"], "--match-to does nothing without --match"),
        (["--tune-steps", "5"], "--tune-steps does nothing without --tune"),
    ],
)
def test_wrong_use_of_a_comparison_is_heard_of_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    assert main(["compare", "--models", TINY, "--task", STREAM, "--smoke", "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_costs_that_cannot_be_written_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "cost")
    assert main(["cost", "--models", "window", "--lengths", "16", "--smoke", "--out", out]) == 1
    said = capsys.readouterr().err
    assert out in said
    assert said.startswith("memory-bench: ")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "results")
    assert main(["run", "--model", TINY, "--task", STREAM, "--smoke", "--out", out]) == 1
    assert out in capsys.readouterr().err


def test_a_comparison_does_not_take_the_folder_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--models", TINY, "--task", STREAM, "--smoke", "--out", str(tmp_path)]
    with Results(tmp_path).hold("comparison", "another one"):
        assert main(command) == 3
    said = capsys.readouterr().err
    assert "another comparison is at work" in said
    assert str(tmp_path) in said
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize("extra", [[], ["--no-controls"]])
def test_the_controls_are_always_there_unless_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
) -> None:
    planned: list[RunSpec] = []

    def nothing(specs: Sequence[RunSpec], *_: Any, **__: Any) -> None:
        planned.extend(specs)
        raise compare_module.InterruptedComparison

    monkeypatch.setattr(compare_module, "compare", nothing)
    models = ["--models", "memformer", "gru dim=32"]
    settings = ["--set", "slots=4", "model.depth=1", "steps=3"]
    words = ["compare", "--task", "needle", "--smoke", *models, *extra, "--out", str(tmp_path)]
    assert main([*words, "--set", "depth=1", "steps=3"]) == 130
    added = [] if extra else ["window", "full", "transformer-xl"]
    assert [spec.label for spec in planned] == ["memformer", "gru dim=32", *added]
    said = capsys.readouterr().out
    assert ("controls added: window, full, transformer-xl (--no-controls" in said) == (not extra)
    noted = read_json(tmp_path / "comparison.json")["runs"]
    assert [run["model"] for run in noted] == [spec.label for spec in planned]

    # What only the others have is not asked of the controls, and the rest is.
    planned.clear()
    alone = ["compare", "--task", "needle", "--smoke", "--models", "memformer", *extra]
    assert main([*alone, *settings, "--out", str(tmp_path)]) == 130
    assert len(planned) == (1 if extra else 5)
    for spec in planned:
        assert (spec.train.steps, spec.model_options["depth"]) == (3, 1)
        assert ("slots" in spec.model_options) == (spec.model == "memformer")
    assert ("window without slots=4, which it does not have" in capsys.readouterr().out) == (not extra)


def test_an_empty_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "shown", "hidden"), [("models", "htm", "recall "), ("tasks", "recall", "htm")]
)
def test_list_shows_what_there_is(
    what: str, shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", what]) == 0
    said = capsys.readouterr().out
    assert shown in said
    assert hidden not in said


def test_a_plug_in_is_listed_by_what_its_class_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch)
    assert main(["list", "models"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if NAME in line.split()]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        NAME,
        "plug-in",
        "One layer of fading averages with a residual",
        "The averages `[batch, averages]` after the last token",
    ]
    register(ModelInfo("gone", "no.such_module:Model"))
    assert shown("gone") == ("plug-in", "cannot be imported: No module named 'no'", "")


@pytest.mark.parametrize("command", ["", "list", "run", "compare", "report"])
def test_every_option_has_a_line_of_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*([command] if command else []), "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "memory-bench" in said
    if command == "compare":
        for words in ("Names of models", "Optimiser steps", "Runs at once", "three or more give intervals"):
            assert words in said


def test_speed_is_handed_on_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    command = ModuleType("benchmarks.speed.command")
    command.main = lambda words: seen.append(words)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.speed.command", command)
    assert main(["speed", "--queries", "128"]) == 0
    assert seen == [["--queries", "128"]]


def test_help_and_reports_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, benchmarks.cli, benchmarks.report, benchmarks.plots\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_without_the_extra_packages_the_message_names_the_extra() -> None:
    code = "import sys; sys.modules['tyro'] = None; import benchmarks.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'memory-models[bench]'" in result.stderr
    assert "Traceback" not in result.stderr
