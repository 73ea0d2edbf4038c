"""Long streams: 10,000 segments, some rows reset at random, one never.

Nothing grows, nothing becomes infinite, and an old memory is as good as a young one: it takes in what is new,
and a reset leaves nothing of it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from benchmarks.controls.window import Window
from memory_models import MemoryModule, list_models
from tests.members import MEMBERS, small

# Rows 0 and 1 are reset now and then; row 2 never is.
ROWS, NEVER = 3, 2
# A segment at which rows remember some segments already.
YOUNG = 20
TINY: dict[str, dict[str, Any]] = {name: {"depth": 1} for name in MEMBERS}
OUTSIDE = {"depth": 1, "store": "outside", "pending_segments": 2, "memories": 16}
CASES = [*TINY.items(), ("memformer", {"depth": 1, "write": "gru"}), ("memorizing", OUTSIDE)]
# An allocator may keep a few pages more; a kilobyte a segment would be 8 MB. Of Python's objects, which
# tensors are too, there are exactly so many but for some caches.
MOST_GROWTH = 6 * 2**20
MOST_OBJECTS = 200


def tiny(name: str, options: dict[str, Any]) -> MemoryModule[Any]:
    sizes = {"heads": 1} if name != "gru" else {}
    return small(name, dim=8, segment_length=4, **sizes, **options)


def largest(memory: Any) -> float:
    """The largest number in the memory."""
    leaves = [leaf for leaf in memory.tensors().values() if leaf.is_floating_point() and leaf.numel()]
    return max(float(leaf.abs().max()) for leaf in leaves)


def answers(module: MemoryModule[Any], memory: Any) -> Tensor:
    """How far apart the outputs of a probe are, `[rows]`, after two different segments."""
    generator = torch.Generator().manual_seed(7)
    one, other, probe = torch.randn(3, ROWS, 4, module.dim, generator=generator)
    replies = []
    for segment in (one, other):
        now = module.commit(module(segment, memory)[1])
        replies.append(module(probe, now)[0])
    return (replies[0] - replies[1]).flatten(1).norm(dim=1)


def settled(process: psutil.Process) -> int:
    """Resident bytes without what is free: other tests of the process may have left holes to be filled."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return process.memory_info().rss


def soak(module: MemoryModule[Any], segments: int) -> None:
    """Go through `segments` segments; what the first fifth saw is the measure of the rest."""
    generator = torch.Generator().manual_seed(3)
    memory: Any = module.init_memory(ROWS)
    size, bound, young = memory.nbytes, 0.0, torch.zeros(ROWS)
    process, resident, objects = psutil.Process(), 0, 0
    for segment in range(segments):
        x = torch.randn(ROWS, 4, module.dim, generator=generator)
        reset = torch.rand(ROWS, generator=generator) < 0.02
        reset[NEVER] = False
        mask = None if segment % 3 else torch.rand(ROWS, 4, generator=generator) < 0.8
        y, memory = module(x, memory, mask=mask, reset=reset)
        memory = module.commit(memory)
        assert y.isfinite().all(), segment
        if segment == YOUNG:
            young = answers(module, memory)
        if segment == segments // 5:
            resident, objects = settled(process), len(gc.get_objects())
        if segment % 5 == 0:
            assert memory.nbytes == size, segment
            now = largest(memory)
            assert now < float("inf"), segment
            if segment < segments // 5:
                bound = max(bound, now)
            # Of normal numbers that have been seen so often the largest hardly moves.
            assert now <= 2 * bound, segment
    assert settled(process) - resident < MOST_GROWTH
    assert len(gc.get_objects()) - objects < MOST_OBJECTS
    check_old_memory(module, memory, young)


def check_old_memory(module: MemoryModule[Any], memory: Any, young: Tensor) -> None:
    """An old memory takes in what is new as a young one does, and none of it survives a reset."""
    old = answers(module, memory)
    if isinstance(module, Window):
        assert (old == 0).all()
    else:
        assert (old > 0.2 * young).all()
        assert (old > 1e-3).all()
    x = torch.randn(ROWS, 4, module.dim)
    y, after = module(x, memory, reset=torch.ones(ROWS, dtype=torch.bool))
    wanted, fresh = module(x)
    torch.testing.assert_close(y, wanted)
    for path, leaf in fresh.tensors().items():
        # Which rows of an outside store a stream has is none of the memory's content.
        if not path.endswith(("stream", "committed")):
            torch.testing.assert_close(after.tensors()[path], leaf, msg=path)


@pytest.mark.parametrize("name", list_models(tag="family"))
def test_forty_segments(name: str) -> None:
    with torch.no_grad():
        soak(tiny(name, TINY[name]), 40)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_ten_thousand_segments(name: str, options: dict[str, Any]) -> None:
    with torch.no_grad():
        soak(tiny(name, options), 10_000)
