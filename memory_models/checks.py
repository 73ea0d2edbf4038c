"""Sizes that users give: what may be given, and the message otherwise."""

from __future__ import annotations


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
