"""Back-propagation through a whole rollout the obvious way: one graph, one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def full_graph(
    model: Any,
    segments: list[Any],
    loss_fn: Callable[[Any, int], Tensor | None],
    memory: Any = None,
    *,
    detach_every: int | None = None,
    commit: Callable[[Any], Any] = lambda memory: memory,
) -> tuple[Tensor, Any]:
    """The sum of the losses, after its backward pass, and the last memory, which keeps its graph."""
    outputs = []
    for index, segment in enumerate(segments):
        x, flags = (segment, {}) if isinstance(segment, Tensor) else (segment.x, segment.flags())
        if detach_every is not None and index > 0 and index % detach_every == 0:
            memory = pytree.tree_map(torch.detach, memory)
        out = model(x, memory, **flags)
        outputs.append(out[0])
        memory = commit(out[1]) if flags.get("close", True) is not False else out[1]
    losses = [loss_fn(output, index) for index, output in enumerate(outputs)]
    loss: Any = sum(loss for loss in losses if loss is not None)
    loss.backward()
    return loss.detach(), memory
