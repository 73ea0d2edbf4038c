"""Memory replay: exact gradients through any number of segments with the activations of one.

Memory replay back-propagation (Wu et al., Memformer, arXiv:2010.06891, Algorithm 1): a first pass keeps only
the memories between the segments; then, from the last segment to the first, each is computed again from its
memory, and one backward pass takes the gradient of its loss and of the memory it left to its parameters and
to the memory it read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from memory_models.lm import MemoryLM
from memory_models.reduction import Pairs, Reduction
from memory_models.rewind import Rewind
from memory_models.segments import Segment, checked_segments, output_and_memory
from memory_models.stats import collect_stats, collecting

# Largest difference between two computations of one memory that is put down to rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class Replay(NamedTuple):
    """What a rollout came to; nothing here requires gradient.

    Attributes:
        loss: the sum over all segments.
        memory: the memory after the last segment, for the next rollout.
        losses: each segment's loss, None where there was none.
    """

    loss: Tensor
    memory: Any
    losses: tuple[Tensor | None, ...]


def memory_replay(
    model: Callable[..., Any],
    segments: Iterable[Tensor | Segment],
    loss_fn: Callable[[Any, int], Tensor | None],
    memory: Any = None,
    *,
    detach_every: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_memory_gradient: float | None = None,
    carry: Callable[..., Any] | None = None,
    generators: Sequence[torch.Generator] = (),
    check: bool = False,
) -> Replay:
    """Add to every `.grad` what back-propagation through the whole rollout would, a segment at a time.

    It stands for `unroll`, the sum of the losses and `backward()`: parameters, inputs that require gradient
    and the memory given get their gradients; calls accumulate until `zero_grad()`. All segments' memories
    are held, activations of one segment only, for the price of one more forward pass.

    Call it inside `torch.autocast` if the forward pass shall be; the backward pass runs outside. A model in
    `DistributedDataParallel` (wrap the whole model, not parts of it) reduces its gradients once, with the
    first segment's, and not at all inside `no_sync()`; parameters that no segment used then get zeros unless
    it was built with `find_unused_parameters=True`.

    Both passes see the same random numbers (torch, Python's `random`, NumPy) and the same buffers, and leave
    them as one forward pass does; an outside store is written once, as `commit` is called once a segment.
    Whatever else a forward pass changes is changed twice, and the buffers of a model that is not an
    `nn.Module` too. Numbers that `loss_fn` draws are drawn again by the next segment.

    Args:
        model: `output, memory = model(x, memory)`, taking `mask`, `reset` and `close` as keywords if a
            segment has them: a memory module, a language model (its output is the logits), several modules in
            series, a function. The memory is any pytree of tensors; a third value is refused but in a named
            tuple whose second field is `memory`. What has gradient and is computed once
            for several segments must come in through `x` or `memory`.
        segments: tensors `[batch, time, ...]` or `Segment`s; `Segment.cut` makes them of a long input. Pieces
            of an open segment (`close=False`) are segments here.
        loss_fn: from the output and the number of the segment, counted from 0, to a scalar, or None for no
            loss. It is called from the last segment to the first. Divide here to accumulate means.
        memory: where to go on; None starts afresh.
        detach_every: cut the gradient after every so many segments (truncated back-propagation through
            time); None: never.
        scaler: scales the losses, as it does in plain training; stepping and updating it is the caller's.
        clip_memory_gradient: largest norm, row by row, of the gradient that a segment hands to the one
            before it through the memory; None: as it is.
        carry: what to call instead of the model in the first pass, where only the memory counts, such as
            an encoder without its decoder. It must draw the random numbers that the model draws first. A
            language model's head is left out without being told.
        generators: random generators of the model's own.
        check: whether to compare the memories of both passes; for trying out a new model.

    Raises:
        TypeError: if `segments`, or what the model or `loss_fn` returns, is of the wrong kind.
        ValueError: if there is no segment, batch sizes differ, an option is out of range, a loss is not a
            scalar, no loss depends on anything that requires gradient, or DDP has a static graph.
        RuntimeError: if gradients are switched off, if `commit` returns a new tensor that requires gradient,
            or if `check` finds that the second pass differs from the first.
    """
    rollout = _Rollout(
        model=model,
        segments=checked_segments(segments),
        loss_fn=loss_fn,
        memory=memory,
        detach_every=detach_every,
        scaler=scaler,
        clip=clip_memory_gradient,
        carry=carry or _without_head(model) or model,
        check=check,
    )
    if detach_every is not None and detach_every < 1:
        raise ValueError(f"detach_every ({detach_every}) must be at least 1, or None for full gradients")
    if clip_memory_gradient is not None and not clip_memory_gradient > 0:
        raise ValueError(f"clip_memory_gradient ({clip_memory_gradient}) must be positive, or None")
    if not torch.is_grad_enabled():
        raise RuntimeError("memory_replay computes gradients; call it outside torch.no_grad()")
    return rollout.run(generators)


class _Rollout:
    def __init__(
        self,
        *,
        model: Callable[..., Any],
        segments: list[Segment],
        loss_fn: Callable[[Any, int], Tensor | None],
        memory: Any,
        detach_every: int | None,
        scaler: torch.amp.GradScaler | None,
        clip: float | None,
        carry: Callable[..., Any],
        check: bool,
    ) -> None:
        self.model = model
        self.segments = segments
        self.loss_fn = loss_fn
        self.detach_every = detach_every
        self.scaler = scaler
        self.clip = clip
        self.carry = carry
        self.check = check
        self.commit = _commit_of(model)
        self.reduction = Reduction(model)
        # Stand-ins collect the gradients of inputs that may share one graph, which can be run only once.
        self.inputs = [
            segment.x if index == 0 else _leaves(segment.x) for index, segment in enumerate(segments)
        ]
        # What each segment reads: leaves that require gradient where the memory itself would.
        self.memories: list[Any] = [memory]
        # With `check`, what each segment left, before it was committed.
        self.left: list[list[Any]] = []
        self.losses: list[Tensor | None] = [None] * len(segments)
        self.reached = False
        self.final: Any = None

    def run(self, generators: Sequence[torch.Generator]) -> Replay:
        last = len(self.segments) - 1
        devices = _devices(self.inputs, self.memories, self.model)
        self.rewind = Rewind(self.model if isinstance(self.model, nn.Module) else None, devices, generators)
        # A graph that saves nothing: it is there to tell which tensors of the memory carry gradient.
        with self.reduction.off(), torch.autograd.graph.saved_tensors_hooks(_forget, _forget):
            for index in range(last):
                self.rewind.mark()
                self._advance(index)
        if last:
            self.rewind.mark()
        # Autocast would go on with weights it cast for graphs that are gone.
        torch.clear_autocast_cache()
        try:
            gradient: list[Tensor | None] | None = None
            for index in reversed(range(last + 1)):
                gradient = self._replay(index, gradient)
        finally:
            self.rewind.finish()
            torch.clear_autocast_cache()
        if not self.reached:
            raise ValueError(
                "no loss depends on anything that requires gradient: loss_fn must return, for at least one "
                "segment, a loss computed from the output and not detached"
            )
        given = [loss for loss in self.losses if loss is not None]
        return Replay(torch.stack(given).sum(), self.final, tuple(self.losses))

    def _advance(self, index: int) -> None:
        segment = self.segments[index]
        _, after = output_and_memory(self.carry(self.inputs[index], self.memories[index], **segment.flags()))
        if self.check:
            self.left.append(_tensors(pytree.tree_map_only(Tensor, Tensor.detach, after)))
        cut = self.detach_every is not None and (index + 1) % self.detach_every == 0
        self.memories.append(_leaves(self._commit(segment, after), gradient=not cut))

    def _commit(self, segment: Segment, after: Any) -> Any:
        if segment.close is False or self.commit is None:
            return after
        kept = self.commit(after)
        for (path, leaf), old in zip(
            pytree.tree_flatten_with_path(kept)[0], pytree.tree_leaves(after), strict=True
        ):
            if leaf is not old and isinstance(leaf, Tensor) and leaf.requires_grad:
                raise RuntimeError(
                    f"commit returned a new tensor with gradient at {pytree.keystr(path)}; it is called once "
                    "and cannot be replayed: return the tensor it was given, or a detached one"
                )
        return kept

    def _replay(self, index: int, gradient: list[Tensor | None] | None) -> list[Tensor | None] | None:
        # A method of its own, so that nothing of this segment's graph is alive when the next is built.
        last = index == len(self.segments) - 1
        segment, memory = self.segments[index], self.memories.pop()
        with ExitStack() as stack:
            others: Callable[[Any], Pairs] = lambda _: []  # noqa: E731
            if index > 0:
                stack.enter_context(self.reduction.off())
            else:
                others = stack.enter_context(self.reduction.on(self._outside()))
            if not last:
                self.rewind.to(index)
                if collecting():
                    # The listener has heard it in the first pass.
                    stack.enter_context(collect_stats())
            out = self.model(self.inputs[index], memory, **segment.flags())
            output, after = output_and_memory(out)
            if last:
                self.final = pytree.tree_map_only(Tensor, Tensor.detach, self._commit(segment, after))
            elif self.check:
                self._compare(index, after)
            loss = self._loss(output, index)
            if last and index > 0:
                self.rewind.mark()
            roots: Pairs = []
            if loss is not None and loss.requires_grad:
                roots.append((loss if self.scaler is None else self.scaler.scale(loss), None))
            for leaf, at in zip(pytree.tree_leaves(after), gradient or (), strict=gradient is not None):
                if at is not None and leaf.requires_grad:
                    roots.append((leaf, at))
            self.reached |= bool(roots)
            roots += others(out)
            if roots:
                with _no_autocast(root for root, _ in roots):
                    torch.autograd.backward([root for root, _ in roots], [at for _, at in roots])
        return None if index == 0 else self._clipped([_gradient(leaf) for leaf in pytree.tree_leaves(memory)])

    def _loss(self, output: Any, index: int) -> Tensor | None:
        loss = self.loss_fn(output, index)
        if loss is None:
            return None
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a scalar tensor or None, got {type(loss)} for segment {index}"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)} for segment {index}; reduce it to a "
                "scalar, with .mean() or .sum()"
            )
        loss = loss.reshape(())
        self.losses[index] = loss.detach()
        return loss

    def _outside(self) -> Pairs:
        # Asked for before the first segment, which reads its own input and the caller's memory themselves.
        pairs: Pairs = []
        for segment, inputs in zip(self.segments[1:], self.inputs[1:], strict=True):
            for x, leaf in zip(_tensors(segment.x), _tensors(inputs), strict=True):
                if x.requires_grad and leaf.grad is not None:
                    pairs.append((x, leaf.grad))
        return pairs

    def _clipped(self, gradient: list[Tensor | None]) -> list[Tensor | None]:
        given = [at for at in gradient if at is not None]
        if self.clip is None or not given:
            return gradient
        limit = self.clip if self.scaler is None else self.clip * self.scaler.get_scale()
        wide = [at if at.dtype == torch.float64 else at.float() for at in given]
        squares = torch.stack([at.reshape(at.shape[0], -1).square().sum(1).to(wide[0]) for at in wide])
        factor = limit / squares.sum(0).sqrt().clamp(min=limit)
        return [
            None if at is None else (at * factor.view(-1, *[1] * (at.dim() - 1)).to(at.dtype))
            for at in gradient
        ]

    def _compare(self, index: int, after: Any) -> None:
        paths = [path for path, leaf in pytree.tree_flatten_with_path(after)[0] if isinstance(leaf, Tensor)]
        for path, now, before in zip(paths, _tensors(after), self.left.pop(), strict=True):
            tolerance = _TOLERANCE.get(before.dtype, 0.0)
            try:
                torch.testing.assert_close(
                    now.detach(), before, rtol=tolerance, atol=tolerance, equal_nan=True
                )
            except AssertionError as error:
                raise RuntimeError(
                    f"segment {index} left another memory{pytree.keystr(path)} when it was computed again: "
                    "the model draws random numbers that are not replayed (pass its generators), or changes "
                    f"something that is no buffer. {error}"
                ) from None


def _forget(_: Any) -> Any:
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _leaves(tree: Any, *, gradient: bool = True) -> Any:
    """The same values without their graph; those that required gradient do so again."""
    return pytree.tree_map_only(
        Tensor, lambda leaf: leaf.detach().requires_grad_(gradient and leaf.requires_grad), tree
    )


def _gradient(leaf: Any) -> Tensor | None:
    return leaf.grad if isinstance(leaf, Tensor) and leaf.requires_grad else None


def _commit_of(model: Any) -> Callable[[Any], Any] | None:
    """The `commit` of the module inside language models and wrappers."""
    while model is not None:
        if callable(getattr(model, "commit", None)):
            return model.commit
        model = getattr(model, "module", getattr(model, "_orig_mod", None))
    return None


def _without_head(model: Any) -> Callable[..., Any] | None:
    """A language model less its head, unless hooks or a subclass do more than it knows of."""
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is None:
        model = model.module
    if not isinstance(model, MemoryLM) or type(model).forward is not MemoryLM.forward:
        return None
    if model._forward_hooks or model._forward_pre_hooks:
        return None

    def carry(tokens: Tensor, memory: Any, *, mask: Tensor | None = None, **flags: Any) -> Any:
        if mask is not None:
            # As in `MemoryLM.forward`: padding may carry any id.
            tokens = torch.where(mask.bool(), tokens, 0)
        return model.module(model.embedding(tokens) * model.embedding_scale, memory, mask=mask, **flags)

    return carry


def _devices(*trees: Any) -> set[torch.device]:
    found = {leaf.device for tree in trees for leaf in _tensors(tree)}
    for tree in trees:
        if isinstance(tree, nn.Module):
            found |= {tensor.device for tensor in (*tree.parameters(), *tree.buffers())}
    return found


@contextmanager
def _no_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
    # Autocast must not reach the backward pass, whose types are those of the forward pass.
    with ExitStack() as stack:
        for kind in {tensor.device.type for tensor in tensors}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
