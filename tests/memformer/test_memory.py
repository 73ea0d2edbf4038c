"""What Memformer carries: slots, and hiddens that wait for the segment's end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memformer import MemformerConfig, MemformerDecoder, MemformerMemory
from memory_models.transformer import Place, Trunk

DIM, LENGTH, SLOTS = 8, 5, 3
CONFIG = MemformerConfig(dim=DIM, depth=2, heads=2, segment_length=LENGTH, slots=SLOTS)


@pytest.fixture
def memory() -> MemformerMemory:
    segment = Trunk(CONFIG).double().open_segment(2)
    return MemformerMemory.fresh(torch.randn(SLOTS, DIM, dtype=torch.float64), segment, LENGTH)


def extend(memory: MemformerMemory, hiddens: Tensor, lengths: Tensor | None = None) -> MemformerMemory:
    place = Place.of(memory.segment.filled, hiddens.shape[1], lengths, LENGTH)
    segment = type(memory.segment)(filled=place.after, last=memory.segment.last, layers=memory.segment.layers)
    return memory.extended(segment, hiddens, place)


def test_every_row_begins_with_the_same_slots_and_no_token(memory: MemformerMemory) -> None:
    assert memory.slots.shape == (2, SLOTS, DIM)
    assert torch.equal(memory.slots[0], memory.slots[1])
    assert memory.open_length.tolist() == [0, 0]
    assert not bool(memory.written().any())
    assert not bool(memory.hiddens.any())


def test_pieces_lie_where_the_whole_segment_would(memory: MemformerMemory) -> None:
    hiddens = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    whole = extend(memory, hiddens)
    pieces = extend(extend(extend(memory, hiddens[:, :1]), hiddens[:, 1:4]), hiddens[:, 4:])
    for one in (whole, pieces):
        assert torch.equal(one.hiddens, hiddens)
        assert bool(one.written().all())
        assert one.open_length.tolist() == [LENGTH, LENGTH]


def test_padding_is_not_kept(memory: MemformerMemory) -> None:
    hiddens = torch.randn(2, 3, DIM, dtype=torch.float64)
    ragged = extend(memory, hiddens, torch.tensor([1, 3]))
    assert ragged.written().tolist() == [[True] + 4 * [False], 3 * [True] + 2 * [False]]
    ragged = extend(ragged, hiddens, torch.tensor([2, 0]))
    assert ragged.open_length.tolist() == [3, 3]
    wanted = torch.zeros(2, LENGTH, DIM, dtype=torch.float64)
    wanted[0, :1], wanted[0, 1:3], wanted[1, :3] = hiddens[0, :1], hiddens[0, :2], hiddens[1]
    assert torch.equal(ragged.hiddens, wanted)


def test_gradients_reach_what_waits_and_what_is_held(memory: MemformerMemory) -> None:
    initial = torch.randn(SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    fresh = MemformerMemory.fresh(initial, memory.segment, LENGTH)
    assert torch.autograd.grad(fresh.slots.sum(), initial)[0].unique().tolist() == [2.0]
    for time in (2, LENGTH):
        hiddens = torch.randn(2, time, DIM, dtype=torch.float64, requires_grad=True)
        kept = extend(fresh, hiddens).hiddens
        assert torch.autograd.grad(kept.sum(), hiddens)[0].unique().tolist() == [1.0]
        assert not extend(fresh, hiddens).detach().hiddens.requires_grad


def test_hiddens_are_kept_in_the_dtype_of_the_memory(memory: MemformerMemory) -> None:
    for time in (2, LENGTH):
        assert extend(memory, torch.randn(2, time, DIM)).hiddens.dtype == torch.float64


def test_the_bytes_by_hand() -> None:
    slots, hiddens = 4 * SLOTS * DIM, 4 * LENGTH * DIM
    segment = 2 * (2 * 4 * LENGTH * DIM) + 8
    assert MemformerDecoder(CONFIG).init_memory(3).nbytes == 3 * (slots + hiddens + segment)
