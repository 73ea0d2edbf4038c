"""`recall`: what a sequence holds, that nothing leaks, and that only a memory can score beyond gap 0."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.task import Batch, create_task, one_hot_logits
from tests.reference import recall as reference

DEFAULT = create_task("recall")
SIZES = [
    {},
    {"segments": 2, "keys": 2, "values": 2, "writes": 1, "queries": 1},
    {"segments": 3, "keys": 20, "values": 5, "writes": 4, "queries": 3},
]


def sizes(task) -> dict[str, int]:
    return {"keys": task.config.keys, "values": task.config.values, "segment_length": task.segment_length}


def within(share: float, expected: float, count: int, sigmas: float = 4.5) -> bool:
    return abs(share - expected) <= sigmas * math.sqrt(expected * (1 - expected) / count)


def test_the_default_sizes_are_those_of_the_calibration() -> None:
    batch = DEFAULT.batch(seed=0, step=0, batch_size=32)
    assert batch.tokens.shape == (32, 96)
    assert DEFAULT.segment_length == 16
    assert DEFAULT.vocab_size == 33
    assert DEFAULT.groups == ("gap 0", "gap 1", "gap 2", "gap 3", "gap 4", "gap 5")
    assert (batch.labels >= 0).sum() == 32 * 6 * 6
    assert sum(len(b.tokens) for b in DEFAULT.evaluation(batch_size=100)) == 512


@pytest.mark.parametrize("options", SIZES)
def test_labels_and_gaps_are_what_a_dictionary_finds(options: dict[str, int]) -> None:
    task = create_task("recall", **options)
    batch = task.batch(seed=1, step=2, batch_size=16)
    for row in range(16):
        labels, gaps = reference.answers(batch.tokens[row].tolist(), **sizes(task))
        assert batch.labels[row].tolist() == labels
        assert batch.groups[row].tolist() == gaps


@pytest.mark.parametrize("options", SIZES)
def test_a_segment_is_writes_then_queries_and_no_key_is_written_twice(options: dict[str, int]) -> None:
    task = create_task("recall", **options)
    c = task.config
    tokens = task.batch(seed=3, step=0, batch_size=32).tokens
    segments = tokens.unflatten(1, (c.segments, task.segment_length))
    written, asked = segments[..., : 2 * c.writes], segments[..., 2 * c.writes :]
    keys, values = written[..., ::2].flatten(1), written[..., 1::2]
    assert (keys < c.keys).all()
    assert all(len(row.unique()) == len(row) for row in keys)
    assert ((c.keys <= values) & (values < c.keys + c.values)).all()
    assert (asked[..., ::2] < c.keys).all()
    assert (asked[..., 1::2] == c.keys + c.values).all()


def test_gaps_values_and_keys_are_uniform() -> None:
    batches = [DEFAULT.batch(seed=0, step=step, batch_size=256) for step in range(8)]
    groups = torch.cat([b.groups for b in batches]).unflatten(1, (6, 16))
    for segment in range(6):
        gaps = groups[:, segment][groups[:, segment] >= 0]
        for gap in range(6):
            share = float((gaps == gap).double().mean())
            assert within(share, 1 / (segment + 1), len(gaps)) if gap <= segment else share == 0
    tokens = torch.cat([b.tokens for b in batches]).unflatten(1, (6, 16))
    first_keys, values = tokens[:, :, 0].flatten(), tokens[:, :, 1:4:2].flatten()
    for token in range(16):
        assert within(float((first_keys == token).double().mean()), 1 / 16, len(first_keys))
        assert within(float((values == 16 + token).double().mean()), 1 / 16, len(values))


def test_the_oracle_reads_tokens_only_and_no_later_ones() -> None:
    batch = DEFAULT.batch(seed=0, step=0, batch_size=4)
    blind = Batch(
        tokens=batch.tokens,
        labels=torch.full_like(batch.labels, -100),
        groups=torch.full_like(batch.groups, -1),
    )
    answers = DEFAULT.oracle(blind)
    asked = batch.labels >= 0
    assert torch.equal(answers.argmax(-1)[asked], batch.labels[asked])
    # other values in the second half change no answer in the first
    half = 48
    values = (batch.tokens >= 16) & (batch.tokens < 32) & (torch.arange(96) >= half)
    mixed = torch.where(values, 16 + (batch.tokens - 15) % 16, batch.tokens)
    changed = DEFAULT.oracle(Batch(tokens=mixed, labels=blind.labels, groups=blind.groups))
    assert torch.equal(changed[:, :half], answers[:, :half])
    assert not torch.equal(changed, answers)


def test_without_memory_gap_0_is_solved_and_the_rest_is_chance() -> None:
    """The floor is reached by looking up this segment's pairs and guessing otherwise."""
    task = create_task("recall", evaluation_sequences=1024)
    floor = task.floor()
    for guess in (16, 31):
        scorer = task.scorer()
        for batch in task.evaluation(batch_size=256, seed=guess):
            said = [reference.memoryless(row, guess=guess, **sizes(task)) for row in batch.tokens.tolist()]
            scorer.update(one_hot_logits(torch.tensor(said), task.vocab_size), batch)
        result, counts = scorer.result(), scorer.counts()
        assert result["accuracy/gap 0"] == floor["accuracy/gap 0"] == 1.0
        for gap in range(1, 6):
            # answers about one pair in one sequence are not independent: allow for six alike
            name = f"accuracy/gap {gap}"
            assert within(result[name], floor[name], counts[name] // 6)


def test_no_content_of_a_segment_tells_anything_about_an_older_value() -> None:
    """The floor cannot be beaten: given all that its segment holds, an older value stays uniform."""
    task = create_task("recall", segments=2, keys=2, values=2, writes=1, queries=1)
    batch = task.batch(seed=0, step=0, batch_size=40_000)
    asked_back = batch.groups[:, -1] == 1
    segment, labels = batch.tokens[asked_back, 4:], batch.labels[asked_back, -1]
    contents, which = segment.unique(dim=0, return_inverse=True)
    # the key written now and its value; the key asked for is then the other one
    assert len(contents) == 4
    for content in range(4):
        answers = labels[which == content]
        assert within(float((answers == 2).double().mean()), 0.5, len(answers))


def test_evaluation_seeds_give_other_sequences() -> None:
    a = next(iter(DEFAULT.evaluation(batch_size=8)))
    b = next(iter(DEFAULT.evaluation(batch_size=8, seed=1)))
    assert not torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": 11}, r"keys \(11\) must be at least segments \* writes \(12\)"),
        ({"segments": 1}, r"segments \(1\) must be at least 2"),
        ({"values": 1}, r"values \(1\) must be at least 2"),
        ({"queries": 0}, r"queries \(0\) must be at least 1"),
        ({"writes": 0}, r"writes \(0\) must be at least 1"),
        ({"evaluation_sequences": 0}, r"evaluation_sequences \(0\) must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("recall", **options)
