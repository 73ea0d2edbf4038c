"""Exact top-k search by block maxima, on the device where the keys live.

A key among the `k` best can only lie in one of the `k` blocks with the largest block maximum: were it in
another block, `k` blocks would each hold a better key. So the scores are reduced to maxima of blocks, the
best blocks are chosen among those (again by blocks), and only their members compete for the result. This
matters because `torch.topk` over all scores costs more than the matrix product that made them.

Scores are `(query . key) * scale + bias` with an optional `scale` and `bias` for each key, which covers
the inner product, the cosine (scale = 1 / |key|) and the distance (bias = -|key|^2, queries doubled).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Sizes of the tiles. A score tile (_KEY_TILE x _QUERY_TILE floats) and its operands must stay in a core's
# second-level cache (1 MiB and up): written out to memory, the matrix product runs two to four times slower.
# Numbers of queries are for one thread; with more threads a tile has as many times the queries.
_KEY_TILE = 1024
_QUERY_TILE = 256
_BLOCKS = (8, 16)  # neighbouring keys whose maximum is kept in the first pass of `_tiled`: small, large
_LARGE_BLOCKS_FROM = 49_152  # keys; fewer maxima are to be reduced then, but more keys to be scored again
_GROUP = 8  # neighbouring blocks whose maximum is kept as well
_FAN = 4  # columns reduced to one at each level of `block_top_k`
_WORTHWHILE = 256  # columns from which reducing pays
_KEEP_UP_TO = 8_192  # keys up to which the scores of some queries with all of them are kept,
_KEEP_FEW_UP_TO = 16_384  # and up to here if there are fewer queries than
_MANY_QUERIES = 256
_KEEP_QUERIES = range(64, 257)  # so many queries: the product packs the keys anew for each tile
_KEPT_SCORES = 1 << 22  # about so many scores, which then still lie in the third-level cache
_FEW_QUERIES = 16  # up to here the search is bound by memory bandwidth: one batched product over all rows
_RESCORE_QUERIES = 32  # queries whose winning blocks (2 or 4 KiB each) are gathered at a time
_RESCORED = 1 << 19  # most scores of winning blocks held at a time, in elements
_MAXIMA = 1 << 25  # most block maxima held at a time, in elements
_AS_INTEGERS_FROM = 1 << 13  # scores from which they are compared as integers
_DEVICE_SCORES = 1 << 26  # most scores held at a time on an accelerator, in elements


class TopK(NamedTuple):
    """The best scores, largest first, and where they were found."""

    scores: Tensor
    slots: Tensor


def block_top_k(scores: Tensor, k: int, *, ordered: bool = True) -> TopK:
    """The `k` largest of each row, exactly as `torch.topk`, several times faster for long rows.

    Args:
        scores: `[rows, n]`, the last axis contiguous.
        k: at most `n`.
        ordered: largest first; otherwise in any order, which is a little cheaper.

    Returns:
        Scores and columns, both `[rows, k]`. Equal scores come in any order.
    """
    columns = _best_columns(scores, k, ordered)
    return TopK(scores.gather(1, columns), columns)


def _best_columns(scores: Tensor, k: int, ordered: bool) -> Tensor:
    n = scores.shape[1]
    if n < _WORTHWHILE or n < 2 * k * _FAN:
        return _sortable(scores).topk(k, sorted=ordered).indices
    # Strided blocks (column, column + m, ...): the maximum runs over an outer axis, which is 5 to 15
    # times faster than over neighbours.
    m = n // _FAN
    maxima = scores[:, : m * _FAN].unflatten(1, (_FAN, m)).amax(1)
    candidates = _members(_best_columns(maxima, k, ordered=False), _FAN, m, n)
    best = _sortable(scores.gather(1, candidates)).topk(k, sorted=ordered).indices
    return candidates.gather(1, best)


def _sortable(scores: Tensor) -> Tensor:
    """What `torch.topk` orders as it orders `scores`, NaN above all else, and on a CPU a third quicker.

    Comparing two floats asks both whether they are NaN. The bits of a float32, read as an integer, are
    ordered like the floats once all but the sign are turned over in negative ones; NaN with a sign bit
    then lies below -inf, and the subtraction lets it wrap round to the top.
    """
    plain = scores.dtype != torch.float32 or scores.device.type != "cpu"
    if plain or scores.numel() < _AS_INTEGERS_FROM:
        return scores
    bits = scores.detach().view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).sub_(0x7FFFFF)


def _members(blocks: Tensor, fan: int, m: int, n: int) -> Tensor:
    """Columns of the strided blocks `[rows, k]`, and those columns below `n` that no block covers."""
    offsets = torch.arange(0, fan * m, m, device=blocks.device)
    members = (blocks.unsqueeze(1) + offsets.unsqueeze(1)).flatten(1)
    if m * fan == n:
        return members
    rest = torch.arange(m * fan, n, device=blocks.device).expand(blocks.shape[0], -1)
    return torch.cat((members, rest), 1)


def exact_top_k(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    ordered: bool = True,
) -> TopK:
    """The `k` best keys for each query, row by row, with a search that fits the sizes and the device.

    Args:
        queries: `[rows, q, dim]` in the dtype to compute in.
        keys: `[rows, n, dim]` of any floating dtype, on the queries' device; a slice of a larger store
            is fine and is not copied.
        k: at most `n`.
        scale: `[rows, n]`, multiplies the scores of a key; None stands for ones.
        bias: `[rows, n]`, added to the scores of a key; None stands for zeros.
        ordered: largest score first.

    Returns:
        Scores in the queries' dtype and slots (int64 in `[0, n)`), both `[rows, q, k]`.
    """
    rows, q, _ = queries.shape
    n = keys.shape[1]
    if rows * q * k == 0:
        empty = queries.new_empty(rows, q, k)
        return TopK(empty, empty.to(torch.int64))
    if q <= _FEW_QUERIES and rows * q * n <= _DEVICE_SCORES:
        return _batched(queries, keys, k, scale, bias, ordered)
    if queries.device.type != "cpu":
        step = max(1, _DEVICE_SCORES // (rows * n))
        parts = [_batched(part, keys, k, scale, bias, ordered) for part in queries.split(step, dim=1)]
        return TopK(torch.cat([p.scores for p in parts], 1), torch.cat([p.slots for p in parts], 1))
    scores = queries.new_empty(rows, q, k)
    slots = torch.empty(rows, q, k, dtype=torch.int64)
    search = _kept if n <= (_KEEP_UP_TO if q >= _MANY_QUERIES else _KEEP_FEW_UP_TO) else _tiled
    for row in range(rows):
        search(
            queries[row],
            keys[row],
            None if scale is None else scale[row],
            None if bias is None else bias[row],
            ordered,
            TopK(scores[row], slots[row]),
        )
    return TopK(scores, slots)


def _batched(
    queries: Tensor, keys: Tensor, k: int, scale: Tensor | None, bias: Tensor | None, ordered: bool
) -> TopK:
    """One batched product over all rows; all scores at once."""
    rows, q, _ = queries.shape
    scores = torch.bmm(queries, keys.to(queries.dtype).transpose(1, 2))
    if scale is not None:
        scores *= scale.unsqueeze(1)
    if bias is not None:
        scores += bias.unsqueeze(1)
    best = block_top_k(scores.flatten(0, 1), k, ordered=ordered)
    return TopK(best.scores.view(rows, q, k), best.slots.view(rows, q, k))


def _prepared(keys: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys in the dtype to compute in, scaled: cheaper than scaling the many scores they make."""
    keys = keys.to(dtype)
    return keys if scale is None else keys * scale.unsqueeze(1)


