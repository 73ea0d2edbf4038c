"""Models made equally large: what the search finds, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.match import PARAMS, STATE, TOLERANCE, MatchError, count_parameters, match, measure_state
from benchmarks.members import build_model
from benchmarks.settings import cached_task, plan
from benchmarks.terms import Terms, make_equal
from tests.benchmarks.tiny import STREAM, TINY


def test_parameters_are_counted_without_being_made() -> None:
    spec = plan("memformer", "recall", 0, smoke=True)
    vocabulary = cached_task("recall", spec.task_options).vocab_size
    torch.manual_seed(0)
    before = torch.get_rng_state()
    counted = count_parameters(spec)
    assert torch.equal(torch.get_rng_state(), before)
    model = build_model("memformer", spec.model_options, vocabulary)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_models_are_built_with_equally_many_parameters() -> None:
    names = ("memformer", "memxl", "gru", "window")
    found = match([plan(name, "recall", 0) for name in names], PARAMS, reference=plan("window", "recall", 0))
    assert found.reference == "window"
    assert found.models["window"].options == {}
    for name in names:
        assignments = found.models[name].assignments
        reached = count_parameters(plan(name, "recall", 0, assignments=assignments))
        assert reached == found.models[name].value
        assert abs(reached - found.target) <= TOLERANCE[PARAMS] * found.target
    assert set(found.models["gru"].options) == {"hidden"}
    assert set(found.models["memxl"].options) == {"dim", "ff_dim"}


def test_memories_are_matched_by_what_each_keeps() -> None:
    specs = [plan(name, "recall", 0, smoke=True) for name in ("memorizing", "memformer", "window")]
    found = match(specs, STATE, reference=8192)
    assert {name: list(one.options) for name, one in found.models.items()} == {
        "memorizing": ["memories"],
        "memformer": ["slots"],
        "window": [],
    }
    for name in ("memorizing", "memformer"):
        spec = plan(name, "recall", 0, smoke=True, assignments=found.models[name].assignments)
        assert measure_state(spec) == found.models[name].value == pytest.approx(8192, rel=TOLERANCE[STATE])
    assert found.models["window"].note == "carries nothing"


def test_a_store_outside_the_memory_is_matched_with_its_bytes() -> None:
    outside = "memorizing store=outside pending_segments=1"
    specs = [plan(name, "recall", 0, smoke=True) for name in ("memorizing", outside)]
    sizes = [measure_state(spec) for spec in specs]
    assert sizes[1] > sizes[0]
    found = match(specs[1:], STATE, reference=2 * int(sizes[1])).models[outside]
    assert found.value == pytest.approx(2 * sizes[1], rel=TOLERANCE[STATE])


def test_the_smallest_memory_of_a_family_is_the_measure() -> None:
    specs = [plan(name, "recall", 0, smoke=True) for name in ("gru", "memformer")]
    found = match(specs, STATE)
    assert (found.reference, found.target) == ("memformer", measure_state(specs[1]))


def test_each_row_of_a_model_is_matched_by_itself() -> None:
    rows = ("memformer dim=32", "memformer dim=48")
    found = match([plan(row, "recall", 0) for row in rows], PARAMS)
    assert found.reference == rows[0]
    assert list(found.models) == list(rows)
    for row in rows:
        reached = count_parameters(plan(row, "recall", 0, assignments=found.models[row].assignments))
        assert abs(reached - found.target) <= TOLERANCE[PARAMS] * found.target


def test_a_control_that_cannot_be_matched_stays_with_a_note_and_a_family_is_refused() -> None:
    gru = plan("gru", "recall", 0, smoke=True)
    found = match([gru], STATE, reference=10**6)
    assert found.models["gru"].options == {}
    assert "cannot have 1,000,000 bytes" in found.models["gru"].note
    with pytest.raises(MatchError, match=r"memformer cannot have 1 bytes of state.*--match-to"):
        match([plan("memformer", "recall", 0, smoke=True)], STATE, reference=1)


def test_a_model_without_a_knob_and_an_unknown_wish_are_refused() -> None:
    tiny = plan(TINY, STREAM, 0, smoke=True)
    with pytest.raises(MatchError, match="none of the options memories"):
        match([tiny], STATE, reference=10**6)
    with pytest.raises(ValueError, match="neither 'params' nor 'state'"):
        match([tiny], "time")
    with pytest.raises(ValueError, match="nothing to match"):
        match([plan("window", "recall", 0, smoke=True)], STATE)


def test_terms_carry_what_was_found() -> None:
    terms = Terms.of(STREAM, [TINY], ["dim=12"], smoke=True)
    wanted = count_parameters(plan(TINY, STREAM, 0, smoke=True, assignments=["dim=20"]))
    equal = make_equal(terms, PARAMS, to=str(wanted))
    assert equal.assignments[TINY] == ["dim=12", "model.dim=20"]
    assert [spec.model_options["dim"] for spec in equal.specs()] == [20]
    assert equal.match is not None
    assert equal.match["target"] == wanted
