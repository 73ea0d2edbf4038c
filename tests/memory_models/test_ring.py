"""The ring keeps the newest entries of each row, as a Python list cut to its end would."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memory_models import Ring
from memory_models.ring import append, numbers

BATCH = 3


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[int] | None]]]:
    """A capacity and appends: how many entries are given, and how many of them count in each row."""
    capacity = draw(st.integers(0, 5))
    appends = []
    for _ in range(draw(st.integers(0, 6))):
        time = draw(st.integers(0, 12))
        ragged = draw(st.booleans())
        lengths = draw(st.lists(st.integers(0, time), min_size=BATCH, max_size=BATCH)) if ragged else None
        appends.append((time, lengths))
    return capacity, appends


@pytest.fixture(params=[False, True], ids=["eager", "compiling"])
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compilers are given another expression."""
    with mock.patch.object(torch.compiler, "is_compiling", return_value=request.param):
        yield


@pytest.mark.usefixtures("_both_ways")
@given(histories())
def test_the_ring_equals_a_list(history: tuple[int, list[tuple[int, list[int] | None]]]) -> None:
    capacity, appends = history
    ring = Ring.empty(BATCH, capacity, 2, like=torch.zeros(1, dtype=torch.float64))
    rows: list[list[list[float]]] = [[] for _ in range(BATCH)]
    serial = 0.0
    for time, lengths in appends:
        new = serial + torch.arange(BATCH * time * 2, dtype=torch.float64).view(BATCH, time, 2)
        serial += 1000.0
        before = ring.values.clone()
        longer = ring.append(new, None if lengths is None else torch.tensor(lengths))
        assert torch.equal(ring.values, before)
        ring = longer
        for row in range(BATCH):
            rows[row] += new[row, : time if lengths is None else lengths[row]].tolist()
    assert ring.total.tolist() == [len(row) for row in rows]
    for row, entries in enumerate(rows):
        first = max(0, len(entries) - capacity)
        kept = dict(enumerate(entries))
        for slot in range(capacity):
            number = int(ring.numbers()[row, slot])
            assert bool(ring.held()[row, slot]) == (number >= 0)
            if number >= 0:
                assert number % capacity == slot
                assert number >= first
                assert ring.values[row, slot].tolist() == kept[number]
        assert int(ring.held()[row].sum()) == len(entries) - first if capacity else ring.held().shape[1] == 0


@pytest.mark.usefixtures("_both_ways")
@given(histories())
def test_gradient_reaches_exactly_the_entries_that_stay(
    history: tuple[int, list[tuple[int, list[int] | None]]],
) -> None:
    capacity, appends = history
    start = torch.randn(BATCH, capacity, dtype=torch.float64, requires_grad=True)
    # A buffer that is full already: its entries are numbers 0 to capacity - 1.
    ring = Ring(values=start, total=torch.full((BATCH,), capacity))
    sources: list[list[tuple[Tensor, tuple[int, int]]]] = [
        [(start, (row, slot)) for slot in range(capacity)] for row in range(BATCH)
    ]
    given_entries = []
    for time, lengths in appends:
        new = torch.randn(BATCH, time, dtype=torch.float64, requires_grad=True)
        given_entries.append(new)
        ring = ring.append(new, None if lengths is None else torch.tensor(lengths))
        for row in range(BATCH):
            sources[row] += [(new, (row, i)) for i in range(time if lengths is None else lengths[row])]
    weights = torch.randn(BATCH, capacity, dtype=torch.float64)
    wanted = {id(tensor): torch.zeros_like(tensor) for tensor in (start, *given_entries)}
    for row in range(BATCH):
        for number in range(max(0, len(sources[row]) - capacity), len(sources[row])):
            tensor, place = sources[row][number]
            wanted[id(tensor)][place] = weights[row, number % capacity]
    (ring.values * weights).sum().backward()
    for tensor in (start, *given_entries):
        seen = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert torch.equal(seen, wanted[id(tensor)])


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_any_step_sizes_give_the_same_ring(capacity: int, steps: list[int]) -> None:
    entries = torch.randn(2, sum(steps), 3)
    empty = Ring.empty(2, capacity, 3, like=entries)
    ring = empty
    for begin, size in zip([sum(steps[:i]) for i in range(len(steps))], steps, strict=True):
        ring = ring.append(entries[:, begin : begin + size])
    assert torch.equal(ring.values, empty.append(entries).values)
    assert torch.equal(ring.total, empty.append(entries).total)


def test_a_row_without_new_entries_keeps_every_bit() -> None:
    buffer = torch.tensor([[torch.nan, -0.0, 3.0], [1.0, 2.0, 3.0]])
    after = append(buffer, torch.tensor([5, 5]), torch.full((2, 3), 9.0), torch.tensor([0, 1]))
    assert torch.equal(after[0].view(torch.int32), buffer[0].view(torch.int32))
    assert after[1].tolist() == [1.0, 2.0, 9.0]  # entry number 5 lies in slot 5 % 3


def test_entries_take_the_dtype_of_the_buffer() -> None:
    ring = Ring.empty(1, 2, like=torch.zeros(1, dtype=torch.bfloat16))
    after = ring.append(torch.tensor([[1.00001, 2.0]], dtype=torch.float64))
    assert after.values.dtype == torch.bfloat16
    assert after.values.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("total", "wanted"),
    [(0, [-3, -2, -1]), (1, [0, -2, -1]), (3, [0, 1, 2]), (4, [3, 1, 2]), (8, [6, 7, 5])],
)
def test_numbers_by_hand(total: int, wanted: list[int]) -> None:
    assert numbers(torch.tensor([total]), 3).tolist() == [wanted]
    assert numbers(torch.tensor([total]), 0).shape == (1, 0)


def test_a_ring_is_empty_at_first() -> None:
    ring = Ring.empty(2, 4, 5, 6, like=torch.zeros(1, dtype=torch.float16))
    assert ring.capacity == 4
    assert ring.values.shape == (2, 4, 5, 6)
    assert ring.values.dtype == torch.float16
    assert not ring.held().any()


@pytest.mark.parametrize(
    ("new", "lengths", "message"),
    [
        ((1, 3, 2), None, r"new must have shape \[batch=2, time, axis 2=2\], got \[1, 3, 2\]"),
        ((2, 3, 1), None, r"new must have shape .*axis 2=2\], got \[2, 3, 1\]"),
        ((2, 2), None, "new must have shape"),
        ((2, 3, 2), [1], r"lengths must have shape \[batch=2\], got \[1\]"),
        ((2, 3, 2), [1, 4], "lengths must lie in 0 to 3, got 4"),
        ((2, 3, 2), [-1, 0], "lengths must lie in 0 to 3, got -1"),
        ((2, 3, 2), [1.0, 2.0], "lengths must be integers, got torch.float32"),
    ],
)
def test_entries_that_do_not_fit_are_refused(
    new: tuple[int, ...], lengths: list[int] | None, message: str
) -> None:
    ring = Ring.empty(2, 4, 2, like=torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        ring.append(torch.zeros(new), None if lengths is None else torch.tensor(lengths))