def _kept(
    queries: Tensor, keys: Tensor, scale: Tensor | None, bias: Tensor | None, ordered: bool, out: TopK
) -> None:
    """Not too many keys: the score tile of some queries stays in cache while it is reduced."""
    keys = _prepared(keys, scale, queries.dtype).T
    k = out.scores.shape[1]
    fit = max(_KEEP_QUERIES[0], min(_KEPT_SCORES // keys.shape[1], _KEEP_QUERIES[-1]))
    step = min(fit * torch.get_num_threads(), queries.shape[0])
    tile = queries.new_empty(step, keys.shape[1])
    for start in range(0, queries.shape[0], step):
        part = queries[start : start + step]
        scores = tile[: part.shape[0]]
        if bias is None:
            torch.mm(part, keys, out=scores)
        else:
            torch.addmm(bias, part, keys, out=scores)
        best = block_top_k(scores, k, ordered=ordered)
        out.scores[start : start + step] = best.scores
        out.slots[start : start + step] = best.slots


def _tiled(
    queries: Tensor, keys: Tensor, scale: Tensor | None, bias: Tensor | None, ordered: bool, out: TopK
) -> None:
    """Many keys: keep only the block maxima of each score tile, then score the winning blocks again."""
    n = keys.shape[0]
    k = out.scores.shape[1]
    block = _BLOCKS[n >= _LARGE_BLOCKS_FROM]
    blocks = n // block
    if blocks < 2 * k * _GROUP:
        # So many are wanted that almost every block would win: nothing to be gained.
        _kept(queries, keys, scale, bias, ordered, out)
        return
    step = min(1024, max(_QUERY_TILE, _MAXIMA // blocks), queries.shape[0])
    maxima = queries.new_empty(blocks, step)
    upper = queries.new_empty(blocks // _GROUP, step)
    for start in range(0, queries.shape[0], step):
        part = queries[start : start + step]
        q = part.shape[0]
        _block_maxima(part, keys, scale, bias, block, maxima[:, :q], upper[:, :q])
        winners = _best_blocks(maxima[:, :q], upper[:, :q], k)
        found = TopK(*(t[start : start + step] for t in out))
        _rescore(part, keys, scale, bias, block, winners, ordered, found)


def _block_maxima(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    block: int,
    maxima: Tensor,
    upper: Tensor,
) -> None:
    """Write maxima of the scores, while these are in the cache; keys behind the last block are left out.

    Args:
        block: neighbouring keys in a block.
        maxima: `[blocks, q]`, filled with the maximum of each block.
        upper: `[blocks // _GROUP, q]`, filled with the maximum of each group of blocks.
    """
    q = queries.shape[0]
    step = min(_QUERY_TILE * torch.get_num_threads(), q)
    n = maxima.shape[0] * block
    many = min(n, _KEY_TILE * max(1, _QUERY_TILE // q))  # keys; few queries leave room for more
    buffer = queries.new_empty(many * step)
    for first in range(0, n, many):
        last = min(first + many, n)
        tile = _prepared(keys[first:last], None if scale is None else scale[first:last], queries.dtype)
        groups = slice(first // block // _GROUP, last // block // _GROUP)
        grouped = (groups.stop - groups.start) * _GROUP
        for start in range(0, q, step):
            part = queries[start : start + step].T
            scores = buffer[: (last - first) * part.shape[1]].view(last - first, part.shape[1])
            if bias is None:
                torch.mm(tile, part, out=scores)
            else:
                torch.addmm(bias[first:last].unsqueeze(1), tile, part, out=scores)
            found = maxima[first // block : last // block, start : start + step]
            torch.amax(scores.unflatten(0, (-1, block)), 1, out=found)
            if grouped:
                torch.amax(
                    found[:grouped].unflatten(0, (-1, _GROUP)), 1, out=upper[groups, start : start + step]
                )


def _best_blocks(maxima: Tensor, upper: Tensor, k: int) -> Tensor:
    """The `k` blocks with the largest maxima, `[q, k]`, in any order; see `_block_maxima`."""
    # Only the upper maxima are turned round: turning all of them costs more than all else here.
    best = _best_columns(upper.T.contiguous(), k, ordered=False)
    member = torch.arange(_GROUP, device=maxima.device)
    candidates = (best.unsqueeze(2) * _GROUP + member).flatten(1)
    grouped, blocks = upper.shape[0] * _GROUP, maxima.shape[0]
    if grouped < blocks:
        rest = torch.arange(grouped, blocks, device=maxima.device).expand(best.shape[0], -1)
        candidates = torch.cat((candidates, rest), 1)
    chosen = _sortable(maxima.T.gather(1, candidates)).topk(k, sorted=False).indices
    return candidates.gather(1, chosen)


def _rescore(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    block: int,
    winners: Tensor,
    ordered: bool,
    out: TopK,
) -> None:
    """The best keys of the winning blocks `[q, k]`, and of those behind the last whole block."""
    q, k = winners.shape
    many = max(_RESCORE_QUERIES, _RESCORED // (k * block))
    whole = keys.shape[0] // block * block
    for start in range(0, q, many):
        part = queries[start : start + many]
        chosen = winners[start : start + many]
        scores = _member_scores(part, keys, block, chosen)
        if scale is not None:
            scores *= _of_members(scale, block, chosen)
        if bias is not None:
            scores += _of_members(bias, block, chosen)
        best = _best_columns(scores, k, ordered)
        out.scores[start : start + many] = scores.gather(1, best)
        slots = chosen.gather(1, (best // block).clamp_max_(k - 1)) * block + best % block
        if whole < keys.shape[0]:
            slots = torch.where(best < k * block, slots, best + (whole - k * block))
        out.slots[start : start + many] = slots


def _member_scores(queries: Tensor, keys: Tensor, block: int, chosen: Tensor) -> Tensor:
    """Scores of the keys in the blocks `[q, k]`, then of those behind the last whole block."""
    n, dim = keys.shape
    q, k = chosen.shape
    whole = n // block * block
    by_block = keys[:whole].unflatten(0, (-1, block)).flatten(1)
    scores = queries.new_empty(q, k * block + n - whole)
    # The keys of a few queries at a time lie in the cache when they are multiplied.
    step = min(_RESCORE_QUERIES * torch.get_num_threads(), q)
    gathered = keys.new_empty(step * k, block * dim)
    for start in range(0, q, step):
        part = queries[start : start + step]
        blocks = chosen[start : start + step].flatten()
        members = torch.index_select(by_block, 0, blocks, out=gathered[: blocks.shape[0]])
        # Row times matrix: the same product as matrix times column runs eight times slower.
        torch.bmm(
            part.unsqueeze(1),
            members.view(part.shape[0], k * block, dim).to(part.dtype).transpose(1, 2),
            out=scores[start : start + step, : k * block].unsqueeze(1),
        )
    if whole < n:
        scores[:, k * block :] = queries @ keys[whole:].to(queries.dtype).T
    return scores


def _of_members(values: Tensor, block: int, chosen: Tensor) -> Tensor:
    """Of values `[n]` those that belong to the scores that `_member_scores` gives."""
    whole = values.shape[0] // block * block
    members = values[:whole].unflatten(0, (-1, block))[chosen].flatten(1)
    return torch.cat((members, values[whole:].expand(chosen.shape[0], -1)), 1)


def score_slots(
    queries: Tensor, keys: Tensor, slots: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Scores of chosen keys.

    Args:
        queries: `[q, dim]`.
        keys: `[n, dim]`.
        slots: `[q, k]` into the keys.
        scale, bias: `[n]`, as in `exact_top_k`.

    Returns:
        `[q, k]` in the queries' dtype.
    """
    parts = []
    for part, chosen in zip(queries.split(_QUERY_TILE), slots.split(_QUERY_TILE), strict=True):
        rows = keys.index_select(0, chosen.flatten()).view(*chosen.shape, -1).to(queries.dtype)
        parts.append(torch.matmul(part.unsqueeze(1), rows.transpose(1, 2)).squeeze(1))
    scores = torch.cat(parts)
    if scale is not None:
        scores *= scale[slots]
    if bias is not None:
        scores += bias[slots]
    return scores
