"""What a user may pass, and what the message says otherwise."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor


def whole(name: str, value: object, *, least: int) -> int:
    """An integer not below `least`.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def row_numbers(rows: int | Iterable[int] | Tensor, num_indices: int) -> tuple[int, ...]:
    """Rows as numbers: an integer, several, an integer tensor, or a bool tensor with one entry a row.

    Raises:
        IndexError: if a row does not exist.
        TypeError: if they are no integers.
        ValueError: if a row is named twice, or a bool tensor has the wrong length.
    """
    if isinstance(rows, Tensor):
        if rows.dtype == torch.bool:
            if rows.shape != (num_indices,):
                raise ValueError(
                    f"a bool tensor of rows must have shape ({num_indices},), got {tuple(rows.shape)}"
                )
            rows = rows.nonzero().squeeze(1)
        elif rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"rows must be integers, got a tensor of {rows.dtype}")
        numbers = rows.flatten().tolist()
    elif isinstance(rows, Iterable):
        numbers = [whole("a row", row, least=-(2**62)) for row in rows]
    else:
        numbers = [whole("rows", rows, least=-(2**62))]
    for number in numbers:
        if not 0 <= number < num_indices:
            raise IndexError(f"there is no row {number}: rows are 0 to {num_indices - 1}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"a row may be named only once, got {numbers}")
    return tuple(numbers)


def floating(name: str, tensor: Tensor, shape: tuple[int | None, ...], legend: str) -> None:
    """A floating tensor of the given shape, where None stands for any length.

    Raises:
        TypeError: if it is no tensor, or not of floating point.
        ValueError: if the shape differs.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {legend}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of floating point, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must be {legend} = [{wanted}], got {list(tensor.shape)}")


def queries(queries: Tensor, *, rows: int, dim: int) -> None:
    """Queries `[rows, ..., dim]` of floating point.

    Raises:
        TypeError: if they are no tensor, or not of floating point.
        ValueError: if the shape differs.
    """
    any_length = (None,) * (queries.dim() - 2) if isinstance(queries, Tensor) else ()
    floating("queries", queries, (rows, *any_length, dim), "[batch, ..., dim]")


def scale(scale: Tensor | float, shape: torch.Size) -> None:
    """A number, or a tensor that broadcasts to `shape`.

    Raises:
        TypeError: if it is neither.
        ValueError: if it does not broadcast.
    """
    if not isinstance(scale, Tensor | int | float):
        raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
    if isinstance(scale, Tensor):
        fits = scale.dim() <= len(shape) and all(
            have in (1, want) for have, want in zip(reversed(scale.shape), reversed(shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"scale is {list(scale.shape)}, which does not broadcast to the queries' {list(shape)}"
            )


def ids(ids: Tensor, *, rows: int) -> None:
    """Ids `[rows, ...]`, int64.

    Raises:
        TypeError: if they are no such tensor.
        ValueError: if the shape differs.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError("ids must be an int64 tensor, as lookup() returns it")
    if ids.dim() == 0 or ids.shape[0] != rows:
        raise ValueError(f"ids must be [batch, ...] with batch {rows}, got {list(ids.shape)}")


def finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity: one such key would be found by every query, or spoil its neighbours' block.

    Raises:
        ValueError: naming how many there are.
    """
    # One NaN or infinity spoils the sum, which is forty times faster than looking at each number; but large
    # numbers may overflow it, too.
    if not math.isfinite(tensor.sum(dtype=torch.float64)) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{bad} numbers among the {name} are NaN or infinite in {tensor.dtype}; nothing was added"
        )
