"""The synthetic tasks, each against a reader written for the test: labels, gaps, and what cannot be known."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.task import IGNORED, AccuracyScorer, Batch, Task, create_task, one_hot_logits
from benchmarks.tasks.ballet import DANCES

Cells = tuple[list[int], list[str]]


def cells(task: Task, batch: Batch, row: int) -> Cells:
    """Labels of a row, and the names of their groups."""
    names = ["" if group < 0 else task.groups[group] for group in batch.groups[row].tolist()]
    return batch.labels[row].tolist(), names


def in_segments(tokens: torch.Tensor, task: Task) -> list[list[int]]:
    return tokens.view(-1, task.segment_length).tolist()


def read_rewrite(task: Any, tokens: torch.Tensor) -> Cells:
    c, labels, groups = task.config, [], []
    written: dict[int, list[tuple[int, int]]] = {}
    for index, segment in enumerate(in_segments(tokens, task)):
        pairs = list(zip(segment[::2], segment[1::2], strict=True))
        for key, value in pairs:
            if value != c.keys + c.values:
                written.setdefault(key, []).append((value, index))
                labels += [IGNORED, IGNORED]
                groups += ["", ""]
            else:
                value, when = written[key][-1]
                kind = "rewritten" if len(written[key]) > 1 else "written once"
                labels += [IGNORED, value]
                groups += ["", f"{kind}/gap {index - when}"]
    return labels, groups


def read_copy(task: Any, tokens: torch.Tensor) -> Cells:
    c, labels, groups = task.config, [], []
    shown: dict[int, tuple[list[int], int]] = {}
    size = c.length + 1
    for index, segment in enumerate(in_segments(tokens, task)):
        for start in range(0, c.sequences * size, size):
            shown[segment[start]] = (segment[start + 1 : start + size], index)
        labels += [IGNORED] * (c.sequences * size)
        groups += [""] * (c.sequences * size)
        for name in segment[c.sequences * size :: c.length]:
            symbols, when = shown[name]
            labels += symbols[::-1] if task.name == "reverse" else symbols
            groups += [f"gap {index - when}"] * c.length
    return labels, groups


def read_selective(task: Any, tokens: torch.Tensor) -> Cells:
    c, last = task.config, task.config.segments - 1
    data = [(token, place) for place, token in enumerate(tokens.tolist()) if token < c.symbols]
    assert len(data) == c.data
    before = len(tokens) - c.data
    labels = [IGNORED] * before + [token for token, _ in data]
    return labels, [""] * before + [f"gap {last - place // c.segment_length}" for _, place in data]


def read_needle(task: Any, tokens: torch.Tensor) -> Cells:
    c, labels, groups = task.config, [], []
    needle, when = None, 0
    for index, segment in enumerate(in_segments(tokens, task)):
        if c.digits in segment:
            start = segment.index(c.digits) + 1
            needle, when = segment[start : start + c.length], index
        rest = c.segment_length - c.length
        labels += [IGNORED] * rest + (needle or [IGNORED] * c.length)
        groups += [""] * rest + ([f"gap {index - when}"] if needle else [""]) * c.length
    return labels, groups


def read_ballet(task: Any, tokens: torch.Tensor) -> Cells:
    c, labels, groups = task.config, [], []
    directions = ["N", "NE", "E", "SE", "S", "SW", "W", "NW"]
    danced: dict[str, tuple[int, int]] = {}
    for index, segment in enumerate(in_segments(tokens, task)):
        steps = tuple(directions[token % 8] for token in segment[:16])
        danced[next(name for name, dance in DANCES.items() if dance == steps)] = (segment[0] // 8, index)
        labels += [IGNORED] * (16 + c.delay)
        groups += [""] * (16 + c.delay)
        for token in segment[16 + c.delay :]:
            name = list(DANCES)[token - 8 * c.dancers - 1]
            dancer, when = danced[name]
            rival = any(sorted(DANCES[n]) == sorted(DANCES[name]) for n in danced if n != name)
            labels.append(8 * c.dancers + 1 + 13 + dancer)
            groups.append(f"{'rival danced' if rival else 'no rival'}/gap {index - when}")
    return labels, groups


def read_rmt(task: Any, tokens: torch.Tensor) -> Cells:
    c = task.config
    source, answer = tokens[: c.length].tolist(), tokens[c.length + 1 :].tolist()
    times = 2 if task.name == "rmt-copy" else 1
    labels = (source if times == 2 else source[::-1]) * times
    assert tokens[c.length] == c.symbols
    assert answer == labels[:-1]
    groups = []
    for index in range(len(labels)):
        # Of all places before the answer that hold a copy of the same symbol of X, the nearest.
        symbol = index % c.length if times == 2 else c.length - 1 - index
        known = [symbol, *([c.length + 1 + symbol] if index >= c.length else [])]
        groups.append(f"gap {(c.length + index) // task.segment_length - max(known) // task.segment_length}")
    return [IGNORED] * c.length + labels, [""] * c.length + groups


READERS = {
    "rewrite": read_rewrite,
    "copy": read_copy,
    "reverse": read_copy,
    "selective-copy": read_selective,
    "needle": read_needle,
    "ballet": read_ballet,
    "rmt-copy": read_rmt,
    "rmt-reverse": read_rmt,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "rewrite": {"segments": 4, "writes": 3, "used": 3, "queries": 2, "keys": 3, "values": 2},
    "copy": {"segments": 2, "sequences": 3, "length": 1, "queries": 2, "names": 7, "symbols": 2},
    "reverse": {"segments": 5, "sequences": 1, "length": 3, "queries": 3, "names": 5},
    "selective-copy": {"segments": 2, "segment_length": 3, "data": 2},
    "needle": {"segments": 2, "segment_length": 3, "length": 1, "digits": 2, "filler": 1},
    "ballet": {"dancers": 13, "delay": 0, "queries": 1},
    "rmt-copy": {"length": 6, "segments": 9},
    "rmt-reverse": {"length": 6, "segments": 2},
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("sizes", ["default", "other"])
def test_labels_and_gaps_are_what_a_reader_finds(name: str, sizes: str) -> None:
    task = create_task(name, **(OTHER_SIZES[name] if sizes == "other" else {}))
    batch = task.batch(seed=1, step=2, batch_size=12)
    for row in range(12):
        assert cells(task, batch, row) == READERS[name](task, batch.tokens[row])


@pytest.mark.parametrize("name", READERS)
def test_every_group_occurs_and_later_tokens_change_no_answer(name: str) -> None:
    task = create_task(name)
    batch = next(iter(task.evaluation(batch_size=512)))
    assert set(batch.groups[batch.groups >= 0].tolist()) == set(range(len(task.groups)))
    blind = Batch(
        tokens=batch.tokens[:8],
        labels=torch.full_like(batch.labels[:8], IGNORED),
        groups=torch.full_like(batch.groups[:8], -1),
    )
    # The oracle reads tokens only.
    assert torch.equal(task.oracle(blind), task.oracle(batch)[:8])


@pytest.mark.parametrize("name", READERS)
def test_what_a_segment_holds_says_nothing_about_older_answers(name: str) -> None:
    """Answers of gap 1 and more are uniform over what the floor says is left."""
    task = create_task(name, evaluation_sequences=2000)
    batch = next(iter(task.evaluation(batch_size=2000)))
    floor = task.floor()
    for index, group in enumerate(task.groups):
        labels = batch.labels[batch.groups == index]
        share = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
        expected = floor[f"accuracy/{group}"]
        if group.endswith("gap 0"):
            assert expected == 1.0
        elif name != "ballet":
            # answers of one sequence are not independent: a wide margin
            assert share < expected + 6 * (expected / max(len(labels) / 40, 1)) ** 0.5
    assert task.chance()[task.headline] <= floor[task.headline]


def test_last_writes_of_all_distances_are_asked_alike() -> None:
    task = create_task("rewrite", segments=3)
    batch = task.batch(seed=0, step=0, batch_size=3000)
    gaps = torch.tensor([int(name[-1]) for name in task.groups])
    asked = []
    for row in range(3000):
        segments = in_segments(batch.tokens[row], task)
        last = {key: index for index, segment in enumerate(segments) for key in segment[:4:2]}
        if set(last.values()) == {0, 1, 2}:
            groups = batch.groups[row].view(3, -1)[2]
            asked += gaps[groups[groups >= 0]].tolist()
    for gap in range(3):
        assert asked.count(gap) / len(asked) == pytest.approx(1 / 3, abs=0.02)


def test_who_keeps_the_first_value_is_wrong_about_rewritten_keys() -> None:
    task = create_task("rewrite")
    scorer = task.scorer()
    for batch in task.evaluation(batch_size=256):
        said = torch.full_like(batch.tokens, -1)
        for row, tokens in enumerate(batch.tokens.tolist()):
            first: dict[int, int] = {}
            for place in range(1, len(tokens)):
                key, token = tokens[place - 1], tokens[place]
                if key < 16 and token < 32:
                    first.setdefault(key, token)
                elif key < 16:
                    said[row, place] = first[key]
        scorer.update(one_hot_logits(said, task.vocab_size), batch)
    result = scorer.result()
    assert result["accuracy/written once/gap 5"] == 1.0
    assert result["mean accuracy"] < 0.1


def test_only_eight_dances_can_be_told_by_their_steps_without_order() -> None:
    # counted in the released environment: {circles, pluses}, {times}, {chevrons} collide
    steps = Counter(tuple(sorted(dance)) for dance in DANCES.values())
    assert len(DANCES) == len(set(DANCES.values())) == 13
    assert all(len(dance) == 16 for dance in DANCES.values())
    assert sorted(steps.values()) == [1, 1, 1, 1, 1, 2, 2, 4]
    assert len(steps) == 8


def test_every_dance_ends_where_it_began_and_stays_within_a_step_of_it() -> None:
    moves = {"N": (0, -1), "S": (0, 1), "E": (1, 0), "W": (-1, 0)}
    for dance in DANCES.values():
        x = y = 0
        for step in dance:
            for letter in step:
                x, y = x + moves[letter][0], y + moves[letter][1]
            assert max(abs(x), abs(y)) <= 1
        assert (
            dance == DANCES["circle clockwise"] or dance == DANCES["circle anticlockwise"] or (x, y) == (0, 0)
        )


def test_the_paper_s_frames_are_counted_right() -> None:
    # "8_delay16": 8 dances of 16 frames and their pauses
    task = create_task("ballet", delay=16, queries=1)
    assert task.segment_length * 8 == 8 * (16 + 16 + 1)


def test_rmt_sizes_are_the_paper_s() -> None:
    for segments, length in ((3, 24), (6, 12), (9, 8)):
        task = create_task("rmt-copy", segments=segments)
        assert task.segment_length == length
        assert task.batch(seed=0, step=0, batch_size=2).tokens.shape == (2, 72)
    task = create_task("rmt-reverse")
    assert (task.segment_length, task.groups) == (12, ("gap 1", "gap 3"))


def test_groups_with_a_first_part_form_curves() -> None:
    task = create_task("rewrite")
    assert {metric.series for metric in task.metrics} == {
        None,
        "accuracy, rewritten",
        "accuracy, written once",
    }
    assert task.headline == AccuracyScorer.headline


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rewrite", {"used": 1}, r"used \(1\) must lie between writes \(2\) and keys \(16\)"),
        ("rewrite", {"segments": 2}, r"segments \(2\) must be at least 3"),
        ("rewrite", {"values": 1}, r"values \(1\) must be at least 2"),
        ("copy", {"names": 7}, r"names \(7\) must be at least segments \* sequences \(8\)"),
        ("copy", {"segments": 1}, r"segments \(1\) must be at least 2"),
        ("reverse", {"symbols": 1}, r"symbols \(1\) must be at least 2"),
        ("copy", {"length": 0}, r"length \(0\) must be at least 1"),
        ("selective-copy", {"segment_length": 4}, r"segment_length \(4\) must be more than data \(4\)"),
        ("selective-copy", {"segments": 1}, r"segments \(1\) must be at least 2"),
        ("selective-copy", {"symbols": 1}, r"symbols \(1\) must be at least 2"),
        ("needle", {"segment_length": 10}, r"must be at least 2 \* length \+ 1 \(11\)"),
        ("needle", {"digits": 1}, r"digits \(1\) must be at least 2"),
        ("needle", {"segments": 1}, r"segments \(1\) must be at least 2"),
        ("ballet", {"dancers": 14}, r"dancers \(14\) must lie between 3 and 13"),
        ("ballet", {"delay": -1}, r"delay \(-1\) must not be negative"),
        ("rmt-copy", {"segments": 5}, r"72 tokens cannot be cut into 5 equal segments"),
        ("rmt-reverse", {"segments": 1}, r"segments \(1\) must be at least 2"),
        ("rmt-copy", {"symbols": 1}, r"symbols \(1\) must be at least 2"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(name, **options)
