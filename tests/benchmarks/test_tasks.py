"""Laws of every task, under its `smoke` options; a new task is tested by being in its folder."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import task as module
from benchmarks import tasks as folder
from benchmarks.task import (
    IGNORED,
    AccuracyScorer,
    Batch,
    Scorer,
    Task,
    accuracies,
    accuracy_metrics,
    create_task,
    generator,
    one_hot_logits,
    stable_seed,
    tasks,
)
from memory_models.registry import Named, Registry

NAMES = tasks.names()


@functools.cache
def smoke(name: str) -> Task:
    return create_task(name, **tasks.load(name).smoke)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return smoke(request.param)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.tokens, b.tokens), (a.labels, b.labels), (a.groups, b.groups)]
    pairs += [(x, y) for x, y in [(a.reset, b.reset), (a.mask, b.mask)] if x is not None and y is not None]
    pairs += [(a.extras[key], b.extras[key]) for key in a.extras]
    return a.extras.keys() == b.extras.keys() and all(torch.equal(x, y) for x, y in pairs)


def score(task: Task, batches: Iterator[Batch], answer) -> tuple[dict[str, float], dict[str, int]]:
    scorer = task.scorer()
    for batch in batches:
        scorer.update(answer(batch), batch)
    return scorer.result(), scorer.counts()


def test_a_training_batch_is_a_pure_function_of_seed_and_step(task: Task) -> None:
    fresh = create_task(task.name, **task.smoke)
    for step in (7, 0, 3):  # in another order than below
        fresh.batch(seed=5, step=step, batch_size=4)
    for step in (0, 3, 7):
        assert same(task.batch(seed=5, step=step, batch_size=4), fresh.batch(seed=5, step=step, batch_size=4))


def test_seeds_and_steps_give_different_batches(task: Task) -> None:
    batches = [task.batch(seed=s, step=t, batch_size=4) for s in (0, 1) for t in (0, 1)]
    for i, a in enumerate(batches):
        assert not any(torch.equal(a.tokens, b.tokens) for b in batches[:i])


def test_batches_are_well_formed(task: Task) -> None:
    training = [task.batch(seed=0, step=step, batch_size=3) for step in range(20)]
    evaluation = list(task.evaluation(batch_size=3))
    for batch in training + evaluation:
        rows, time = batch.tokens.shape
        assert rows <= 3
        assert time == task.segment_length if task.streaming else time % task.segment_length == 0
        assert batch.tokens.dtype == batch.labels.dtype == batch.groups.dtype == torch.int64
        assert 0 <= batch.tokens.min() <= batch.tokens.max() < task.vocab_size
        asked = batch.labels != IGNORED
        assert batch.asked == asked.sum()
        assert ((batch.labels >= 0) & (batch.labels < task.vocab_size))[asked].all()
        assert -1 <= batch.groups.min() <= batch.groups.max() < len(task.groups)
        assert not (batch.groups >= 0)[~asked].any()
        if batch.mask is not None:
            assert batch.mask.dtype == torch.bool
            assert not asked[~batch.mask].any()
        if batch.reset is not None:
            assert batch.reset.dtype == torch.bool
            assert batch.reset.shape in [(rows,), (rows, time)]
        assert all(values.shape == batch.tokens.shape for values in batch.extras.values())
        if not task.streaming:
            assert asked.any()
    if task.streaming:
        assert training[0].reset is not None
        assert training[0].reset.all()
        assert evaluation[0].reset is not None
        assert evaluation[0].reset.all()
        assert len({len(batch.tokens) for batch in evaluation}) == 1


def test_the_oracle_scores_perfectly(task: Task) -> None:
    result, counts = score(task, task.evaluation(batch_size=4), task.oracle)
    for metric in task.metrics:
        if counts[metric.name]:
            assert result[metric.name] == pytest.approx(1.0 if metric.higher_is_better else 0.0, abs=1e-6)
    assert counts[task.headline] > 0


def test_the_oracle_scores_perfectly_in_bfloat16(task: Task) -> None:
    exact, _ = score(task, task.evaluation(batch_size=4), task.oracle)
    rounded, _ = score(task, task.evaluation(batch_size=4), lambda batch: task.oracle(batch).bfloat16())
    assert rounded == pytest.approx(exact, nan_ok=True)


def test_every_figure_has_the_same_names_in_the_same_order(task: Task) -> None:
    names = [metric.name for metric in task.metrics]
    assert len(set(names)) == len(names)
    assert list(task.scorer().result()) == names
    assert list(task.scorer().counts()) == names
    assert list(task.floor()) == list(task.chance()) == names
    assert task.scorer().headline == task.headline
    assert task.metric(task.headline).name == task.headline
    with pytest.raises(LookupError, match="Did you mean"):
        task.metric(task.headline[:-1])


def test_nothing_asked_is_nan_and_counts_zero(task: Task) -> None:
    assert all(math.isnan(value) for value in task.scorer().result().values())
    assert not any(task.scorer().counts().values())


def test_chance_is_no_better_than_the_floor_and_the_floor_no_better_than_the_oracle(task: Task) -> None:
    result, counts = score(task, task.evaluation(batch_size=4), task.oracle)
    for metric in task.metrics:
        if not counts[metric.name]:
            continue
        ordered = [task.chance()[metric.name], task.floor()[metric.name], result[metric.name]]
        sign = 1 if metric.higher_is_better else -1
        assert sorted(ordered, key=lambda value: sign * value) == ordered, metric.name


def test_the_evaluation_set_is_fixed_and_the_same_for_any_batch_size(task: Task) -> None:
    first, second = list(task.evaluation(batch_size=4)), list(task.evaluation(batch_size=4))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    # something that answers from the token at hand alone, differently for each
    table = torch.randn(task.vocab_size, task.vocab_size, generator=torch.Generator().manual_seed(0))
    whole, counts = score(task, task.evaluation(batch_size=64), lambda batch: table[batch.tokens])
    parts, part_counts = score(task, task.evaluation(batch_size=3), lambda batch: table[batch.tokens])
    assert parts == pytest.approx(whole, nan_ok=True)
    assert part_counts == counts


def test_a_stream_begins_with_a_reset_wherever_its_memory_is_not_its_own(task: Task) -> None:
    if not task.streaming:
        pytest.skip("whole sequences start afresh")
    for batch in task.evaluation(batch_size=2):
        assert batch.reset is not None
        starts = (batch.extras["position"] == 0) & (batch.mask if batch.mask is not None else True)
        reset = batch.reset if batch.reset.dim() == 2 else batch.reset[:, None] & starts
        assert torch.equal(reset, starts)


def test_training_and_evaluation_share_no_sequence(task: Task) -> None:
    if task.streaming:
        pytest.skip("split by document, which the corpus's tests check")
    training = {
        tuple(row) for t in range(200) for row in task.batch(seed=0, step=t, batch_size=32).tokens.tolist()
    }
    evaluation = {tuple(row) for batch in task.evaluation(batch_size=64) for row in batch.tokens.tolist()}
    assert training.isdisjoint(evaluation)


def test_the_fingerprint_is_that_of_the_data(task: Task, tmp_path) -> None:
    fresh = create_task(task.name, cache=tmp_path, **task.smoke)
    assert fresh.fingerprint() == task.fingerprint()
    assert len({smoke(name).fingerprint() for name in NAMES}) == len(NAMES)


def test_facts_and_keep_work(task: Task, tmp_path) -> None:
    assert all(isinstance(value, str | int | float) for value in task.facts().values())
    task.keep(tmp_path / "run")
    assert task.summary
    assert task.floor_is


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_are_named(name: str) -> None:
    option = next(iter(tasks.load(name).smoke))
    with pytest.raises(TypeError, match=f"Did you mean '{option}'"):
        create_task(name, **{option[:-1]: 1})
    with pytest.raises(TypeError, match="takes a"):
        tasks.load(name)(object())
    with pytest.raises(TypeError, match="not both"):
        tasks.load(name)(tasks.load(name).Config(), **{option: tasks.load(name).smoke[option]})


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(LookupError, match=r"unknown task 'recal'. Did you mean 'recall'"):
        create_task("recal")


def test_seeds_are_the_same_on_every_machine() -> None:
    # results that were published with these seeds must stay reproducible
    assert stable_seed("recall", "train", 0, 1) == 6093041312127614351
    assert stable_seed("a", 1) != stable_seed("a", "1")
    assert generator("a").integers(10**9) == generator("a").integers(10**9)


@dataclass(frozen=True, kw_only=True)
class EchoConfig:
    """A task as small as they get."""

    length: int = 4
    """Tokens of the one segment."""


class Echo(Task):
    """Say the token before."""

    name = "echo"
    summary = "say the token before"
    Config = EchoConfig
    streaming = False
    vocab_size = 4
    groups = ("near", "far")
    metrics = accuracy_metrics(groups)
    headline = AccuracyScorer.headline

    @property
    def segment_length(self) -> int:
        return self.config.length

    def batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        random = generator(self.name, "train", seed, step)
        tokens = torch.from_numpy(random.integers(4, size=(batch_size, 2 * self.config.length)))
        labels = tokens.roll(1, 1)
        labels[:, 0] = IGNORED
        groups = (torch.arange(tokens.shape[1]) % self.config.length == 0).long().expand_as(tokens).clone()
        groups[:, 0] = -1
        return Batch(tokens=tokens, labels=labels, groups=groups)

    def evaluation(self, *, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        yield self.batch(seed=seed, step=-1, batch_size=batch_size)

    def scorer(self) -> Scorer:
        return AccuracyScorer(self.groups, distant=[1])

    def oracle(self, batch: Batch) -> Tensor:
        return one_hot_logits(batch.tokens.roll(1, 1), 4)

    def floor(self) -> dict[str, float]:
        return accuracies(self.groups, [1.0, 0.25], [1])

    def chance(self) -> dict[str, float]:
        return accuracies(self.groups, [0.25, 0.25], [1])


def test_a_new_task_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        f"from {__name__} import Echo",
        "class Mine(Echo):",
        "    name = 'mine'",
        "class Base(Echo): ...",
    )
    (tmp_path / "mine.py").write_text("\n".join(lines))
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    monkeypatch.setattr(module, "tasks", Registry("task", find=module.find_tasks))
    try:
        assert module.tasks.names() == [*NAMES, "mine"]
        made = create_task("mine")
        assert score(made, made.evaluation(batch_size=5), made.oracle)[0]["worst accuracy"] == 1
    finally:
        sys.modules.pop(f"{folder.__name__}.mine", None)


def test_a_task_from_elsewhere_is_one_class_and_one_line() -> None:
    tasks.register(Named("echo", f"{__name__}:Echo"))
    try:
        assert "echo" in tasks.names()
        made = create_task("echo", length=6)
        result, counts = score(made, made.evaluation(batch_size=5), made.oracle)
        assert set(result.values()) == {1.0}
        assert counts == {"accuracy/near": 50, "accuracy/far": 5, "mean accuracy": 5, "worst accuracy": 5}
    finally:
        tasks.unregister("echo")


def test_accuracy_counts_only_what_is_asked_in_a_group() -> None:
    scorer = AccuracyScorer(["a", "b", "c"], distant=[1, 2])
    labels = torch.tensor([[0, 1, IGNORED, 2], [1, 1, 2, 0]])
    groups = torch.tensor([[0, 1, -1, 2], [1, 1, 2, -1]])
    said = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 0]])
    batch = Batch(tokens=labels.clamp(min=0), labels=labels, groups=groups)
    scorer.update(one_hot_logits(said, 3), batch)
    expected = {"accuracy/a": 1.0, "accuracy/b": 2 / 3, "accuracy/c": 0.5}
    # c was asked two thirds as often as b: (2/3 + 2/3 * 1/2) / (5/3).
    assert scorer.result() == pytest.approx({**expected, "mean accuracy": 0.6, "worst accuracy": 0.5})
    assert list(scorer.counts().values()) == [1, 3, 2, 5, 5]


def test_a_group_in_which_nothing_is_asked_is_left_out_of_mean_and_worst() -> None:
    labels, groups = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 1, 2]])
    batch = Batch(tokens=labels, labels=labels, groups=groups)
    scorer = AccuracyScorer(["a", "b", "c", "never"], distant=[1, 2, 3])
    scorer.update(one_hot_logits(torch.tensor([[0, 1, 0, 2]]), 3), batch)
    result = scorer.result()
    assert math.isnan(result["accuracy/never"])
    # b was asked twice, c once: (1/2 + 1/2 * 1) / (3/2).
    assert (result["mean accuracy"], result["worst accuracy"]) == (pytest.approx(2 / 3), 0.5)
    nothing = AccuracyScorer(["a", "never"], distant=[1])
    nothing.update(one_hot_logits(labels, 3), dataclasses.replace(batch, groups=torch.zeros_like(groups)))
    assert math.isnan(nothing.result()["mean accuracy"])


def test_a_batch_moves_as_a_whole() -> None:
    batch = smoke(NAMES[0]).batch(seed=0, step=0, batch_size=2)
    moved = Batch(
        tokens=batch.tokens,
        labels=batch.labels,
        groups=batch.groups,
        mask=torch.ones_like(batch.tokens, dtype=torch.bool),
        extras={"x": batch.tokens},
    ).to("meta")
    assert {
        t.device.type for t in (moved.tokens, moved.labels, moved.groups, moved.mask, moved.extras["x"])
    } == {"meta"}
    assert moved.reset is None
