"""What users give: what may be given, and the message otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_sizes(*, least: int = 1, **sizes: int) -> None:
    """Refuse a size below `least` with a `ValueError` that names it."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} ({size}) must be at least {least}")


def check_heads(dim: int, **heads: int) -> None:
    """Refuse numbers of heads that do not divide `dim` with a `ValueError` that names them."""
    for name, number in heads.items():
        if number < 1 or dim % number:
            raise ValueError(f"dim ({dim}) must be divisible by {name} ({number})")


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    """Refuse what is no tensor (`TypeError`), or one on another device (`ValueError`)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name} is on {value.device}, the input on {device}; use {name}.to({str(device)!r})"
        )


def check_flags(
    name: str, flags: Tensor | None, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """Refuse flags that are no bool tensor (`TypeError`), of another shape or elsewhere (`ValueError`)."""
    if flags is None:
        return
    if not isinstance(flags, Tensor):
        raise TypeError(f"{name} must be a bool tensor {list(shape)}, got {type(flags).__name__}")
    if flags.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {flags.dtype}")
    if tuple(flags.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(flags.shape)}, expected {shape}")
    check_tensor(name, flags, device)


def check_reset(reset: Tensor | None, batch: int, time: int, device: torch.device | None = None) -> None:
    """As `check_flags`, for a reset `[batch]` or `[batch, time]`."""
    once = isinstance(reset, Tensor) and reset.dim() == 1
    check_flags("reset", reset, (batch,) if once else (batch, time), device)


def check_ids(name: str, ids: Tensor, number: int | None) -> None:
    """Refuse what are not token ids `[batch, time]` below `number` (None: of any size).

    The values are looked at where that is free: on the CPU, outside a compiled graph.

    Raises:
        TypeError: if they are not an integer tensor.
        ValueError: if the shape is another, or an id lies outside the vocabulary.
    """
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{name} must be [batch, time], got {tuple(ids.shape)}")
    # Reading values back from an accelerator would wait for it at every step.
    if number is None or torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    bad = (ids < 0) | (ids >= number)
    if bool(bad.any()):
        raise ValueError(f"{name} hold {int(ids[bad][0])}, outside the vocabulary (0 to {number - 1})")


def check_shape(name: str, tensor: Tensor, axes: tuple[str, ...], expected: tuple[int | None, ...]) -> None:
    """A tensor with axes of the `expected` lengths, None for any length; `axes` are their names.

    Raises:
        TypeError: if it is no tensor.
        ValueError: naming the tensor, what it is and what it must be.
    """
    check_tensor(name, tensor)
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected)
    fits = fits and all(want is None or have == want for have, want in zip(shape, expected, strict=True))
    if not fits:
        wanted = [
            axis if want is None else f"{axis}={want}" for axis, want in zip(axes, expected, strict=True)
        ]
        raise ValueError(f"{name} must have shape [{', '.join(wanted)}], got {list(shape)}")


def check_counts(
    name: str, counts: Tensor, axes: tuple[str, ...], expected: tuple[int | None, ...], *, most: int
) -> None:
    """Integers with axes of the `expected` lengths, each in 0 to `most`.

    Their range is looked at where that is cheap: on a CPU, and outside of graphs.

    Raises:
        TypeError: if they are no tensor.
        ValueError: naming the tensor, what it is and what it must be.
    """
    check_tensor(name, counts)
    if counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {counts.dtype}")
    check_shape(name, counts, axes, expected)
    if counts.device.type != "cpu" or torch.compiler.is_compiling() or counts.numel() == 0:
        return
    least, largest = (int(value) for value in counts.aminmax())
    if least < 0 or largest > most:
        raise ValueError(f"{name} must lie in 0 to {most}, got {least if least < 0 else largest}")
