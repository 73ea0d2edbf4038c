"""The chunks of a row, against lists: write-once, summarised by their mean, the oldest out first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from htm import ChunkMemory
from tests.reference.chunks import Chunks, mean

DIM, BATCH = 3, 2


def empty(slots: int, size: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> ChunkMemory:
    return ChunkMemory.empty(batch, slots, size, DIM, like=torch.zeros(1, dtype=dtype))


def assert_is(memory: ChunkMemory, rows: list[Chunks]) -> None:
    lengths, ages = memory.lengths(), memory.ages()
    for row, chunks in enumerate(rows):
        held = chunks.by_slot()
        assert lengths[row].tolist() == [len(held.get(slot, [])) for slot in range(chunks.slots)]
        assert ages[row].tolist() == [chunks.ages().get(slot, -1) for slot in range(chunks.slots)]
        for slot, tokens in held.items():
            assert torch.equal(memory.contents[row, slot, : len(tokens)], torch.stack(tokens))
            torch.testing.assert_close(memory.summaries[row, slot], mean(tokens), atol=1e-12, rtol=0)


@st.composite
def writes(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, list[int] | None]]]:
    """Slots, chunk size and writes: tokens given, and how many of them count in each row."""
    slots, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        time = draw(st.integers(0, 14))
        ragged = draw(st.booleans())
        lengths = draw(st.lists(st.integers(0, time), min_size=BATCH, max_size=BATCH)) if ragged else None
        steps.append((time, lengths))
    return slots, size, steps


@given(writes())
def test_chunks_equal_lists_after_every_write(
    case: tuple[int, int, list[tuple[int, list[int] | None]]],
) -> None:
    slots, size, steps = case
    memory, rows = empty(slots, size), [Chunks(slots, size) for _ in range(BATCH)]
    assert_is(memory, rows)
    for time, lengths in steps:
        new = torch.randn(BATCH, time, DIM, dtype=torch.float64)
        before = memory.map(torch.clone)
        longer = memory.append(new, None if lengths is None else torch.tensor(lengths))
        for path, leaf in before.tensors().items():
            assert torch.equal(memory.tensors()[path], leaf)
        memory = longer
        for row in range(BATCH):
            for token in new[row, : time if lengths is None else lengths[row]]:
                rows[row].write(token)
        assert_is(memory, rows)


@given(st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_any_step_sizes_give_the_same_chunks_as_one_write(slots: int, size: int, steps: list[int]) -> None:
    tokens = torch.randn(BATCH, sum(steps), DIM, dtype=torch.float64)
    whole, pieces, begin = empty(slots, size).append(tokens), empty(slots, size), 0
    for step in steps:
        pieces = pieces.append(tokens[:, begin : begin + step])
        begin += step
    assert torch.equal(pieces.total, whole.total)
    held = (torch.arange(size) < whole.lengths()[..., None])[..., None]
    assert torch.equal(pieces.contents * held, whole.contents * held)
    torch.testing.assert_close(pieces.summaries, whole.summaries, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.lists(st.integers(1, 7), min_size=2, max_size=12))
def test_a_full_chunk_never_changes_a_bit_until_it_leaves(dtype: torch.dtype, steps: list[int]) -> None:
    slots, size = 3, 4
    memory = empty(slots, size, dtype=dtype)
    full: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for step in steps:
        memory = memory.append(torch.randn(BATCH, step, DIM).to(dtype))
        complete = int(memory.total[0]) // size
        oldest = -(-int(memory.total[0]) // size) - slots
        for row in range(BATCH):
            for number in range(max(0, oldest), complete):
                slot = number % slots
                now = (memory.contents[row, slot].clone(), memory.summaries[row, slot].clone())
                once = full.setdefault((row, number), now)
                assert torch.equal(once[0], now[0])
                assert torch.equal(once[1], now[1])


def test_a_nan_that_left_does_not_stay_in_a_summary() -> None:
    memory = empty(1, 4).append(torch.full((BATCH, 4, DIM), torch.nan, dtype=torch.float64))
    memory = memory.append(torch.ones(BATCH, 1, DIM, dtype=torch.float64))
    assert torch.equal(memory.summaries, torch.ones(BATCH, 1, DIM, dtype=torch.float64))
    assert memory.lengths().tolist() == [[1], [1]]


def test_a_row_that_writes_nothing_keeps_its_chunks() -> None:
    memory = empty(2, 3).append(torch.randn(BATCH, 4, DIM, dtype=torch.float64))
    after = memory.append(torch.randn(BATCH, 5, DIM, dtype=torch.float64), torch.tensor([0, 5]))
    for path, leaf in memory.tensors().items():
        assert torch.equal(after.tensors()[path][0], leaf[0])
    assert after.total.tolist() == [4, 9]


def test_ages_by_hand() -> None:
    memory = empty(3, 4).append(torch.randn(BATCH, 10, DIM, dtype=torch.float64), torch.tensor([10, 4]))
    # Tokens 0-3, 4-7 and 8-9; the newest is token 9.
    assert memory.ages().tolist() == [[9, 5, 1], [3, -1, -1]]
    assert memory.lengths().tolist() == [[4, 4, 2], [4, 0, 0]]


def test_gradient_goes_into_contents_and_summaries_of_what_stayed() -> None:
    tokens = torch.randn(1, 7, DIM, dtype=torch.float64, requires_grad=True)
    memory = empty(2, 3, batch=1).append(tokens)
    weights = torch.randn(1, 2, DIM, dtype=torch.float64)
    (memory.summaries * weights).sum().backward()
    # Chunk 0 has left; chunk 1 lies in slot 1, chunk 2 with one token in slot 0.
    wanted = torch.zeros_like(tokens)
    wanted[0, 3:6] = weights[0, 1] / 3
    wanted[0, 6] = weights[0, 0]
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, wanted)


def test_chunks_take_their_own_dtype() -> None:
    memory = empty(2, 2, dtype=torch.bfloat16).append(torch.randn(BATCH, 3, DIM))
    assert memory.contents.dtype == memory.summaries.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("new", "lengths", "message"),
    [
        ((1, 3, DIM), None, r"new must have shape \[batch=2, time, dim=3\], got \[1, 3, 3\]"),
        ((BATCH, 3, 1), None, r"new must have shape .*dim=3\], got \[2, 3, 1\]"),
        ((BATCH, 3, DIM), [1], r"lengths must have shape \[batch=2\], got \[1\]"),
        ((BATCH, 3, DIM), [0, 4], "lengths must lie in 0 to 3, got 4"),
        ((BATCH, 3, DIM), [-1, 0], "lengths must lie in 0 to 3, got -1"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    new: tuple[int, ...], lengths: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        empty(2, 4).append(torch.zeros(new), None if lengths is None else torch.tensor(lengths))
