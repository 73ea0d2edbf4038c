"""A segment with all that a model is told about it, and how a long input is cut into such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models.checks import check_flags, check_reset, check_tensor


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What a model is given at one step of a rollout."""

    x: Any
    """Input `[batch, time, ...]`; for models that take more, a dict or a tuple of tensors."""
    mask: Tensor | None = None
    """bool `[batch, time]`, false at padding."""
    reset: Tensor | None = None
    """bool `[batch]` or `[batch, time]`, true where a new document begins."""
    close: bool | Tensor = True
    """Whether the segment ends here, as in `MemoryModule.forward`."""

    @classmethod
    def cut(
        cls, x: Tensor, length: int, *, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> list[Self]:
        """Cut a long input `[batch, time, ...]` into segments of `length` tokens, the last one ragged.

        Labels are cut alike by `labels.split(length, dim=1)`. The cut is the same for all rows: padding
        behind a row's tokens changes nothing, padding before or between them moves its segments' ends
        (`unroll` counts each row's own tokens).

        Raises:
            TypeError: if `x` is no tensor, or `mask` or `reset` not boolean.
            ValueError: if shapes or devices disagree or `length` is less than 1.
        """
        check_tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"cut takes x [batch, time, ...], got {tuple(x.shape)}")
        if length < 1:
            raise ValueError(f"length ({length}) must be at least 1")
        batch, time = x.shape[:2]
        check_flags("mask", mask, (batch, time), x.device)
        check_reset(reset, batch, time, x.device)
        pieces = x.split(length, dim=1)
        masks = [None] * len(pieces) if mask is None else mask.split(length, dim=1)
        resets: Sequence[Tensor | None] = [None] * len(pieces)
        if reset is not None:
            resets = [reset, *resets[1:]] if reset.dim() == 1 else reset.split(length, dim=1)
        return [cls(x=piece, mask=masks[index], reset=resets[index]) for index, piece in enumerate(pieces)]

    def flags(self) -> dict[str, Any]:
        """The keywords that say something, so that a plain `f(x, memory)` can be a model."""
        given = {"mask": self.mask, "reset": self.reset, "close": None if self.close is True else self.close}
        return {name: value for name, value in given.items() if value is not None}


def checked_segments(segments: Iterable[Tensor | Segment]) -> list[Segment]:
    """The segments of a rollout as a list, tensors wrapped.

    Raises:
        TypeError: if they are one tensor, or one of them is neither a tensor nor a `Segment`.
        ValueError: if there is none, or they differ in their number of rows.
    """
    if isinstance(segments, Tensor):
        raise TypeError(
            f"segments is one tensor {tuple(segments.shape)}; cut it along the time with "
            "Segment.cut(x, length)"
        )
    checked: list[Segment] = []
    for index, segment in enumerate(segments):
        if not isinstance(segment, Tensor | Segment):
            raise TypeError(f"segment {index} must be a tensor or a Segment, got {type(segment)}")
        checked.append(Segment(x=segment) if isinstance(segment, Tensor) else segment)
        first, now = _rows(checked[0]), _rows(checked[-1])
        if now != first:
            raise ValueError(f"segment {index} has {now} rows, segment 0 has {first}")
    if not checked:
        raise ValueError("memory_replay needs at least one segment, got none")
    return checked


def output_and_memory(out: Any) -> tuple[Any, Any]:
    """The two things that a model of a rollout returns.

    Args:
        out: a pair, or a named tuple whose second field is `memory`, as language models return it.

    Raises:
        TypeError: if it is anything else. Of a tensor the first two rows would be taken for the two.
    """
    named = isinstance(out, tuple) and getattr(out, "_fields", ())[1:2] == ("memory",)
    if named or (isinstance(out, tuple | list) and len(out) == 2):
        return out[0], out[1]
    seen = f"a {type(out).__name__}"
    if isinstance(out, Tensor):
        seen += f" of shape {tuple(out.shape)}"
    elif isinstance(out, tuple | list):
        seen += f" of {len(out)}: {', '.join(type(part).__name__ for part in out)}"
    raise TypeError(f"the model must return (output, memory), got {seen}; wrap it in a function that does")


def _rows(segment: Segment) -> int | None:
    return next(
        (leaf.shape[0] for leaf in pytree.tree_leaves(segment.x) if isinstance(leaf, Tensor) and leaf.dim()),
        None,
    )
