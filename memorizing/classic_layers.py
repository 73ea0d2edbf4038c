"""Layers of the classic `MemorizingTransformer`; their parameters have the published names."""

# b batch, h heads, i queries, j keys, k pairs retrieved, d width of a head, u different pairs retrieved

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memorizing.knn import KNNMemory
from memorizing.knn.attend import bag
from memory_models.transformer import unit

BUCKETS = 32
MAX_DISTANCE = 128
MEMORY_SCALE = 20.0


class RelativeBias(nn.Module):
    """A learned bias of the logits by distance, in buckets (Raffel et al. 2020, T5, §2.1), causal.

    Distances up to 15 have a bucket each; from 16 to 127 they share buckets that grow by a constant factor;
    all others share the last.

    Args:
        heads: one bias for each.
        scale: factor of the learned numbers.
    """

    def __init__(self, *, heads: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, time: int, cached: int) -> Tensor:
        """`[1, heads, time, cached + time]`, minus infinity at tokens to come.

        Args:
            time: queries, which are the last `time` of the keys.
            cached: keys before them.
        """
        weight = self.relative_attention_bias.weight
        distance = torch.arange(cached + time - 1, -1, -1, device=weight.device)
        past = self.relative_attention_bias(_bucket(distance)).T * self.scale
        future = past.new_full((past.shape[0], time - 1), -torch.inf)
        # One number for each distance; query `i` sees a window of them that begins one place earlier for
        # each query before it.
        windows = torch.cat([past, future], 1).unfold(1, cached + time, 1)
        return windows.flip(1)[None]


def _bucket(distance: Tensor) -> Tensor:
    exact = BUCKETS // 2
    # In float32, as the published package has it: a boundary may turn on the last bit.
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(MAX_DISTANCE / exact)
    shared = exact + (ratio * (BUCKETS - exact)).long()
    return torch.where(distance < exact, distance, shared.clamp(max=BUCKETS - 1))


