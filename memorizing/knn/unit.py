"""Directions of vectors whose squares would leave the range of their dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest channels between which squares and their sum stay well within float32.
_LEAST, _MOST = 1e-12, 1e15


def unit(vectors: Tensor) -> Tensor:
    """`vectors` `[..., dim]` scaled to unit length; zero stays zero."""
    return F.normalize(_within_range(vectors)[0], dim=-1)


def inverse_lengths(vectors: Tensor) -> Tensor:
    """1 / |vector| of `[..., dim]`, `[...]`; 0 for zero."""
    moderate, factor = _within_range(vectors)
    length = moderate.norm(dim=-1)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    if factor is not None:
        inverse = (inverse / factor.squeeze(-1)).clamp(max=torch.finfo(inverse.dtype).max)
    return inverse


def _within_range(vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    # The same directions, and what the vectors were divided by, `[..., 1]`; None for ones everywhere.
    largest = torch.linalg.vector_norm(vectors.detach(), torch.inf, dim=-1, keepdim=True)
    extreme = (largest > 0) & ((largest < _LEAST) | (largest > _MOST))
    # Asking is cheap on a CPU and would wait for the queue elsewhere.
    if vectors.device.type == "cpu" and not extreme.any():
        return vectors, None
    factor = torch.where(extreme, largest, 1)
    return vectors / factor, factor
