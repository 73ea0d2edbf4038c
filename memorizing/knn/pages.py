"""Room for large results, on huge pages where the system has them.

A result of some tens of megabytes gets fresh pages from the system at every call; with pages of 4 KiB,
claiming them costs four times the gathering itself.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

_FROM_BYTES = 8 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; a large one on the CPU is asked for in huge pages."""
    nbytes = math.prod(shape) * dtype.itemsize
    if _ADVICE is None or device.type != "cpu" or nbytes < _FROM_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    # A private mapping: a shared one (mmap's default) gets no huge pages.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(_ADVICE)
    except OSError:  # a kernel without them
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
