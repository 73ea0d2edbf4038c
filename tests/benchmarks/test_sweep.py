"""One model over the values of options: which runs are planned, and what they are called."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import pytest

from benchmarks.settings import RunSpec, command_of, evaluation_of, plan, setting_of
from benchmarks.sweep import label, parse_option, plan_sweep
from tests.benchmarks.sweeps import planned
from tests.benchmarks.tiny import STREAM, TINY


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
    # A default, a setting of the table, one of the task, an option of the language model.
    for vary in ("dropout=0.1,0.3", "dim=16,4", "task.symbols=4,3", "tie_embeddings=True,False"):
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
        (["dim=4", "dropout=0.1,2"], {}, "dim=4, dropout=2: dropout"),
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
        name: value
        for name, value in spec.to_json().items()
        if name not in ("trained", "task_options", "variant")
    }
    from benchmarks.results import run_id

    assert spec.id == run_id(fields)


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