class Residual(nn.Module):
    """A layer norm and the layer behind it; the caller adds the residual."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn


class FeedForward(nn.Module):
    """`W_o gelu(W_i x)` with biases, `[..., dim]` to `[..., dim]`."""

    def __init__(self, dim: int, *, mult: int, dropout: float) -> None:
        super().__init__()
        inner = dim * mult
        self.net = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LocalAttention(nn.Module):
    """Causal attention in a segment; all heads share one head of keys and values (Shazeer 2019).

    Args:
        dim: width of the residual stream.
        heads: query heads.
        dim_head: width of a head.
        dropout: of the attention weights.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, dropout: float, out_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=out_bias)

    def forward(self, x: Tensor, past: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to `past` and the segment.

        Args:
            x: `[batch, time, dim]`, normalised.
            past: `[batch, cached, 2, dim_head]`, keys and values from before the segment.
            bias: `[1 or batch, heads, time, cached + time]`, minus infinity where nothing may be seen.

        Returns:
            `[batch, time, dim]` without the residual, and the segment's keys and values
            `[batch, time, 2, dim_head]`.
        """
        queries, pairs = self.project(x)
        keys, values = _behind(past, pairs).unbind(2)
        scale = keys.shape[-1] ** -0.5
        # With keys shared by the heads, heads times queries are the rows of one matrix.
        rows = rearrange(queries, "b i h d -> b (h i) d")
        bias = rearrange(bias, "b h i j -> b (h i) j").to(rows.dtype)
        # With a gradient for the bias torch's fused attention would lay the scores out all the same.
        if torch.is_grad_enabled() or (self.training and self.dropout.p > 0):
            scores = torch.baddbmm(bias.expand(len(rows), -1, -1), rows, keys.mT, alpha=scale)
            attended = torch.bmm(self.dropout(scores.softmax(-1)), values)
        else:
            one_head = (rows[:, None], keys[:, None], values[:, None])
            attended = F.scaled_dot_product_attention(*one_head, attn_mask=bias[:, None], scale=scale)[:, 0]
        return self.to_out(rearrange(attended, "b (h i) d -> b i (h d)", h=self.heads)), pairs

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[batch, time, heads, dim_head]`, and keys and values `[batch, time, 2, dim_head]`."""
        return self.to_q(x).unflatten(-1, (self.heads, -1)), self.to_kv(x).unflatten(-1, (2, -1))


class MemoryAttention(LocalAttention):
    """The same with the nearest pairs of a store beside the segment, under one softmax.

    Cosine similarity with a learned temperature for each head, 20 at first, for pairs and segment alike.
    The store is read only; the caller writes it when the whole model has read.

    Args:
        retrieved: pairs that each query reads.
        dim: as in `LocalAttention`, like all others.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, dropout: float, retrieved: int) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, dropout=dropout, out_bias=False)
        self.retrieved = retrieved
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(MEMORY_SCALE)))

    def forward(
        self,
        x: Tensor,
        past: Tensor | None,
        bias: Tensor,
        memory: KNNMemory | None = None,
        may_read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `LocalAttention`, and attend to `memory`.

        Args:
            memory: the store; None reads none.
            may_read: bool `[batch, time]`, the tokens that may read it; None means all.
        """
        queries, pairs = self.project(x)
        asked = queries.transpose(1, 2)
        keys, values = _behind(past, pairs).unbind(2)
        exact = torch.promote_types(asked.dtype, torch.float32)
        device = x.device.type
        # Logits reach several tens, which half precision knows to a quarter. The meta device has no
        # autocast; asking about it raises.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            asked, scale, bias = asked.to(exact), self.scale.to(exact).exp(), bias.to(exact)
            rows = (asked * scale).flatten(1, 2)
            scores = torch.baddbmm(bias.flatten(1, 2).expand(len(rows), -1, -1), rows, keys.to(exact).mT)
            found = None if memory is None else retrieve(asked, memory, self.retrieved, may_read)
            if found is None:
                weights = self.dropout(scores.softmax(-1))
                attended = torch.bmm(weights, values.to(exact))
            else:
                shares, total = found.weights(scale)
                # All pairs together are one more column: their softmax within is done.
                joint = torch.cat([total.flatten(1, 2), scores], -1).softmax(-1)
                shares = self.dropout(shares * joint[..., :1].view_as(total))
                attended = torch.bmm(self.dropout(joint[..., 1:]), values.to(exact))
                attended = attended + found.sum(shares).flatten(1, 2)
        out = rearrange(attended.to(queries.dtype), "b (h i) d -> b i (h d)", h=self.heads)
        return self.to_out(out), pairs

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `LocalAttention`, with queries and keys of unit length."""
        queries, pairs = super().project(x)
        keys, values = pairs.unbind(2)
        keys = unit(keys).to(values.dtype)
        return unit(queries), torch.stack([keys, values], 2)


def _behind(past: Tensor | None, pairs: Tensor) -> Tensor:
    return pairs if past is None else torch.cat([past.to(pairs.dtype), pairs], 1)


class Retrieved(NamedTuple):
    """Pairs found for each query, each different one copied once.

    The copies are what the backward pass reads, so the store may be written, wrapped and cleared before it.

    Attributes:
        scores: `[b, h, i, k]`, products with the keys; they carry the gradient of the queries.
        mask: bool `[b, h, i, k]`, false where fewer than `k` pairs were found.
        slots: int64 `[b, h, i, k]`, rows of `values`.
        values: `[b u, d]`.
    """

    scores: Tensor
    mask: Tensor
    slots: Tensor
    values: Tensor

    def weights(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the pairs of a query `[b, h, i, k]`, and the log of its denominator `[b, h, i, 1]`."""
        some = self.mask.any(-1, keepdim=True)
        # A softmax over nothing but minus infinity would poison the gradient with NaN.
        logits = (self.scores * scale).masked_fill(~self.mask & some, -torch.inf)
        total = logits.logsumexp(-1, keepdim=True)
        weights = (logits - total).exp().masked_fill(~self.mask, 0.0)
        return weights, total.masked_fill(~some, -torch.inf)

    def sum(self, weights: Tensor) -> Tensor:
        """Values summed by weights `[b, h, i, k]`, `[b, h, i, d]`."""
        k = self.slots.shape[-1]
        summed = F.embedding_bag(
            self.slots.view(-1, k), self.values, per_sample_weights=weights.reshape(-1, k), mode="sum"
        )
        return summed.view(*self.slots.shape[:-1], -1)


def retrieve(queries: Tensor, memory: KNNMemory, k: int, may_read: Tensor | None) -> Retrieved | None:
    """The `k` nearest pairs of each query's row; None where nothing can be read.

    Args:
        queries: `[batch, heads, time, dim_head]`, float32 or float64.
        memory: the store; the score must be the inner product, or the cosine of keys of unit length.
        k: pairs for each query; fewer where fewer are held.
        may_read: bool `[batch, time]`, the queries that may read; None means all.
    """
    k = min(k, int(memory.counts.max()))
    if k == 0 or (may_read is not None and not may_read.any()):
        return None
    scores, ids = memory.lookup(queries, k)
    if may_read is not None:
        ids = ids.masked_fill(~may_read[:, None, :, None], -1)
    mask = ids >= 0
    slots, distinct = _distinct(ids.flatten(1), mask.flatten(1))
    keys, values, _ = memory.gather(distinct)
    table = keys.flatten(0, 1).to(queries.dtype)
    slots = slots.view_as(ids)
    products = _Products.apply(queries, scores.to(queries.dtype).masked_fill(~mask, 0.0), slots, table)
    return Retrieved(products, mask, slots, values.flatten(0, 1).to(queries.dtype))


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each id of a row once, `[b, u]` filled up with -1, and where in that table laid flat each id stands."""
    batch = ids.shape[0]
    oldest = ids.masked_fill(~mask, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    age = torch.where(mask, ids - oldest, 0)
    # Ids of one row lie within as many as it holds, so they need no sorting.
    there = torch.zeros(batch, int(age.max()) + 1, dtype=torch.bool, device=ids.device)
    there.scatter_(1, age, True)
    place = there.cumsum(1) - 1
    width = int(place[:, -1].max()) + 1
    distinct = ids.new_full((batch, width), -1)
    rows, ages = there.nonzero(as_tuple=True)
    distinct[rows, place[rows, ages]] = ages + oldest[rows, 0]
    first = torch.arange(0, batch * width, width, device=ids.device)[:, None]
    return place.gather(1, age) + first, distinct


class _Products(torch.autograd.Function):
    """Scores the search has computed, with their gradient by the queries."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scores: Tensor, slots: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(slots, keys)
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, keys = ctx.saved_tensors
        summed = bag(grad.flatten(0, -2), slots.flatten(0, -2), keys)
        return summed.view(*grad.shape[:-1], -1), None, None, None
