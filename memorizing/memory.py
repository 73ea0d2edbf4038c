"""What the Memorizing Transformer carries: pairs in rings inside the state, and the cache before them."""

# b batch, h heads, m memories, t time, c cache, d width of a head

from __future__ import annotations

from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from memorizing.knn import pages
from memory_models.checks import check_counts, check_shape
from memory_models.ring import append, numbers
from memory_models.state import Memory, address, memory_state
from memory_models.transformer import OpenSegment, Past


@memory_state
class PairMemory(Memory):
    """One layer's pairs, the newest `m` of each row; usable alone with `KNNAttention`.

    Pairs are detached (Memorizing Transformers §3.2: no gradient into the memory). Each head's keys lie
    together, so that the search reads them where they are.

    Attributes:
        keys: `[batch, stores, m, dim_head]`, a store for each head of keys and values; pair number `n` of
            a row lies in slot `n % m`.
        values: `[batch, stores, m, dim_head]`.
        total: int64 `[batch]`, pairs ever written to each store of each row.
    """

    keys: Tensor
    values: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, memories: int, stores: int, dim_head: int, *, like: Tensor) -> Self:
        """No pairs yet, with the dtype and device of `like`."""
        slots = like.new_zeros(batch_size, stores, memories, dim_head)
        total = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return cls(keys=slots, values=slots.clone(), total=total)

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> Self:
        """Write pairs; the oldest leave.

        Args:
            keys: `[batch, time, heads, dim_head]`, as attention makes them; where heads share a store,
                they have the same keys, and the first of them is written.
            values: the same shape.
            lengths: int64 `[batch]`: row `b` counts the first `lengths[b]` tokens; None means all.

        Returns:
            The memory with these pairs, detached.

        Raises:
            ValueError: if shapes do not fit, or, on a CPU, lengths do not lie in 0 to `time`.
        """
        self._check_pairs(keys, values, lengths)
        stores, time = self.keys.shape[1], keys.shape[1]
        totals = self.total.repeat_interleave(stores)
        counts = None if lengths is None else lengths.repeat_interleave(stores)
        shared = keys.shape[2] // stores

        def written(ring: Tensor, new: Tensor) -> Tensor:
            if ring.shape[2] == 0:
                # Without elements a shape cannot be inferred, which ONNX does for any number of rows.
                return ring
            new = rearrange(new.detach()[:, :, ::shared], "b t h d -> (b h) t d").to(ring.dtype)
            # An exported graph must run without this library.
            write = append if torch.compiler.is_exporting() else _written
            return write(ring.detach().flatten(0, 1), totals, new, counts).view(ring.shape)

        added = time if lengths is None else lengths
        return type(self)(
            keys=written(self.keys, keys), values=written(self.values, values), total=self.total + added
        )

    def _check_pairs(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> None:
        batch, stores, _, width = self.keys.shape
        axes = ("batch", "time", "heads", "dim_head")
        check_shape("keys", keys, axes, (batch, None, None, width))
        time, heads = keys.shape[1:3]
        if heads == 0 or heads % stores:
            raise ValueError(f"keys must have heads that the stores ({stores}) divide, got {heads}")
        check_shape("values", values, axes, (batch, time, heads, self.values.shape[3]))
        if lengths is not None:
            check_counts("lengths", lengths, ("batch",), (batch,), most=time)

    def held(self) -> Tensor:
        """int64 `[batch]`: pairs that each store of each row holds."""
        return self.total.clamp(max=self.keys.shape[2])

    def ages(self) -> Tensor:
        """int64 `[batch, m]`: pairs written after the one in each slot; -1 for a slot not used."""
        number = numbers(self.total, self.keys.shape[2])
        return torch.where(number >= 0, self.total[:, None] - 1 - number, -1)


@memory_state
class OutsidePairs(Memory):
    """One layer's pairs where an outside store keeps them: the newest, and which of the store's are its own.

    Pair number `n` is the `n`-th of its row since the last reset. The newest are here whether or not they
    are in the store too, so that it makes no difference when `commit` is called.

    Attributes:
        recent: the newest pairs, and the number of all.
        committed: int64 `[batch]`: pairs numbered below this are in the store.
        stream: int64 `[batch]`: the row's number in the store; -1 before its first commit.
    """

    recent: PairMemory
    committed: Tensor = address()
    stream: Tensor = address()

    @classmethod
    def empty(cls, batch_size: int, kept: int, stores: int, dim_head: int, *, like: Tensor) -> Self:
        """No pairs yet, with the dtype and device of `like`; `kept` of them will be here."""
        recent = PairMemory.empty(batch_size, kept, stores, dim_head, like=like)
        return cls(recent=recent, committed=recent.total.clone(), stream=torch.full_like(recent.total, -1))

    @property
    def total(self) -> Tensor:
        """int64 `[batch]`, pairs ever written to each store of each row."""
        return self.recent.total

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> Self:
        """Write pairs, as `PairMemory.append`; the store gets them by `commit`."""
        recent = self.recent.append(keys, values, lengths)
        return type(self)(recent=recent, committed=self.committed, stream=self.stream)


@torch.library.custom_op(
    "memory_models::memorizing_write",
    mutates_args=(),
    schema="(Tensor ring, Tensor total, Tensor new, Tensor? lengths) -> Tensor",
)
def _written(ring: Tensor, total: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    """`memory_models.ring.append` for large rings `[rows, m, d]`, without a gradient.

    Nine tenths of its time would be spent on claiming the pages of the copy; here they are large ones.
    """
    if ring.device.type != "cpu":
        made = append(ring, total, new, lengths)
        return made.clone() if made is ring else made
    capacity, time = ring.shape[1], new.shape[1]
    copy = pages.empty(*ring.shape, dtype=ring.dtype, device=ring.device)
    copy.copy_(ring)
    if lengths is None:
        lengths = torch.full_like(total, time)
    steps = torch.arange(time, device=ring.device)
    # Of more pairs than there are slots only the newest are written, so that no slot is written twice.
    real = (steps < lengths[:, None]) & (steps >= lengths[:, None] - capacity)
    rows, places = real.nonzero(as_tuple=True)
    if len(rows):
        copy[rows, (total[rows] + places) % capacity] = new[rows, places]
    return copy


@_written.register_fake
def _(ring: Tensor, total: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.empty_like(ring)


@memory_state
class XLCache(Memory):
    """The newest keys and values from before the open segment, as in Transformer-XL.

    Attributes:
        keys: `[batch, c, heads, dim_head]`, oldest first, ending with the newest; where the layer rotates,
            rotated with the open segment's first token as the origin.
        values: `[batch, c, heads, dim_head]`.
        held: int64 `[batch]`, cached tokens; they stand at the end.
    """

    keys: Tensor
    values: Tensor
    held: Tensor

    @classmethod
    def empty(cls, batch_size: int, length: int, heads: int, dim_head: int, *, like: Tensor) -> Self:
        """Nothing cached, with the dtype and device of `like`."""
        slots = like.new_zeros(batch_size, length, heads, dim_head)
        held = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return cls(keys=slots, values=slots.clone(), held=held)

    def past(self) -> Past:
        """What attention puts before the segment."""
        length = self.keys.shape[1]
        held = torch.arange(length, device=self.held.device) >= length - self.held[:, None]
        return Past(keys=self.keys, values=self.values, held=held)

    def push(self, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Self, Tensor, Tensor, Tensor]:
        """Move a segment into the cache.

        Args:
            keys: `[batch, time, heads, dim_head]`; row `b` counts the first `filled[b]` tokens.
            values: the same shape.
            filled: int64 `[batch]`.

        Returns:
            The next cache, detached, and what had to leave it, oldest first: keys and values
            `[batch, time, heads, dim_head]`, and int64 `[batch]`, how many of them are real. Every token
            is in the cache or has left it, never both.
        """
        length, time = self.keys.shape[1], keys.shape[1]
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        newest = filled[:, None] + torch.arange(length, device=keys.device)
        count = (self.held + filled - length).clamp(min=0)
        oldest = (length - self.held)[:, None] + torch.arange(time, device=keys.device)
        oldest = oldest.clamp(max=length + time - 1)
        all_keys = torch.cat([self.keys, keys.to(self.keys.dtype)], 1).detach()
        all_values = torch.cat([self.values, values.to(self.values.dtype)], 1).detach()
        cache = type(self)(
            keys=all_keys[rows, newest],
            values=all_values[rows, newest],
            held=(self.held + filled).clamp(max=length),
        )
        return cache, all_keys[rows, oldest], all_values[rows, oldest], count


@memory_state
class MemorizingMemory(Memory):
    """What the `memorizing` member carries.

    Attributes:
        segment: the open segment's keys and values; what a memory layer will write is among them.
        layers: the pairs of each memory layer.
        caches: one cache a layer; none without `xl_cache`.
        outputs: with `xl_shift` each layer's outputs of the open segment, `[batch, segment_length, dim]`.
    """

    segment: OpenSegment
    layers: tuple[PairMemory | OutsidePairs, ...]
    caches: tuple[XLCache, ...]
    outputs: tuple[Tensor, ...]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.segment.filled
