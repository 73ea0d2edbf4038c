"""Several backward passes and one reduction of gradients across processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memory_models.segments import output_and_memory

Pairs = list[tuple[Tensor, Tensor | None]]


class Reduction:
    """When a model reduces its gradients: not in the passes under `off`, once in the pass under `on`.

    Args:
        model: one with `no_sync()`, as `DistributedDataParallel`, or any other, which needs none of this.

    Raises:
        ValueError: if DDP was built with `static_graph=True`.
    """

    def __init__(self, model: Any) -> None:
        self._no_sync = getattr(model, "no_sync", None)
        inner = getattr(model, "_orig_mod", model)
        self._ddp = inner if isinstance(inner, DistributedDataParallel) else None
        if self._ddp is not None and self._ddp.static_graph:
            raise ValueError(
                "DistributedDataParallel(static_graph=True) reduces at the end of its first backward pass, "
                "no_sync() or not; build it without static_graph for memory_replay"
            )

    def off(self) -> AbstractContextManager[Any]:
        """Forward and backward passes in here only add to the gradients of this process."""
        return nullcontext() if self._no_sync is None else self._no_sync()

    @contextmanager
    def on(self, outside: Pairs) -> Iterator[Callable[[Any], Pairs]]:
        """The forward pass in here is the one whose backward pass reduces.

        DDP waits for every parameter in that pass, but those that were used in the others only would not
        come: it is made to end at each of them, with a zero.

        Args:
            outside: tensors and gradients that the backward pass starts from too.

        Yields:
            A function from what the model returned to all there is to start from beside it.
        """
        ddp = self._ddp
        if ddp is None or not ddp.require_backward_grad_sync:
            yield lambda _: outside
            return
        waiting = [
            (parameter, torch.zeros_like(parameter[(0,) * parameter.dim()]).expand_as(parameter))
            for parameter in ddp.module.parameters()
            # A process that did not use a parameter may still leave it out where DDP looks for such.
            if parameter.requires_grad and (parameter.grad is not None or not ddp.find_unused_parameters)
        ]
        tensors, gradients = zip(*outside, *waiting, strict=True)

        def add(_: Any, __: Any, out: Any) -> _Anchored:
            output, memory = output_and_memory(out)
            return _Anchored(output, memory, _Anchor.apply(gradients, *tensors))

        handle = ddp.module.register_forward_hook(add)
        try:
            yield lambda out: [(out.anchor, None)]
        finally:
            handle.remove()


class _Anchored(NamedTuple):
    output: Any
    memory: Any
    anchor: Tensor


class _Anchor(torch.autograd.Function):
    """A zero whose backward pass hands given gradients to given tensors."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients
