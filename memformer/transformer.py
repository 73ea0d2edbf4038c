"""The encoder and the layers of the classic Memformer: T5-style attention, cross-attention, feed-forward.

These are own layers because x-transformers' attention has no biases in its projections and its LayerNorm no
shift, so that weights of the package memformer have no place there.
"""

# b batch, t time, h heads, d width of a head

from __future__ import annotations

from itertools import count
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from memformer.attend import attend
from memory_models.checks import check_flags, check_tensor


def bucket_bounds(*, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """int64, the distance from which on each bucket of one direction but the first holds (T5).

    Half of a direction's buckets hold one distance each; the others divide the way from there to
    `max_distance` evenly in the logarithm.
    """
    one_way = buckets // 2 if bidirectional else buckets
    exact = one_way // 2
    wide = one_way - exact
    # In integers, because a logarithm that ends just below a whole number on one device and above it on
    # another would move a distance to the next bucket.
    begins = [
        next(n for n in count(exact) if n**wide * exact**step >= exact**wide * max_distance**step)
        for step in range(1, wide)
    ]
    return torch.tensor([*range(1, exact + 1), *begins])


def bucket(distances: Tensor, bounds: Tensor, *, bidirectional: bool) -> Tensor:
    """The bucket of each int64 distance `key - query`; those after the query come second, or are all 0."""
    if not bidirectional:
        return torch.bucketize((-distances).clamp(min=0), bounds, right=True)
    after = (distances > 0) * (len(bounds) + 1)
    return after + torch.bucketize(distances.abs(), bounds, right=True)


class RelativePositions(nn.Module):
    """Learned logits by distance, in buckets that widen with it (Raffel et al. 2020, §2.1; T5).

    Args:
        heads: attention heads.
        bidirectional: half of the buckets for keys after the query; otherwise all are for keys up to the
            query, and those after it are forbidden.
        buckets: number of buckets.
        max_distance: from here on all distances share a bucket.
    """

    def __init__(
        self, heads: int, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        self.bounds: Tensor
        self.bidirectional, self.buckets, self.max_distance = bidirectional, buckets, max_distance
        self.weight = nn.Parameter(torch.randn(buckets, heads))
        bounds = bucket_bounds(bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
        self.register_buffer("bounds", bounds, persistent=False)

    def forward(self, queries: int, keys: int) -> Tensor:
        """`[heads, queries + keys - 1]`, as `memformer.attend.attend` takes it."""
        distances = torch.arange(1 - keys, queries, device=self.weight.device)
        table = self.weight[bucket(distances, self.bounds, bidirectional=self.bidirectional)].T
        return table if self.bidirectional else table.masked_fill(distances > 0, -torch.inf)


class KeysValues(NamedTuple):
    """Projected tokens or slots, each `[batch, heads, time, dim_head]`."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Multi-head attention behind a LayerNorm of its queries' input; the caller adds the residual.

    The norm is for the residual stream only: what is attended to in cross-attention comes as it is.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_queries = nn.Linear(dim, dim)
        self.to_keys_values = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def project(self, tokens: Tensor) -> KeysValues:
        """Keys and values of `[batch, time, dim]`."""
        return KeysValues(*(self._split(part) for part in self.to_keys_values(tokens).chunk(2, -1)))

    def forward(
        self, normed: Tensor, pairs: KeysValues, *, bias: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Attend from `normed` `[batch, time, dim]` to `pairs`; bias and keep as in `attend`."""
        attended = attend(self._split(self.to_queries(normed)), *pairs, bias=bias, keep=keep)
        return self.to_out(rearrange(attended, "b h t d -> b t (h d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)


class Layer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each pre-norm and residual.

    Args:
        dim: width.
        heads: attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.cross = Attention(dim, heads)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        context: KeysValues,
        *,
        bias: Tensor,
        keep: Tensor | None = None,
        context_keep: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Process tokens that come after those of `past`.

        Args:
            x: `[batch, time, dim]`.
            context: what `cross.project` made of the context.
            bias: `[heads, time + keys - 1]`, by distance.
            keep: bool `[batch, keys]`, false at padding, past tokens included.
            context_keep: bool `[batch, context]`.
            past: keys and values of the tokens before.

        Returns:
            `[batch, time, dim]`, and the keys and values of all tokens so far.
        """
        normed = self.attention.norm(x)
        own = self.attention.project(normed)
        if past is not None:
            own = KeysValues(*(torch.cat(pair, 2) for pair in zip(past, own, strict=True)))
        x = x + self.attention(normed, own, bias=bias, keep=keep)
        x = x + self.cross(self.cross.norm(x), context, keep=context_keep)
        return x + self.feedforward(x), own


class Encoder(nn.Module):
    """Token ids to hidden states that have read the memory slots.

    Args:
        num_tokens: size of the vocabulary.
        dim: width.
        depth: number of layers.
        heads: attention heads.
        max_seq_len: most tokens of one segment.
    """

    def __init__(self, *, num_tokens: int, dim: int, depth: int, heads: int, max_seq_len: int) -> None:
        super().__init__()
        self.num_tokens, self.dim, self.max_seq_len = num_tokens, dim, max_seq_len
        self.embedding = nn.Embedding(num_tokens, dim)
        self.positions = RelativePositions(heads, bidirectional=True)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read one segment.

        Args:
            tokens: int64 `[batch, time]`, `time` at most `max_seq_len`.
            context: the slots, `[batch, slots, dim]`.
            mask: bool `[batch, time]`, false at padding, which may hold any id and which has no place:
                a row with padding, wherever it lies, gives the same as the row without.

        Returns:
            `[batch, time, dim]`, zero at padding.

        Raises:
            TypeError: if ids are not integers or `mask` is not boolean.
            ValueError: if shapes disagree, the segment is too long or an id is outside the vocabulary.
        """
        ids = packed("src", tokens, mask, num_tokens=self.num_tokens, longest=self.max_seq_len)
        check_context("mems", context, tokens, self.dim)
        x = self.embedding(ids.tokens)
        bias = self.positions(x.shape[1], x.shape[1])
        for layer in self.layers:
            pairs = cast(Layer, layer).cross.project(context)
            x, _ = layer(x, pairs, bias=bias, keep=ids.keep)
        return ids.unpack(self.norm(x))


class Packed(NamedTuple):
    """Token ids with the padding moved to the end of each row.

    Attributes:
        tokens: int64 `[batch, time]`, zero at padding.
        keep: bool `[batch, time]`, false at padding; None: there is none.
        order: int64 `[batch, time]`, where each token came from.
    """

    tokens: Tensor
    keep: Tensor | None
    order: Tensor | None

    def unpack(self, x: Tensor) -> Tensor:
        """`[batch, time, dim]` at the places the tokens came from, zero at padding."""
        if self.keep is None or self.order is None:
            return x
        # where, not multiply: what is computed at padding need not be finite.
        return torch.zeros_like(x).scatter(
            1, self.order[..., None].expand_as(x), torch.where(self.keep[..., None], x, 0)
        )


def packed(name: str, tokens: Tensor, mask: Tensor | None, *, num_tokens: int, longest: int) -> Packed:
    """Check the ids and the mask of an input, and pack them.

    Args:
        name: what the caller calls the ids, for the message.
        tokens: int64 `[batch, time]`.
        mask: bool `[batch, time]`, false at padding, which may hold any id.
        num_tokens: size of the vocabulary.
        longest: most tokens of a row.

    Raises:
        TypeError: if ids are not integers or `mask` is not boolean.
        ValueError: if shapes disagree, there are too many tokens or an id is outside the vocabulary.
    """
    check_tensor(name, tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 ids, got {tokens.dtype}")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"{name} must be [batch, time] with at least one token, got {tuple(tokens.shape)}")
    if tokens.shape[1] > longest:
        raise ValueError(
            f"{name} has {tokens.shape[1]} tokens, more than the {longest} that max_seq_len allows; split it "
            "into segments, as memory_replay_backprop does, or build the model for longer ones"
        )
    check_flags(f"{name}_mask", mask, tuple(tokens.shape), tokens.device)
    order = None
    if mask is not None:
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        tokens, mask = torch.where(mask, tokens, 0).gather(1, order), mask.gather(1, order)
    # Reading values back from an accelerator would wait for it at every step.
    if not torch.compiler.is_compiling() and tokens.device.type == "cpu" and tokens.numel():
        bad = (tokens < 0) | (tokens >= num_tokens)
        if bool(bad.any()):
            raise ValueError(
                f"{name} holds {int(tokens[bad][0])}, outside the vocabulary (0 to {num_tokens - 1})"
            )
    return Packed(tokens, mask, order)


def check_context(name: str, context: Tensor, tokens: Tensor, dim: int) -> None:
    """Refuse slots or encoder outputs (`ValueError`) that do not belong to `tokens`."""
    if context.dim() != 3 or context.shape[-1] != dim:
        raise ValueError(f"{name} must be [batch, length, {dim}], got {tuple(context.shape)}")
    if context.shape[0] != tokens.shape[0]:
        raise ValueError(f"there are {tokens.shape[0]} rows of tokens but {context.shape[0]} of {name}")
