"""The chunks of Hierarchical Transformer Memory as a value that grows by appending.

Chunks are write-once: a token's chunk and place depend only on how many came before it in its row, so
that a full chunk and its summary never change again, however the writes were cut.
"""

# b batch, m chunks, c places of a chunk, d dim

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from memory_models.checks import check_counts, check_shape
from memory_models.ring import append, numbers
from memory_models.state import Memory, memory_state
from memory_models.transformer import OpenSegment


@memory_state
class ChunkMemory(Memory):
    """One layer's chunks, the newest `m` of each row; usable alone with `HTMAttention.read`.

    The newest chunk may be open, that is partly filled; it can be read like the others, its summary being
    the mean of the tokens it holds, so that no token is ever out of sight.

    Attributes:
        contents: `[batch, m, c, dim]`; chunk number `q` of a row lies in slot `q % m`.
        summaries: `[batch, m, dim]`, the mean of each chunk's tokens.
        total: int64 `[batch]`, tokens ever written to each row.
    """

    contents: Tensor
    summaries: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, chunks: int, chunk_size: int, dim: int, *, like: Tensor) -> Self:
        """No chunks yet, with the dtype and device of `like`."""
        return cls(
            contents=like.new_zeros(batch_size, chunks, chunk_size, dim),
            summaries=like.new_zeros(batch_size, chunks, dim),
            total=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def lengths(self) -> Tensor:
        """int64 `[batch, m]`: tokens that each chunk holds, 0 for a slot not yet used."""
        slots, size = self.contents.shape[1:3]
        # Tokens since each slot was first begun; counted afresh whenever the ring comes round to it.
        since = self.total[:, None] - torch.arange(0, slots * size, size, device=self.total.device)
        return torch.where(since > 0, (since - 1) % (slots * size) + 1, 0).clamp(max=size)

    def ages(self) -> Tensor:
        """int64 `[batch, m]`: tokens between each chunk's first and the newest; -1 for a slot not used."""
        size = self.contents.shape[2]
        number = numbers(-(-self.total // size), self.contents.shape[1])
        return torch.where(number >= 0, self.total[:, None] - 1 - number * size, -1)

    def append(self, new: Tensor, lengths: Tensor | None = None) -> Self:
        """Write `new` `[batch, time, dim]`, of which row `b` counts the first `lengths[b]` tokens.

        Returns:
            The longer memory; when a chunk begins and all slots are taken, the oldest chunk leaves.

        Raises:
            ValueError: if shapes do not fit, or, on a CPU, lengths do not lie in 0 to `time`.
        """
        batch, slots, size, dim = self.contents.shape
        check_shape("new", new, ("batch", "time", "dim"), (batch, None, dim))
        if lengths is not None:
            check_counts("lengths", lengths, ("batch",), (batch,), most=new.shape[1])
        time = new.shape[1]
        if time == 0:
            return self
        added = torch.full_like(self.total, time) if lengths is None else lengths
        total = self.total + added
        contents = append(self.contents.flatten(1, 2), self.total, new, lengths).view(self.contents.shape)
        # Only the chunks that got tokens need a new summary, at most this many of the newest.
        touched = min(slots, -(-time // size) + 1)
        newest = (total - 1) // size
        number = newest[:, None] - torch.arange(touched, device=total.device)
        written = (number >= self.total[:, None] // size) & (added > 0)[:, None] & (number >= 0)
        rows, slot = torch.arange(batch, device=total.device)[:, None], number % slots
        held = (total[:, None] - number * size).clamp(max=size)
        valid = torch.arange(size, device=total.device) < held[..., None]
        # where, not multiply: a place not yet written may hold an evicted chunk's token.
        kept = torch.where(valid[..., None], contents[rows, slot], 0)
        mean = kept.sum(2) / held.clamp(min=1)[..., None]
        mean = torch.where(written[..., None], mean.to(contents.dtype), self.summaries[rows, slot])
        return type(self)(
            contents=contents, summaries=self.summaries.index_put((rows, slot), mean), total=total
        )


@memory_state
class HTMMemory(Memory):
    """What the `htm` member carries.

    Attributes:
        segment: the open segment's keys and values.
        hiddens: `[batch, segment_length, dim]` for each memory layer, what the open segment will write.
        layers: the chunks of each memory layer.
    """

    segment: OpenSegment
    hiddens: tuple[Tensor, ...]
    layers: tuple[ChunkMemory, ...]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.segment.filled
