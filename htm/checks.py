"""What may be given to the HTM read, and what the message says otherwise."""

import torch
from torch import Tensor

from memory_models.checks import check_shape, check_tensor


def check_floating(
    name: str, tensor: Tensor, axes: tuple[str, ...], expected: tuple[int | None, ...]
) -> None:
    """A tensor of floating point with axes of the `expected` lengths, None for any length.

    Raises:
        TypeError: if it is no tensor.
        ValueError: naming the tensor, what it is and what it must be.
    """
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}; embed or convert it first")
    check_shape(name, tensor, axes, expected)


def check_mask(name: str, mask: Tensor, axes: tuple[str, ...], expected: tuple[int | None, ...]) -> None:
    """A bool mask with axes of the `expected` lengths.

    Raises:
        TypeError: if it is no tensor.
        ValueError: naming the tensor, what it is and what it must be.
    """
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be bool, true where reading is allowed, got {mask.dtype}; use {name}.bool()"
        )
    check_shape(name, mask, axes, expected)
