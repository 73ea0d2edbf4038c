"""Diagnostics of a trained model: what is summed up, which gradients count, and when a warning is due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.diagnose import diagnose, memory_gradients, memory_parameters, summarise_stats
from benchmarks.evaluate import segments
from benchmarks.findings import warnings
from benchmarks.learning import loss_of
from benchmarks.members import build_model
from benchmarks.task import create_task, tasks
from tests.plug_in import NAME, install

OPTIONS = {"dim": 16, "depth": 2, "heads": 2, "segment_length": 16}


def recall() -> Any:
    return create_task("recall", **tasks.load("recall").smoke)


def test_stats_are_summed_up_over_all_segments_but_the_first() -> None:
    task = recall()
    model = build_model("memorizing", {**OPTIONS, "memories": 32, "topk": 4}, task.vocab_size)
    nn.init.normal_(model.module.trunk.attentions[1].gate)
    found = summarise_stats(model, task, rows=8, batches=2)
    shares = []
    for index, batch in enumerate(task.evaluation(batch_size=8)):
        memory = None
        for start in range(0, 48, 16 if index < 2 else 10**6):
            if index == 2:
                break
            out = model.eval()(batch.tokens[:, start : start + 16], memory, stats=True)
            memory = out.memory
            shares += [value for name, value in out.stats.items() if name.endswith("share") and start]
    every = torch.cat([share.flatten() for share in shares]).double()
    [name] = [name for name in found if name.endswith("memory share")]
    assert found[name]["mean"] == pytest.approx(float(every.mean()))
    assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]
    assert float((every < found[name]["low"]).double().mean()) <= 0.05 + 1 / len(every)


def test_stats_are_the_same_wherever_the_pairs_are() -> None:
    task = create_task("recall", segments=5, keys=16, values=8, evaluation_sequences=8)
    sizes = {**OPTIONS, "segment_length": task.segment_length, "memories": 48, "topk": 4}
    found = []
    for store in ({}, {"store": "outside", "pending_segments": 1}):
        torch.manual_seed(0)
        model = build_model("memorizing", {**sizes, **store}, task.vocab_size)
        found.append(summarise_stats(model, task, rows=4, batches=2))
    assert found[0]
    for name, summary in found[0].items():
        assert found[1][name] == pytest.approx(summary, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("htm", {"chunk_size": 16, "chunks": 8, "topk": 8}),
        ("memorizing", {"memories": 128, "topk": 128, "memory_layers": (0, 1)}),
    ],
)
def test_shares_of_what_is_read_add_up_over_the_segments_there_are(
    name: str, options: dict[str, Any]
) -> None:
    task = create_task("recall", segments=5, keys=16, values=8, evaluation_sequences=8)
    model = build_model(name, {**OPTIONS, "segment_length": task.segment_length, **options}, task.vocab_size)
    found = diagnose(model, task, rows=4, batches=2)
    assert list(found.weight_by_age) == [f"{name}/layer 0", f"{name}/layer 1"]
    for shares in found.weight_by_age.values():
        assert sum(shares.values()) == pytest.approx(1)
        # untrained, all that is held is read: of four segments each one's share, the newer ones' more often
        assert [age for age, share in shares.items() if share] == ["1", "2", "3-4"]
        assert shares["1"] > shares["2"]
    assert not any("by age" in name for name in found.summaries)


def test_ages_of_nothing_do_not_count() -> None:
    task = recall()
    model = build_model("htm", {**OPTIONS, "chunk_size": 4, "chunks": 8, "topk": 8}, task.vocab_size)
    found = summarise_stats(model, task, rows=8, batches=1)
    ages = [summary for name, summary in found.items() if name.endswith("age")]
    assert ages
    assert all(summary["low"] >= 0 for summary in ages)


@pytest.mark.parametrize("slots", [1, 128])
def test_memformer_fresh_from_the_registry_is_not_suspicious(slots: int) -> None:
    task = recall()
    model = build_model("memformer", {**OPTIONS, "slots": slots}, task.vocab_size)
    found = summarise_stats(model, task, rows=4, batches=1)
    assert [name for name in found if "slot" in name]
    assert warnings(record(diagnostics=found), headline="accuracy") == []


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    task = recall()
    model = build_model("htm", OPTIONS, task.vocab_size).train()
    summarise_stats(model, task, rows=4, batches=1)
    memory_gradients(model, "htm", OPTIONS, [task.batch(seed=0, step=0, batch_size=2)])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_the_memory_are_those_of_the_loss() -> None:
    task = recall()
    options = {**OPTIONS, "memories": 32, "topk": 4}
    model = build_model("memorizing", options, task.vocab_size).eval()
    batch = task.batch(seed=0, step=0, batch_size=4)
    found = memory_gradients(model, "memorizing", options, [batch])
    loss_of(model, [batch], None)[0].backward()
    wanted = {name: float(p.grad.norm()) for name, p in model.named_parameters() if name.endswith(".gate")}
    assert found.keys() >= wanted.keys() != set()
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert not any("feedforwards" in name or name.startswith(("embedding", "head")) for name in found)


def test_a_step_of_one_segment_reads_what_the_training_carries() -> None:
    task = recall()
    model = build_model("htm", OPTIONS, task.vocab_size).eval()
    *before, last = segments(task.batch(seed=0, step=0, batch_size=4), model.segment_length)
    _, memory = loss_of(model, before, None)
    reading = {"module.reads.0.query.weight", "module.read_norms.0.weight"}
    alone = memory_gradients(model, "htm", OPTIONS, [last])
    carried = memory_gradients(model, "htm", OPTIONS, [last], memory.detach())
    assert reading <= alone.keys() == carried.keys()
    assert all(alone[name] == 0 for name in reading)
    assert all(carried[name] > 0 for name in reading)


def test_controls_have_no_memory_parameters() -> None:
    task = recall()
    for name in ("window", "gru"):
        options = {key: value for key, value in OPTIONS.items() if name == "window" or key != "heads"}
        model = build_model(name, options, task.vocab_size)
        assert memory_parameters(model, name, options) == {}
    assert memory_parameters(build_model("htm", OPTIONS, task.vocab_size), "htm", OPTIONS)


def test_a_model_of_another_package_is_diagnosed_by_name_and_by_its_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, monkeypatch)
    task, options = recall(), {"dim": 16, "averages": 8, "segment_length": 16}
    for name in (NAME, "fading_memory:Fading"):
        model = build_model(name, options, task.vocab_size)
        found = memory_gradients(model, name, options, [task.batch(seed=0, step=0, batch_size=4)])
        assert {"module.write_weights.weight", "module.log_time"} <= found.keys()
        assert not any(key.startswith(("embedding", "head")) for key in found)
        assert all(norm > 0 for norm in found.values())
        # An option that means something else in the plain transformer.
        assert memory_parameters(model, name, {**options, "dim": 15}).keys() == found.keys()


def use(without: float, drop: float) -> dict[str, Any]:
    scores = {"carried": {"accuracy": 0.8}, "none": {"accuracy": without}}
    return {"scores": scores, "drop": {"none": drop}}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "tags": ["family"],
        "memory_use": use(0.1, 0.7),
        "diagnostics": {"memorizing/memory share": {"mean": 0.4, "low": 0.1, "high": 0.9}},
        "memory_gradients": {"gate": 0.1},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"memory_use": {}}, []),
        (
            {"memory_use": use(0.799, 0.001)},
            ["the memory is not used: without it accuracy is 0.799 instead of 0.800"],
        ),
        (
            {"diagnostics": {"x/memory share": {"mean": 0.001, "low": 0, "high": 0.01}}},
            ["x/memory share is closed: 0.0010 on average"],
        ),
        ({"diagnostics": {"x/gate": {"mean": 0.999, "low": 0.9, "high": 1}}}, ["x/gate is all open: 0.9990"]),
        (
            {"diagnostics": {"x/own share": {"mean": 0.999, "low": 0.9, "high": 1}}},
            ["x/own share is all open"],
        ),
        # What a softmax gives to each of 128 slots, or to the only one, says nothing about any gate.
        ({"diagnostics": {"x/slot share": {"mean": 1 / 128, "low": 0, "high": 0.1}}}, []),
        ({"diagnostics": {"x/largest slot share": {"mean": 1.0, "low": 1, "high": 1}}}, []),
        (
            {"diagnostics": {"x/slots used": {"mean": 1.3, "low": 1, "high": 2}}},
            ["few slots are read: x/slots used is 1.30 on average"],
        ),
        ({"diagnostics": {"x/slots used": {"mean": 2.6, "low": 2, "high": 3}}}, []),
        ({"diagnostics": {"x/hit age": {"mean": 0.0, "low": 0, "high": 0}}}, []),
        (
            {"memory_gradients": {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.0}},
            ["no gradient reaches a, c, d and 1 more"],
        ),
        ({"tags": ["control"], "memory_gradients": {"a": 0.0}}, []),
    ],
)
def test_warnings_name_what_is_wrong(changes: dict[str, Any], words: list[str]) -> None:
    found = warnings(record(**changes), headline="accuracy")
    assert len(found) == len(words)
    assert all(text.startswith(start) for text, start in zip(found, words, strict=True))


def scored(task: str, score: float, carried: float, without: float) -> dict[str, Any]:
    """A run as its line of the results tells it, with the task's own facts."""
    facts = {
        "needle": ("mean accuracy", "accuracy", True, 0.1),
        "mqar": ("mean accuracy", "accuracy", True, 1 / 4096),
        "text": ("bits", "bits per identifier", False, 42.6),
    }
    name, unit, up, floor = facts[task]
    return {
        "tags": ["family"],
        "task_facts": {
            "metrics": [{"name": name, "unit": unit, "higher_is_better": up}],
            "floor": {name: floor},
        },
        "scores": {name: score},
        "memory_use": {
            "scores": {"carried": {name: carried}, "none": {name: without}},
            "drop": {"none": (carried - without) * (1 if up else -1)},
        },
    }


