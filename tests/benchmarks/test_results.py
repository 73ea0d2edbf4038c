"""Ids that change with what matters, and lines that survive crashes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import provenance
from benchmarks import results as results_module
from benchmarks.provenance import imported_modules, source_digest, versions
from benchmarks.results import (
    FAILED,
    FINISHED,
    FolderBusyError,
    Results,
    RunBusyError,
    plain,
    run_id,
    write_atomically,
)
from benchmarks.settings import RunSpec, TrainSettings, plan
from tests.benchmarks.tiny import TINY


def test_an_id_changes_with_everything_that_changes_the_numbers() -> None:
    specs = [
        plan(TINY, "recall", 0),
        plan(TINY, "recall", 1),
        plan("window", "recall", 0),
        plan(TINY, "recall", 0, smoke=True),
        plan(TINY, "recall", 0, assignments=["steps=501"]),
        plan(TINY, "recall", 0, assignments=["keys=17"]),
        plan(TINY, "recall", 0, assignments=["dropout=0.2"]),
        plan(TINY, "recall", 0, assignments=["train.betas=(0.9, 0.99)"]),
    ]
    assert len({spec.id for spec in specs}) == len(specs)
    assert plan(TINY, "recall", 0).id == specs[0].id


def test_a_spec_survives_json_with_its_id() -> None:
    spec = plan(TINY, "recall", 0, smoke=True)
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.id == spec.id


def test_a_model_may_be_named_with_settings_of_its_own() -> None:
    spec = plan("memformer gradient=replay slots=5", "recall", 1, assignments=["slots=6"])
    assert (spec.model, spec.label) == ("memformer", "memformer gradient=replay slots=5")
    same = plan("memformer", "recall", 1, assignments=["train.gradient=replay", "model.slots=6"])
    assert (same.label, same.id) == ("memformer", spec.id)
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))).label == spec.label
    with pytest.raises(ValueError, match="Did you mean 'gradient'"):
        plan("memformer grdient=replay", "recall", 0)
    with pytest.raises(LookupError, match="empty"):
        plan("  ", "recall", 0)


def test_an_id_does_not_depend_on_the_order_of_options() -> None:
    assert run_id({"a": 1, "b": (2, 3)}) == run_id({"b": [2, 3], "a": 1})


def test_the_code_counts_and_its_comments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for number, text in enumerate(
        (
            "def f():\n    return 1\n",
            '"""Doc."""\n\n# note\ndef f():\n    "doc"\n    return 1\n',
            "def f():\n    return 2\n",
        )
    ):
        # A module of its own for each text, all called alike inside their package.
        package = tmp_path / f"package{number}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "code.py").write_text(text)
        digests.append(_digest_without_name(f"package{number}"))
    assert digests[0] == digests[1] != digests[2]


def _digest_without_name(package: str) -> list[bytes]:
    from benchmarks.provenance import _code_of, _source_files

    return [_code_of(path.read_bytes()) for path in _source_files(package)]


@pytest.mark.parametrize("module", ["benchmarks.train", "benchmarks.tasks.text", "benchmarks.tasks.ballet"])
def test_all_code_that_a_module_loads_names_a_run(module: str) -> None:
    script = f"import {module}, sys; print(*(name for name in sys.modules if name.startswith('benchmarks.')))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    # What a run is made of stands in its fields, and what is said of it beside its scores changes none.
    aside = {"defaults", "settings", "members", "provenance", "results", "diagnose"}
    wanted = set(loaded.split()) - {f"benchmarks.{name}" for name in aside}
    assert len(wanted) > 1
    assert wanted <= set(imported_modules([module]))


def test_a_helper_s_code_names_the_runs_of_the_tasks_that_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "own_tasks"
    package.mkdir()
    task = "from tests.benchmarks.tiny import Stream\n\nclass Own(Stream):\n    name = {name!r}\n"
    files = {
        "__init__": "",
        "helper": "A = 1\n",
        "between": "from . import helper\n",
        "plain": task.format(name="plain"),
        "direct": "from own_tasks.helper import A\n" + task.format(name="direct"),
        "distant": task.format(name="distant")
        + "    def keep(self, folder):\n        from own_tasks import between\n",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)

    def ids() -> dict[str, str]:
        for cached in (provenance._imports_of, provenance._digest_of):
            cached.cache_clear()
        return {name: plan(TINY, f"own_tasks.{name}:Own", 0).id for name in ("plain", "direct", "distant")}

    before = ids()
    assert ids() == before
    (package / "helper.py").write_text("A = 1  # a comment\n")
    assert ids() == before
    (package / "helper.py").write_text("A = 2\n")
    after = ids()
    assert {name for name in before if before[name] != after[name]} == {"direct", "distant"}


def test_a_module_that_is_not_there_counts_by_its_name() -> None:
    assert source_digest(["no_such_module_a"]) != source_digest(["no_such_module_b"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "key=value"),
        ("steps=0", "must be at least 1"),
        ("train.stepz=3", "Did you mean 'steps'"),
        ("dropuot=0.1", "Did you mean 'dropout'"),
        ("task.keyz=3", "Did you mean 'keys'"),
    ],
)
def test_a_wrong_assignment_is_refused_with_the_way_out(assignment: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(TINY, "recall", 0, assignments=[assignment])


def test_options_for_all_models_reach_those_that_have_them() -> None:
    assert plan("window", "recall", 0).model_options["token_shift"] is True
    assert "token_shift" not in plan(TINY, "recall", 0).model_options
    assert plan("window", "recall", 0).model_options["segment_length"] == 16


def test_settings_refuse_what_makes_no_sense() -> None:
    for wrong in ({"decay": 1.5}, {"learning_rate": 0.0}, {"warmup": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainSettings(**wrong)  # type: ignore[arg-type]


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "folder")
    assert results.records() == []
    for number in range(3):
        results.append({"id": str(number), "status": FINISHED, "value": math.nan if number == 1 else number})
    assert [record["value"] for record in results.records()] == [0, None, 2]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_is_left_out_and_mended(tmp_path: Path, cut: int) -> None:
    results = Results(tmp_path)
    for name in "abc":
        results.append({"id": name, "status": FINISHED, "text": "x" * 40})
    data = results.lines.read_bytes()
    results.lines.write_bytes(data[:-cut])
    # Without its newline only, a line is whole.
    left = ["a", "b", "c"] if cut == 1 else ["a", "b"]
    assert [record["id"] for record in results.records()] == left
    results.append({"id": "d", "status": FINISHED})
    assert [record["id"] for record in results.records()] == [*left, "d"]
    assert results.lines.read_bytes().endswith(b"\n")
    assert all(json.loads(line) for line in results.lines.read_text().splitlines())


def test_a_line_that_is_no_json_does_not_hide_the_others(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append({"id": "a", "status": FINISHED})
    with results.lines.open("ab") as file:
        file.write(b"garbage \xff\n")
    results.append({"id": "b", "status": FINISHED})
    assert list(results.latest()) == ["a", "b"]


def test_a_finished_line_is_not_hidden_by_a_later_failure(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for status in (FAILED, FINISHED, FAILED):
        results.append({"id": "a", "status": status})
    assert results.latest()["a"]["status"] == FINISHED
    assert results.is_finished("a")
    assert results.latest_attempt("a")["status"] == FAILED
    with pytest.raises(LookupError):
        results.latest_attempt("b")


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    results.append({"id": "a", "status": FINISHED})
    before = results.lines.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            results.append({"id": "b", "status": FINISHED})
        with pytest.raises(OSError, match="No space"):
            write_atomically(results.lines, b"new")
    assert results.lines.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def _append_many(folder: str, name: str) -> None:
    for number in range(20):
        Results(folder).append({"id": f"{name}{number}", "status": FINISHED, "text": name * 3000})


def test_several_processes_may_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(str(tmp_path), name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Results(tmp_path).latest()) == 60


def test_a_run_is_claimed_by_one_process_only(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.claim("a"), pytest.raises(RunBusyError, match="another process"), results.claim("a"):
        pass
    with results.claim("a") as folder:
        assert folder == results.run_folder("a")


def test_a_folder_is_held_for_one_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "_HOLD_SECONDS", 0.1)
    first, second = Results(tmp_path), Results(tmp_path)
    # A purpose that ended leaves nothing behind.
    with first.hold("comparison", "another"):
        pass
    with first.hold("comparison", ["a", 1]):
        with second.hold("comparison", ["a", 1]), second.hold("sweep", "b"):
            pass
        with pytest.raises(FolderBusyError, match="--out"), second.hold("comparison", ["a", 2]):
            pass
    with second.hold("comparison", ["a", 2]):
        pass


def test_plain_values_are_what_json_knows() -> None:
    value = {"a": (1, 2.5, None, True), 3: {"b": math.inf}, "path": Path("x")}
    assert plain(value) == {"a": [1, 2.5, None, True], "3": {"b": None}, "path": "x"}


def test_versions_name_what_a_run_was_made_with() -> None:
    assert {"python", "torch", "memory-models", "cpu", "platform"} <= set(versions())


def test_a_commit_is_marked_when_code_was_changed_and_not_for_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "benchmarks"
    package.mkdir()
    for file in (package / "provenance.py", tmp_path / "RESULTS.md"):
        file.write_text("# before\n")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "One"]):
        subprocess.run([*git, *words], check=True)
    commit = versions()["commit"]
    (tmp_path / "RESULTS.md").write_text("# after\n")
    assert versions()["commit"] == commit
    (package / "provenance.py").write_text("# after\n")
    assert versions()["commit"] == f"{commit}+changes"
