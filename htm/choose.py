"""Which chunks each query of the HTM read looks into, with what weight, and which of their places."""

# axes: b batch, i queries, m chunks, k chosen chunks, c places in a chunk, d dim

import math

import torch
from torch import Tensor

from htm.attend import in_flat_batch


def best_chunks(
    summary_queries: Tensor, summaries: Tensor, available: Tensor | None, topk: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The best chunks of each query.

    Args:
        summary_queries: `[b, i, d]`.
        summaries: `[b, m, d]`.
        available: bool `[b, 1 or i, m]`, false where a chunk must not be read; None if all may.
        topk: how many.

    Returns:
        Their indices and scores `[b, i, k]`, and which of them may be read, None if all.
    """
    summaries = summaries.to(summary_queries.dtype)
    count = summaries.shape[1]
    k = min(topk, count)
    # With gradient either the scores of all chunks, or of the chosen ones once more: whichever is smaller.
    # Per query only the latter keeps a NaN in a forbidden summary from meeting a zero in the backward.
    gradient = torch.is_grad_enabled()
    dense = gradient and count <= k * summaries.shape[-1] and (available is None or available.shape[1] == 1)
    if dense and available is not None:
        summaries = torch.where(available.mT, summaries, 0)
    with torch.set_grad_enabled(dense):
        scores = summary_queries @ summaries.mT
    ranked = scores.detach()
    if available is not None:
        ranked = torch.where(available, ranked, -math.inf)
    best, chosen = ranked.topk(k)
    allowed = None if available is None else available.expand(scores.shape).gather(-1, chosen)
    if dense:
        best = scores.gather(-1, chosen)
    elif gradient:
        picked = _pick(summaries, chosen)
        if allowed is not None:
            picked = torch.where(allowed[..., None], picked, 0)
        best = (picked @ summary_queries[..., None]).squeeze(-1)
    if allowed is not None:
        best = best.masked_fill(~allowed, torch.finfo(best.dtype).min)
    return chosen, best, allowed


def chunk_weights(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the chosen chunks' scores `[b, i, k]`, zero for a chunk that must not be read."""
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights if allowed is None else torch.where(allowed, weights, 0)


def readable_places(
    chosen: Tensor, allowed: Tensor | None, lengths: Tensor | None, mask: Tensor | None, chunk_size: int
) -> Tensor | None:
    """Bool `[b, i, k, c]`: the places of the chosen chunks that may be read; None when all may."""
    if allowed is None:
        return None
    if mask is not None:
        return allowed[..., None] & _pick(mask, chosen)
    if lengths is not None:
        place = torch.arange(chunk_size, device=lengths.device)
        return allowed[..., None] & (place < _pick(lengths, chosen)[..., None])
    return allowed[..., None].expand(*allowed.shape, chunk_size)


def all_of(*masks: Tensor | None) -> Tensor | None:
    """True where all the masks that are given are true; None when none is given."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    combined = given[0]
    for mask in given[1:]:
        combined = combined & mask
    return combined


def _pick(chunks: Tensor, chosen: Tensor) -> Tensor:
    """From `[b, m, ...]` the chosen `[b, i, k]`, as `[b, i, k, ...]`."""
    rows = in_flat_batch(chosen, chunks.shape[1])
    return chunks.flatten(0, 1).index_select(0, rows.flatten()).view(*chosen.shape, *chunks.shape[2:])
