"""Attention over retrieved pairs without laying the pairs out.

Copies of the retrieved keys and values, `[batch, queries, k, 2, dim]`, would be read once and thrown away,
and making room for them costs more than everything else. Here the weights are made from the scores that the
search has already computed, the values are summed where they lie, and so are the keys in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memorizing.knn.exact import TopK
from memorizing.knn.results import Attended
from memorizing.knn.ring import Ring, Unchanged
from memorizing.knn.unit import unit

# Bytes of gathered rows held at a time; on a CPU they should stay in cache.
CPU_BLOCK_BYTES = 2 * 2**20
DEVICE_BLOCK_BYTES = 128 * 2**20


def bag(weights: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """`sum_j weights[i, j] * table[slots[i, j]]`, `[m, d]`, without a gradient."""
    if table.dtype == weights.dtype:
        return F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")
    # The table would be converted as a whole at every call; convert what is read instead.
    out = weights.new_empty(weights.shape[0], table.shape[1])
    for part, rows in _gathered(slots, table, weights.dtype):
        out[part] = torch.bmm(weights[part].unsqueeze(1), rows).squeeze(1)
    return out


def dots(vectors: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """`vectors[i] . table[slots[i, j]]`, `[m, k]`, without a gradient."""
    out = vectors.new_empty(slots.shape[0], 1, slots.shape[1])
    for part, rows in _gathered(slots, table, vectors.dtype):
        # Row times matrix: the same product as matrix times column runs eight times slower.
        torch.bmm(vectors[part, None], rows.mT, out=out[part])
    return out.squeeze(1)


def _gathered(slots: Tensor, table: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`table[slots]`, `[some, k, d]`, some rows at a time, each time in the same place."""
    count, k = slots.shape
    limit = CPU_BLOCK_BYTES if table.device.type == "cpu" else DEVICE_BLOCK_BYTES
    step = max(1, limit // max(1, k * table.shape[1] * table.element_size()))
    buffer = table.new_empty(min(step, count) * k, table.shape[1])
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        place = buffer[: (part.stop - start) * k]
        rows = torch.index_select(table, 0, slots[part].flatten(), out=place)
        yield part, rows.view(part.stop - start, k, table.shape[1]).to(dtype)


class _Scores(torch.autograd.Function):
    """Scores the search has computed, with their gradient by the queries."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scores: Tensor, pairs: Pairs, metric: str) -> Tensor:
        ctx.pairs, ctx.metric = pairs, metric
        ctx.save_for_backward(queries)
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (queries,) = ctx.saved_tensors
        pairs = ctx.pairs
        pairs.check()
        weights = grad if pairs.scale is None else grad * pairs.scale[pairs.slots]
        result = bag(weights, pairs.slots, pairs.keys)
        if ctx.metric == "l2":  # the score is -|q - k|^2
            result = 2 * (result - queries * grad.sum(-1, keepdim=True))
        return result, None, None, None


class _WeightedSum(torch.autograd.Function):
    """The retrieved values summed by their weights, with the gradient by the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return bag(weights, pairs.slots, pairs.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.pairs.check()
        return dots(grad.contiguous(), ctx.pairs.slots, ctx.pairs.values), None


class Pairs(NamedTuple):
    """Where retrieved pairs lie.

    Attributes:
        slots: int64 `[m, k]` into the tables; anything valid where `mask` is false.
        mask: bool `[m, k]`, false where nothing was found.
        keys: `[n, dim]`; `values`: `[n, value_dim]`.
        scale: `[n]` factors of the keys in a score, or None for ones.
        check: called before the backward pass reads the tables; raises if they have changed there.
    """

    slots: Tensor
    mask: Tensor
    keys: Tensor
    values: Tensor
    scale: Tensor | None
    check: Callable[[], None]

    def copied(self) -> Pairs:
        """The same pairs in tables of their own: `m * k` keys and values."""
        flat = self.slots.flatten()
        return Pairs(
            torch.arange(flat.numel(), device=flat.device).view_as(self.slots),
            self.mask,
            self.keys.index_select(0, flat),
            self.values.index_select(0, flat),
            None if self.scale is None else self.scale.index_select(0, flat),
            lambda: None,
        )


def attend_pairs(
    queries: Tensor, scores: Tensor, pairs: Pairs, *, metric: str, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of each query over its own retrieved pairs (Memorizing Transformers §3.2).

    The gradient reaches the queries and `scale`, never the stored pairs.

    Args:
        queries: `[m, dim]`, those whose product with the keys made the scores (normalised, for the cosine).
        scores: `[m, k]`, what the search computed; anything where the mask is false.
        pairs: the pairs retrieved.
        metric: "ip", "cosine" or "l2".
        scale: factor of the scores, a number or `[m, 1]`.

    Returns:
        The output `[m, value_dim]`, the log of the softmax' denominator `[m]` and the weights `[m, k]`.
    """
    m, k = pairs.slots.shape
    if k == 0:
        nothing = queries.new_zeros(m, pairs.values.shape[1])
        return nothing, queries.new_full((m,), -torch.inf), queries.new_zeros(m, 0)
    scores = _Scores.apply(queries, scores.masked_fill(~pairs.mask, 0.0), pairs, metric)
    some = pairs.mask.any(-1, keepdim=True)
    # Rows without any pair take part as zeros and are put right at the end: a softmax over nothing but
    # -inf would poison the gradient with NaN.
    logits = (scores * scale).masked_fill(~pairs.mask & some, -torch.inf)
    denominator = torch.logsumexp(logits, -1, keepdim=True)
    weights = (logits - denominator).exp().masked_fill(~pairs.mask, 0.0)
    output = _WeightedSum.apply(weights, pairs)
    total = torch.where(some, denominator, -torch.inf).squeeze(-1)
    return output, total, weights.detach()


def attend_found(
    ring: Ring,
    rows: Sequence[int],
    queries: Tensor,
    found: TopK,
    *,
    metric: str,
    scale: Tensor | float,
    snapshot: bool,
) -> Attended:
    """`attend_pairs` to what a search has found in a ring, with the queries as the user gave them.

    Args:
        ring: where the pairs lie.
        rows: `n` rows of it.
        queries: `[n, ..., dim]`, `q` for each row, in any floating dtype on any device.
        found: scores and slots `[n, q, k]` of these queries.
        metric: "ip", "cosine" or "l2".
        scale: factor of the scores, a number or a tensor that broadcasts to `[n, ...]`.
        snapshot: copy the pairs, so that the backward pass does not need them to stay where they are.

    Returns:
        Output, logsumexp and weights in the queries' dtype, and ids.
    """
    shape, k, device = queries.shape[:-1], found.slots.shape[-1], ring.keys.device
    asked = queries.to(device, ring.compute_dtype)
    if isinstance(scale, Tensor):
        scale = scale.to(device, asked.dtype).expand(shape).reshape(-1, 1)
    asked = asked.reshape(-1, queries.shape[-1])
    if metric == "cosine":
        asked = unit(asked)
    ids = ring.ids(rows, found.slots)
    pairs = Pairs(
        slots=ring.flat(rows, found.slots.clamp(min=0)).flatten(0, 1),
        mask=(found.slots >= 0).flatten(0, 1),
        # .data: writing to other slots is allowed before the backward pass, and must not look like a
        # change to autograd; whether these slots were written is checked precisely.
        keys=ring.keys.data.flatten(0, 1),
        values=ring.values.data.flatten(0, 1),
        scale=None if ring.scale is None else ring.scale.flatten(),
        check=Unchanged(ring, rows, ids),
    )
    if snapshot:
        pairs = pairs.copied()
    with torch.autocast(device.type, enabled=False):
        output, total, weights = attend_pairs(
            asked, found.scores.flatten(0, 1), pairs, metric=metric, scale=scale
        )
    return Attended(
        output.view(*shape, ring.values.shape[2]).to(queries),
        total.view(shape).to(queries),
        ids.view(*shape, k).to(queries.device),
        weights.view(*shape, k).to(queries),
    )
