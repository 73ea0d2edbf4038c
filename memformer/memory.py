"""What Memformer carries: its slots, and the open segment that they have not taken in."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from memory_models.ring import append
from memory_models.state import Memory, memory_state
from memory_models.transformer import OpenSegment, Place


@memory_state
class MemformerMemory(Memory):
    """What the `memformer` member carries. Nothing is detached: gradients pass from segment to segment.

    Attributes:
        slots: `[batch, slots, dim]`; with a "bmn" write on the unit sphere.
        segment: the open segment's keys and values.
        hiddens: `[batch, segment_length, dim]`, what its tokens will write, zero where there is none.
    """

    slots: Tensor
    segment: OpenSegment
    hiddens: Tensor

    @classmethod
    def fresh(cls, initial: Tensor, segment: OpenSegment, segment_length: int) -> Self:
        """Slots `initial` `[slots, dim]` in every row, and an open segment without tokens."""
        rows, dim = segment.filled.shape[0], initial.shape[1]
        return cls(
            slots=initial.expand(rows, -1, -1),
            segment=segment,
            hiddens=initial.new_zeros(rows, segment_length, dim),
        )

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.segment.filled

    def extended(self, segment: OpenSegment, hiddens: Tensor, place: Place) -> Self:
        """A longer open segment.

        Args:
            segment: its keys and values, these tokens included.
            hiddens: `[batch, time, dim]`, what these tokens will write.
            place: where they lie.
        """
        if place.whole:
            # Nothing came before, so that they take the buffer's place.
            hiddens = hiddens.to(self.hiddens.dtype)
        else:
            hiddens = append(self.hiddens, place.filled, hiddens, place.lengths)
        return type(self)(slots=self.slots, segment=segment, hiddens=hiddens)

    def written(self) -> Tensor:
        """bool `[batch, segment_length]`, true where the open segment holds a token."""
        places = torch.arange(self.hiddens.shape[1], device=self.hiddens.device)
        return places < self.segment.filled[:, None]
