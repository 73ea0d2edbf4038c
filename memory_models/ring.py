"""Append-only storage of bounded capacity, row by row: the newest entries stay, the oldest leave.

The functions take the tensors that share one counter (keys and values, say); `Ring` is the same thing as
a memory of its own. Entry number `n` of a row, counted from zero since its last reset, lies in slot
`n % capacity`. Nothing is written in place.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from memory_models.checks import check_counts, check_shape
from memory_models.state import Memory, memory_state


def append(buffer: Tensor, total: Tensor, new: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The buffer after appending the first `lengths` entries of each row of `new`.

    Args:
        buffer: `[batch, capacity, ...]`.
        total: int64 `[batch]`, entries ever appended to each row; the caller advances it.
        new: `[batch, time, ...]`, cast to the buffer's dtype.
        lengths: int64 `[batch]`, how many of the `time` entries are real; None means all.

    Returns:
        `[batch, capacity, ...]`. Gradients flow to `buffer` and to `new`.
    """
    capacity, time = buffer.shape[1], new.shape[1]
    if capacity == 0 or time == 0:
        return buffer
    new = new.to(buffer.dtype)
    if torch.compiler.is_compiling():
        return _appended(buffer, total, new, lengths)
    rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    if time > capacity:
        # Only the newest `capacity` entries survive; without this two entries would race for a slot.
        if lengths is None:
            new, total = new[:, time - capacity :], total + (time - capacity)
        else:
            skip = (lengths - capacity).clamp(min=0)
            new = new[rows, skip[:, None] + torch.arange(capacity, device=buffer.device)]
            total, lengths = total + skip, lengths - skip
        time = capacity
    steps = torch.arange(time, device=buffer.device)
    slots = (total[:, None] + steps) % capacity
    if lengths is not None:
        # An entry past the row's end writes back what its slot held.
        real = (steps < lengths[:, None]).view(*slots.shape, *[1] * (new.dim() - 2))
        new = torch.where(real, new, buffer[rows, slots])
    return buffer.index_put((rows, slots), new)


def _appended(buffer: Tensor, total: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    """`append`, each slot reading what it shall hold: one loop for a compiler.

    Written slots compile as well, but inductor (torch 2.13) then gives wrong gradients, without a word.
    """
    time = new.shape[1]
    added = time if lengths is None else lengths
    # Where in `new` the entry of each slot stands; negative: it was there before, or the slot is empty.
    place = numbers(total + added, buffer.shape[1]) - total[:, None]
    rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    stays = (place < 0).view(*place.shape, *[1] * (new.dim() - 2))
    return torch.where(stays, buffer, new[rows, place.clamp(min=0)])


def numbers(total: Tensor, capacity: int) -> Tensor:
    """int64 `[batch, capacity]`: the number of the entry in each slot, negative where it is empty.

    Numbers count from zero since the row's reset, so `total - 1` is the newest entry.
    """
    slots = torch.arange(capacity, device=total.device)
    newest = total[:, None] - 1
    return newest - (newest - slots) % capacity if capacity else slots.expand(total.shape[0], 0)


@memory_state
class Ring(Memory):
    """Entries of one shape, newest `capacity` of each row.

    Attributes:
        values: `[batch, capacity, ...]`.
        total: int64 `[batch]`, entries ever appended.
    """

    values: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, capacity: int, *shape: int, like: Tensor) -> Self:
        """A ring that holds nothing, with the dtype and device of `like`."""
        return cls(
            values=like.new_zeros(batch_size, capacity, *shape),
            total=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    @property
    def capacity(self) -> int:
        """Most entries a row holds."""
        return self.values.shape[1]

    def append(self, new: Tensor, lengths: Tensor | None = None) -> Self:
        """Append `new` `[batch, time, ...]`, of which row `b` counts the first `lengths[b]`.

        Raises:
            ValueError: if shapes do not fit, or, on a CPU, lengths do not lie in 0 to `time`.
        """
        batch, _, *entry = self.values.shape
        axes = ("batch", "time", *(f"axis {axis}" for axis in range(2, self.values.dim())))
        check_shape("new", new, axes, (batch, None, *entry))
        if lengths is not None:
            check_counts("lengths", lengths, ("batch",), (batch,), most=new.shape[1])
        added = new.shape[1] if lengths is None else lengths
        return type(self)(values=append(self.values, self.total, new, lengths), total=self.total + added)

    def numbers(self) -> Tensor:
        """int64 `[batch, capacity]`, the entry's number in each slot, negative where empty."""
        return numbers(self.total, self.capacity)

    def held(self) -> Tensor:
        """bool `[batch, capacity]`, true where a slot holds an entry."""
        return self.numbers() >= 0
