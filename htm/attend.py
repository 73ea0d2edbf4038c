"""The inner attention of the HTM read, over chosen chunks that are gathered a few queries at a time.

`attend` is a custom operator, so that `torch.compile` keeps its blocks as they are, and so that the backward
can gather the chosen memories a second time instead of keeping a copy of them. Where neither is wanted
`attend_without_gradient` does the same without an operator's overhead, which for one query is a fifth of the
time. `attend_portably` is what `torch.export` writes down: ordinary operations, all queries at once.
"""

# axes: b batch, i queries, m chunks, k chosen chunks, c places in a chunk, n tokens, h heads, d dim;
# r queries of one block

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes of gathered memories held at a time. On a CPU they should stay in cache, and fresh pages are what
# large temporaries cost most; elsewhere the blocks only have to be large enough to fill the device.
CPU_BLOCK_BYTES = 2 * 2**20
DEVICE_BLOCK_BYTES = 128 * 2**20


def attend_without_gradient(
    queries: Tensor,  # [b, i, h, d], scaled, with the key projection folded in
    weights: Tensor,  # [b, i, k]
    chosen: Tensor,  # [b, i, k]
    tokens: Tensor,  # [b, n, d]
    positions: Tensor | None,  # [c, d]
    places: Tensor | None,  # bool [b, i, k, c], false at a place that must not be read
    chunk_size: int,
    value_dim: int,
    joint: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sums `[b, i, h, value_dim]` of memories, and their weights inside the chunks if `keep`.

    The paper's read, where `weights` sum to 1 over the chosen chunks:
    `out = sum over k of weights_k * softmax(queries . (chunk_k + positions)) . (chunk_k + positions)`.

    With `joint`, where `weights` are scores of the chunks, one softmax over all places of the chosen
    chunks: `softmax(queries . (chunk_k + positions) + weights_k) . (chunk_k + positions)`.

    Only the first `value_dim` channels of a memory are summed; all of them are keys.
    """
    h, k, c = queries.shape[2], chosen.shape[2], chunk_size
    flat_queries, flat_weights = queries.flatten(0, 1), weights.flatten(0, 1)
    out, kept = _results(queries, chosen, c, value_dim, keep)
    flat_out = out.flatten(0, 1)
    with torch.autocast(queries.device.type, enabled=False):
        for block, gathered, hidden, _ in _gathered_blocks(queries, chosen, tokens, places, c):
            query, weight = flat_queries[block], flat_weights[block][:, None, :, None]
            scores = torch.bmm(query, gathered.mT).view(len(query), h, k, c)
            if joint:
                scores += weight
            if positions is not None:
                scores += (query @ positions.mT)[:, :, None]
            if hidden is not None:
                scores.masked_fill_(hidden[:, None], torch.finfo(scores.dtype).min)
            exact = torch.promote_types(scores.dtype, torch.float32)
            if joint:
                inside = scores.flatten(2).softmax(dim=-1, dtype=exact).view(scores.shape).to(scores.dtype)
                attention = inside
            else:
                inside = scores.softmax(dim=-1, dtype=exact).to(scores.dtype)
                attention = inside * weight
            if keep:
                kept[block] = inside
            torch.bmm(attention.flatten(2), gathered[..., :value_dim], out=flat_out[block])
            if positions is not None:
                flat_out[block] += attention.sum(dim=2) @ positions[:, :value_dim]
    return out, kept


def attend_portably(
    queries: Tensor,
    weights: Tensor,
    chosen: Tensor,
    tokens: Tensor,
    positions: Tensor | None,
    places: Tensor | None,
    chunk_size: int,
    value_dim: int,
    joint: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """As `attend_without_gradient`, for graphs that run without this library, or without torch.

    The chosen chunks of all queries are there at once, `[b, i, k, c, d]`. No weights are kept: the second
    result is empty.
    """
    place = torch.arange(chunk_size, device=chosen.device)
    # The last chunk may be cut short: what is clamped is hidden by `places`.
    index = (chosen[..., None] * chunk_size + place).clamp(max=tokens.shape[1] - 1)
    rows = torch.arange(tokens.shape[0], device=chosen.device)[:, None, None, None]
    gathered = tokens[rows, index].to(queries.dtype)
    if places is not None:
        gathered = torch.where(places[..., None], gathered, 0)
    if positions is not None:
        gathered = gathered + positions
    exact = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scores = torch.einsum("bihd,bikcd->bihkc", queries, gathered)
        if joint:
            scores = scores + weights[:, :, None, :, None]
        if places is not None:
            scores = scores.masked_fill(~places[:, :, None], torch.finfo(scores.dtype).min)
        if joint:
            inside = scores.flatten(3).softmax(-1, dtype=exact).view(scores.shape)
        else:
            inside = scores.softmax(-1, dtype=exact) * weights[:, :, None, :, None]
        out = torch.einsum("bihkc,bikcd->bihd", inside.to(queries.dtype), gathered[..., :value_dim])
    return out, out.new_empty(0)


attend = torch.library.custom_op(
    "memory_models::htm_attend",
    attend_without_gradient,
    mutates_args=(),
    schema="(Tensor queries, Tensor weights, Tensor chosen, Tensor tokens, Tensor? positions, "
    "Tensor? places, int chunk_size, int value_dim, bool joint, bool keep) -> (Tensor, Tensor)",
)


@torch.library.custom_op(
    "memory_models::htm_attend_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor queries, Tensor weights, Tensor chosen, Tensor tokens, Tensor? positions, "
    "Tensor? places, Tensor kept, int chunk_size, int value_dim, bool joint, bool into_tokens) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    queries: Tensor,
    weights: Tensor,
    chosen: Tensor,
    tokens: Tensor,
    positions: Tensor | None,
    places: Tensor | None,
    kept: Tensor,
    chunk_size: int,
    value_dim: int,
    joint: bool,
    into_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for queries, weights and, if `into_tokens`, tokens (else an empty tensor)."""
    h, k, c = queries.shape[2], chosen.shape[2], chunk_size
    flat_grad, flat_queries, flat_weights = grad.flatten(0, 1), queries.flatten(0, 1), weights.flatten(0, 1)
    query_grad, weight_grad, token_grad = _gradients(queries, weights, tokens, into_tokens)
    flat_query_grad, flat_weight_grad = query_grad.flatten(0, 1), weight_grad.flatten(0, 1)
    with torch.autocast(queries.device.type, enabled=False):
        for block, gathered, _, index in _gathered_blocks(queries, chosen, tokens, places, c):
            out_grad, inside = flat_grad[block], kept[block]
            inside_grad = torch.bmm(out_grad, gathered[..., :value_dim].mT).view(len(out_grad), h, k, c)
            if positions is not None:
                inside_grad += (out_grad @ positions[:, :value_dim].mT)[:, :, None]
            product = inside * inside_grad
            if joint:
                attention = inside
                score_grad = product.addcmul_(inside, product.sum(dim=(2, 3), keepdim=True), value=-1)
                flat_weight_grad[block] = score_grad.sum(dim=(1, 3))
            else:
                weight = flat_weights[block][:, None, :, None]
                attention = inside * weight
                total = product.sum(dim=-1, keepdim=True)
                flat_weight_grad[block] = total.sum(dim=(1, 3))
                score_grad = product.addcmul_(inside, total, value=-1).mul_(weight)
            torch.bmm(score_grad.flatten(2), gathered, out=flat_query_grad[block])
            if positions is not None:
                flat_query_grad[block] += score_grad.sum(dim=2) @ positions
            if into_tokens:
                gathered_grad = torch.bmm(score_grad.flatten(2).mT, flat_queries[block])
                gathered_grad[..., :value_dim] += torch.bmm(attention.flatten(2).mT, out_grad)
                flat_token_grad = token_grad.flatten(0, 1)
                flat_token_grad.index_add_(0, index, gathered_grad.flatten(0, 1).to(tokens.dtype))
    return query_grad, weight_grad, token_grad


def in_flat_batch(index: Tensor, length: int) -> Tensor:
    """Indices `[b, i, k]` into the rows of `[b, length, ...]`, as indices into `[b length, ...]`."""
    if index.shape[0] == 1:
        return index
    return index + (torch.arange(index.shape[0], device=index.device) * length).view(-1, 1, 1)


def _gathered_blocks(
    queries: Tensor, chosen: Tensor, tokens: Tensor, places: Tensor | None, chunk_size: int
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """The chosen chunks, some queries at a time.

    Yields a slice `r` of the `b * i` queries; their chunks `[r, k c, d]`, zero at places that must not be
    read, in a buffer that the next step overwrites; bool `[r, k, c]` at those places (None: there are
    none); and the index of each token in `[b n, d]`, `[r k c]`.
    """
    (b, i, k), (_, n, d), c = chosen.shape, tokens.shape, chunk_size
    cpu = tokens.device.type == "cpu"
    limit = CPU_BLOCK_BYTES if cpu else DEVICE_BLOCK_BYTES
    step = max(1, limit // max(1, k * c * d * tokens.element_size()))
    flat_tokens = tokens.flatten(0, 1)
    place = torch.arange(c, device=chosen.device)
    first = in_flat_batch(chosen * c, n).flatten(0, 1)
    # the last chunk may be cut short: what is clamped is hidden by `places`
    last = None
    if n % c != 0:
        last = in_flat_batch(torch.full_like(chosen, n - 1), n).flatten(0, 1)
    buffer = tokens.new_empty(min(step, b * i) * k * c, d)
    for start in range(0, b * i, step):
        block = slice(start, min(start + step, b * i))
        index = first[block][..., None] + place
        if last is not None:
            index = torch.minimum(index, last[block][..., None])
        index = index.flatten()
        rows = block.stop - block.start
        gathered = torch.index_select(flat_tokens, 0, index, out=buffer[: rows * k * c]).view(rows, k * c, d)
        gathered = gathered.to(queries.dtype)
        hidden = None
        if places is not None:
            hidden = ~places.flatten(0, 1)[block]
            # asking is cheap on a CPU and would wait for the queue elsewhere
            if cpu and not hidden.any():
                hidden = None
            else:
                gathered.masked_fill_(hidden.flatten(1)[..., None], 0)
        yield block, gathered, hidden, index


@attend.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    queries, _, chosen, _, _, _, chunk_size, value_dim, _, keep = inputs
    return _results(queries, chosen, chunk_size, value_dim, keep)


@_attend_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, queries, weights, _, tokens, *_, into_tokens = inputs
    return _gradients(queries, weights, tokens, into_tokens)


def _results(
    queries: Tensor, chosen: Tensor, chunk_size: int, value_dim: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Room for what `attend` returns."""
    b, i, h, _ = queries.shape
    kept = queries.new_empty(b * i if keep else 0, h, chosen.shape[2], chunk_size)
    return queries.new_empty(b, i, h, value_dim), kept


def _gradients(
    queries: Tensor, weights: Tensor, tokens: Tensor, into_tokens: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `_attend_backward` returns; zeros for the tokens, whose gradients are summed."""
    token_grad = tokens.new_zeros(tokens.shape if into_tokens else 0)
    return queries.new_empty(queries.shape), weights.new_empty(weights.shape), token_grad


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, weights, chosen, tokens, positions, places, chunk_size, value_dim, joint, _ = inputs
    ctx.save_for_backward(queries, weights, chosen, tokens, positions, places, output[1])
    ctx.options = chunk_size, value_dim, joint
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    into_tokens = ctx.needs_input_grad[3]
    query_grad, weight_grad, token_grad = _attend_backward(
        grad, *ctx.saved_tensors, *ctx.options, into_tokens
    )
    return query_grad, weight_grad, None, token_grad if into_tokens else None, *[None] * 6


attend.register_autograd(_differentiate, setup_context=_save_for_backward)