@pytest.mark.parametrize(
    ("run", "unused", "at_the_floor"),
    [
        # What was published of htm, seeds 2 and 0, and of memformer: used is what little there is, not more.
        (scored("needle", 0.132, 0.127, 0.103), True, True),
        (scored("needle", 0.976, 0.972, 0.097), False, False),
        (scored("mqar", 0.008, 0.009, 0.0), True, True),
        (scored("mqar", 0.331, 0.333, 0.0), False, False),
        # Answers from elsewhere: the task leaks.
        (scored("needle", 0.9, 0.9, 0.89), True, False),
        # Bits have no best value.
        (scored("text", 36.612, 35.346, 35.318), True, False),
        (scored("text", 34.859, 33.087, 33.988), False, False),
        (scored("text", 43.1, 43.0, 44.0), False, True),
    ],
)
def test_a_score_is_held_against_what_there_is_to_gain(
    run: dict[str, Any], unused: bool, at_the_floor: bool
) -> None:
    [headline] = run["scores"]
    found = warnings(run, headline=headline)
    assert (
        any(text.startswith(("the memory is not used", "the memory is hardly used")) for text in found)
        == unused
    )
    assert any(text.startswith("hardly better than without memory") for text in found) == at_the_floor
    assert warnings({**run, "tags": ["control"]}, headline=headline) == []
    # A model from another package has no tag.
    assert warnings({**run, "tags": []}, headline=headline) == found
