"""`mqar`: the published laws of its sequences, where its questions stand, and what needs a memory."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.extrapolation import longer_points, training_assignments
from benchmarks.settings import cached_task, plan
from benchmarks.task import IGNORED, Batch, create_task, one_hot_logits

SIZES: list[dict[str, Any]] = [
    {},
    {"segments": 1},
    {"vocabulary": 64, "random_fillers": True},
    # every key and every place is used
    {"vocabulary": 10, "length": 16, "pairs": 4, "segments": 2, "random_fillers": True},
    # pairs fill the first two of four segments; an odd vocabulary has one value more
    {"vocabulary": 19, "length": 32, "pairs": 8, "segments": 4, "power": 1.0},
    # the same beside room for other fillers
    {"vocabulary": 40, "length": 48, "pairs": 8, "segments": 6, "power": 2.0, "random_fillers": True},
]


def read(tokens: list[int], *, pairs: int, segment_length: int) -> tuple[list[int], list[int]]:
    """Labels and gaps of one sequence, from left to right with a dictionary."""
    written: dict[int, tuple[int, int]] = {}
    labels, gaps = [IGNORED] * len(tokens), [-1] * len(tokens)
    for place, token in enumerate(tokens):
        if place < 2 * pairs:
            if place % 2 == 0:
                written[token] = (tokens[place + 1], place // segment_length)
        elif token in written:
            labels[place], when = written[token]
            gaps[place] = place // segment_length - when
    return labels, gaps


def blind(batch: Batch) -> Batch:
    """The batch without what is asked."""
    return Batch(
        tokens=batch.tokens,
        labels=torch.full_like(batch.labels, IGNORED),
        groups=torch.full_like(batch.groups, -1),
    )


def assert_as_expected(counts: Counter[Any], shares: dict[Any, float]) -> None:
    """A chi-square test with a margin of five standard deviations."""
    assert set(counts) <= set(shares)
    total = sum(counts.values())
    statistic = sum((counts[key] - total * share) ** 2 / (total * share) for key, share in shares.items())
    freedom = len(shares) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) + 5


def drawn_in_order(weights: list[float], count: int) -> dict[tuple[int, ...], float]:
    """The probability of drawing these, in this order, without replacement."""
    shares = {}
    for order in itertools.permutations(range(len(weights)), count):
        share, left = 1.0, sum(weights)
        for index in order:
            share *= weights[index] / left
            left -= weights[index]
        shares[order] = share
    return shares


def asked_places(batch: Batch, pairs: int) -> list[tuple[int, ...]]:
    """For each row, the place of the question about the first pair, the second, ..., counted in questions."""
    keys, later = batch.tokens[:, : 2 * pairs : 2], batch.tokens[:, 2 * pairs :]
    place = (later[:, None, :] == keys[:, :, None]).int().argmax(-1)
    assert (place % 2 == 0).all()
    return [tuple(row) for row in (place // 2).tolist()]


def test_the_defaults_are_the_paper_s_smallest_setting_in_four_segments() -> None:
    task = create_task("mqar")
    batch = task.batch(seed=0, step=0, batch_size=32)
    assert batch.tokens.shape == (32, 64)
    assert (task.vocab_size, task.segment_length) == (8192, 16)
    assert task.groups == ("gap 0", "gap 1", "gap 2", "gap 3")
    assert batch.asked == 32 * 4
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
        published = create_task("mqar", length=length, pairs=pairs, segments=1)
        batch = published.batch(seed=0, step=0, batch_size=2)
        assert batch.tokens.shape == (2, length)
        assert batch.asked == 2 * pairs
        assert published.segment_length == length


@pytest.mark.parametrize("sizes", SIZES)
def test_labels_and_gaps_are_what_a_dictionary_finds(sizes: dict[str, Any]) -> None:
    task: Any = create_task("mqar", **sizes)
    batch = task.batch(seed=1, step=2, batch_size=64)
    names = ["", *task.groups]
    for row in range(64):
        labels, gaps = read(
            batch.tokens[row].tolist(), pairs=task.config.pairs, segment_length=task.segment_length
        )
        assert batch.labels[row].tolist() == labels
        found = [names[group + 1] for group in batch.groups[row].tolist()]
        assert found == ["" if gap < 0 else f"gap {gap}" for gap in gaps]
    assert set(batch.groups[batch.groups >= 0].tolist()) == set(range(len(task.groups)))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_sequence_is_pairs_then_each_key_once_at_an_even_place(sizes: dict[str, Any]) -> None:
    task: Any = create_task("mqar", **sizes)
    c, split = task.config, 2 * task.config.pairs
    batch = task.batch(seed=3, step=0, batch_size=64)
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        keys, values = tokens[:split:2], tokens[1:split:2]
        assert len(set(keys)) == len(set(values)) == c.pairs
        assert all(1 <= key < c.vocabulary // 2 for key in keys)
        assert all(c.vocabulary // 2 <= value < c.vocabulary for value in values)
        asked = [place for place in range(len(tokens)) if labels[place] != IGNORED]
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        assert all(place >= split and place % 2 == 0 for place in asked)
        others = [token for place, token in enumerate(tokens[split:], split) if place not in asked]
        assert not set(others) & set(keys)
        if not c.random_fillers:
            assert set(others) <= {0}


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
@pytest.mark.parametrize(("length", "pairs"), [(16, 2), (14, 3)])
def test_places_of_questions_are_drawn_by_the_power_law_one_by_one(
    power: float, length: int, pairs: int
) -> None:
    task = create_task("mqar", vocabulary=16, length=length, pairs=pairs, segments=1, power=power)
    places = asked_places(task.batch(seed=0, step=0, batch_size=20_000), pairs)
    weights = [power * x ** (power - 1) for x in range(1, length // 2 - pairs + 1)]
    assert_as_expected(Counter(places), drawn_in_order(weights, pairs))


def test_by_default_the_first_key_is_asked_for_by_the_paper_s_law() -> None:
    places = asked_places(create_task("mqar").batch(seed=0, step=0, batch_size=20_000), 4)
    law = 0.01 * np.arange(1, 29) ** (0.01 - 1)
    shares = {place: float(share) for place, share in enumerate(law / law.sum())}
    assert_as_expected(Counter(row[0] for row in places), shares)


def test_keys_and_values_are_uniform_in_every_order() -> None:
    task = create_task("mqar", vocabulary=9, length=16, pairs=3, segments=1)
    tokens = task.batch(seed=0, step=0, batch_size=20_000).tokens
    for first, choices in ((0, range(1, 4)), (1, range(4, 9))):
        orders = list(itertools.permutations(choices, 3))
        found = Counter(tuple(row) for row in tokens[:, first:6:2].tolist())
        assert_as_expected(found, {order: 1 / len(orders) for order in orders})


def test_random_fillers_are_uniform_over_all_tokens_that_are_not_asked_about() -> None:
    task = create_task("mqar", vocabulary=10, length=16, pairs=2, segments=1, random_fillers=True)
    batch = task.batch(seed=0, step=0, batch_size=5000)
    by_keys: dict[tuple[int, ...], Counter[int]] = {}
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        fillers = [token for place, token in enumerate(tokens) if place >= 4 and labels[place] == IGNORED]
        by_keys.setdefault(tuple(sorted(tokens[:4:2])), Counter()).update(fillers)
    assert len(by_keys) == 6
    for keys, found in by_keys.items():
        allowed = set(range(10)) - set(keys)
        assert_as_expected(found, dict.fromkeys(allowed, 1 / 8))


def test_the_oracle_solves_the_example_of_the_released_generator() -> None:
    task = create_task("mqar", vocabulary=12, length=16, pairs=2, segments=1)
    tokens = torch.tensor([[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]])
    nothing = torch.full_like(tokens, -1)
    answers = task.oracle(Batch(tokens=tokens, labels=nothing, groups=nothing))
    sure = answers.max(-1).values > 0
    assert sure[0].nonzero().flatten().tolist() == [6, 12]
    assert answers.argmax(-1)[sure].tolist() == [7, 8]


@pytest.mark.parametrize("sizes", SIZES[1:])
def test_the_oracle_reads_tokens_only_and_is_always_right(sizes: dict[str, Any]) -> None:
    task = create_task("mqar", **sizes, evaluation_sequences=32)
    scorer = task.scorer()
    for batch in task.evaluation(batch_size=16):
        scorer.update(task.oracle(blind(batch)), batch)
    assert {value for value in scorer.result().values() if not math.isnan(value)} == {1.0}
    assert scorer.counts()["mean accuracy"] > 0


@pytest.mark.parametrize("random_fillers", [False, True])
def test_who_forgets_between_segments_solves_gap_0_and_guesses_the_rest(random_fillers: bool) -> None:
    sizes: dict[str, Any] = {
        "vocabulary": 40,
        "length": 48,
        "pairs": 8,
        "segments": 2,
        "evaluation_sequences": 3000,
    }
    task: Any = create_task("mqar", random_fillers=random_fillers, **sizes)
    guess, scorer = task.vocab_size - 1, task.scorer()
    for batch in task.evaluation(batch_size=1000):
        said = torch.full_like(batch.tokens, guess)
        parts = batch.tokens.unflatten(1, (-1, task.segment_length))
        first = read_first_segments(parts[:, 0].tolist(), task.config.pairs, guess)
        said[:, : task.segment_length] = torch.tensor(first)
        scorer.update(one_hot_logits(said, task.vocab_size), batch)
    result, counts, floor = scorer.result(), scorer.counts(), task.floor()
    assert result["accuracy/gap 0"] == floor["accuracy/gap 0"] == 1.0
    expected = floor["accuracy/gap 1"]
    assert expected == 1 / task.config.values
    deviation = math.sqrt(expected * (1 - expected) / counts["accuracy/gap 1"])
    assert abs(result["accuracy/gap 1"] - expected) < 5 * deviation


def read_first_segments(rows: list[list[int]], pairs: int, guess: int) -> list[list[int]]:
    """The answers of a dictionary, and the guess where nothing is asked."""
    found = [read(tokens, pairs=pairs, segment_length=len(tokens))[0] for tokens in rows]
    return [[guess if answer == IGNORED else answer for answer in row] for row in found]


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocabulary": 6, "length": 16, "pairs": 2, "segments": 2},
        {"vocabulary": 10, "length": 16, "pairs": 4, "segments": 4},
        {"vocabulary": 6, "length": 8, "pairs": 2, "segments": 2, "random_fillers": True},
    ],
)
def test_what_a_segment_holds_says_nothing_about_older_values(sizes: dict[str, Any]) -> None:
    """The floor cannot be beaten: given all that its segment holds, an older value stays uniform."""
    task: Any = create_task("mqar", power=1.0, **sizes)
    batch = task.batch(seed=0, step=0, batch_size=20_000)
    length, first = task.segment_length, task.config.vocabulary // 2
    shares = dict.fromkeys(range(first, task.config.vocabulary), 1 / task.config.values)
    tests = 0
    for start in range(length, task.config.length, length):
        held: dict[tuple[int, ...], Counter[int]] = {}
        inside = slice(start, start + length)
        for tokens, labels, groups in zip(
            batch.tokens[:, inside].tolist(),
            batch.labels[:, inside].tolist(),
            batch.groups[:, inside].tolist(),
            strict=True,
        ):
            for place in range(length):
                if groups[place] >= 0 and task.groups[groups[place]] != "gap 0":
                    held.setdefault((place, *tokens), Counter())[labels[place]] += 1
        for counts in held.values():
            if sum(counts.values()) >= 200:
                assert_as_expected(counts, shares)
                tests += 1
    assert tests >= 4


def test_in_one_segment_the_mean_is_the_accuracy_and_nothing_needs_a_memory() -> None:
    task = create_task("mqar", vocabulary=32, segments=1, evaluation_sequences=8)
    assert task.groups == ("gap 0",)
    assert set(task.floor().values()) == {1.0}
    assert set(task.chance().values()) == {1 / 16}
    [batch] = task.evaluation(batch_size=8)
    # right about the first half of the rows
    said = torch.where(torch.arange(8)[:, None] < 4, batch.labels, IGNORED)
    scorer = task.scorer()
    scorer.update(one_hot_logits(said, 32), batch)
    assert set(scorer.result().values()) == {0.5}


def test_a_longer_sequence_has_more_segments_and_the_same_pairs() -> None:
    assert training_assignments("mqar", (2, 4), {}) == []
    spec = plan("full", "mqar", 0, smoke=True, assignments=["context=16"])
    points = longer_points([spec], (2, 4))
    for point in points[1:]:
        task: Any = cached_task("mqar", point.spec.task_options)
        assert (task.config.length, task.config.segments) == (24 * point.factor, 3 * point.factor)
        assert (task.config.pairs, task.vocab_size, task.segment_length) == (3, 32, 8)
        assert point.spec.model_options["context"] == 16 * point.factor
        assert point.spec.trained == spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 60}, r"length \(60\) must be a multiple of 2 \* segments \(8\)"),
        ({"length": 63, "segments": 1}, r"length \(63\) must be a multiple of 2 \* segments \(2\)"),
        ({"pairs": 17}, r"length \(64\) must be at least 4 \* pairs \(68\)"),
        ({"pairs": 9}, r"pairs \(9\) must fit into one segment \(at most 8\) or fill whole ones"),
        ({"vocabulary": 9}, r"vocabulary \(9\) must be at least 2 \* pairs \+ 2 \(10\)"),
        ({"power": 0}, r"power \(0\) must be positive and finite"),
        ({"power": float("nan")}, r"power \(nan\) must be positive and finite"),
        ({"power": float("inf")}, r"power \(inf\) must be positive and finite"),
        ({"pairs": 0}, r"pairs \(0\) must be at least 1"),
        ({"segments": 0}, r"segments \(0\) must be at least 1"),
        ({"length": 0}, r"length \(0\) must be at least 1"),
        ({"evaluation_sequences": 0}, r"evaluation_sequences \(0\) must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("mqar", **options)
