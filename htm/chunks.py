"""Chunks of memories: their places' positions, their summaries, their tokens beside those before."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from htm import attend

__all__ = ["chunk_positions", "positions_like", "summarize", "with_previous"]


def chunk_positions(
    chunk_size: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sinusoidal positions `[chunk_size, dim]` of a chunk's places, counted back from its end.

    The last place of a chunk, where a full chunk has its newest token, is position 0. A token keeps its
    position while its chunk fills. Sines stand in the first half, cosines in the second; an odd `dim`
    drops the last cosine.
    """
    # half precision cannot tell the larger angles apart: build in float32 or better, then round once
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    position = torch.arange(chunk_size - 1, -1, -1, device=device, dtype=exact)
    frequency = 1e4 ** (-torch.arange(0, dim, 2, device=device, dtype=exact) / dim)
    angle = position[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :dim].to(dtype)


def summarize(memories: Tensor, chunk_size: int, *, mask: Tensor | None = None) -> Tensor:
    """Mean of each chunk's valid tokens.

    Args:
        memories: `[batch, time, dim]`, cut into chunks from the oldest; the last may be partial.
        chunk_size: tokens in a chunk.
        mask: bool `[batch, time]`, false where a token must not count, whatever it holds.

    Returns:
        `[batch, chunks, dim]`; zero for a chunk without a valid token.
    """
    batch, time, dim = memories.shape
    whole = time // chunk_size * chunk_size
    parts = []
    # the chunks as a view: padding the memories to whole chunks would copy them
    for start, stop, width in ((0, whole, chunk_size), (whole, time, time - whole)):
        if start == stop:
            continue
        shape = ((stop - start) // width, width)
        chunks = memories[:, start:stop].unflatten(1, shape)
        if mask is None:
            parts.append(chunks.mean(dim=2))
        else:
            parts.append(_masked_mean(chunks, mask[:, start:stop].unflatten(1, shape)))
    if not parts:
        return memories.new_zeros(batch, 0, dim)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def with_previous(memories: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Each token beside the one before it: `[batch, time, dim]` to `[batch, time, 2 * dim]`.

    Zero stands before the first token and for a token that bool `mask` `[batch, time]` hides.
    """
    if mask is not None:
        memories = torch.where(mask[..., None], memories, 0)
    return torch.cat((memories, F.pad(memories[:, :-1], (0, 0, 1, 0))), dim=-1)


def _masked_mean(chunks: Tensor, mask: Tensor) -> Tensor:
    batch, count, width, dim = chunks.shape
    # a few chunks at a time: the copy without the masked tokens stays small, and valid ones need none
    blockwise = chunks.device.type == "cpu" and not torch.compiler.is_compiling()
    blockwise = blockwise and not (torch.is_grad_enabled() and chunks.requires_grad)
    chunk_bytes = max(1, batch * width * dim * chunks.element_size())
    step = max(1, attend.CPU_BLOCK_BYTES // chunk_bytes) if blockwise else count
    means = []
    for start in range(0, count, step):
        block, valid = chunks[:, start : start + step], mask[:, start : start + step]
        if blockwise and valid.all():
            means.append(block.mean(dim=2))
            continue
        # where, not multiply: what stands at a masked token may be NaN
        kept = torch.where(valid[..., None], block, 0)
        total = kept.sum(dim=2, dtype=torch.promote_types(chunks.dtype, torch.float32))
        means.append((total / valid.sum(dim=2).clamp(min=1)[..., None]).to(chunks.dtype))
    return means[0] if len(means) == 1 else torch.cat(means, dim=1)


def positions_like(chunk_size: int, like: Tensor) -> Tensor:
    dim, dtype = like.shape[-1], like.dtype
    if like.device.type != "cpu" or torch.compiler.is_compiling() or dtype not in _NUMPY_DTYPES:
        return chunk_positions(chunk_size, dim, device=like.device, dtype=dtype)
    return torch.from_numpy(_position_array(chunk_size, dim, _NUMPY_DTYPES[dtype]))


_NUMPY_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


# `chunk_positions` once for all calls: building it costs as much as reading a chunk. An array, because a
# cached tensor would carry inference mode or a fake-tensor mode into later calls.
@functools.lru_cache(maxsize=64)
def _position_array(chunk_size: int, dim: int, dtype: str) -> np.ndarray:
    angle = np.arange(chunk_size - 1.0, -1.0, -1.0)[:, None] * 1e4 ** (-np.arange(0.0, dim, 2.0) / dim)
    return np.concatenate((np.sin(angle), np.cos(angle)), axis=1)[:, :dim].astype(dtype, order="C")
