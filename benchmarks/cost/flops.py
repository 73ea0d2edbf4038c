"""Operations of what torch's counter does not know: the families' own operators, and attention on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

Shape = Sequence[int]

# The module that defines an operator, and the operator's name; missing ones are another version's.
_OPERATORS = {
    "memorizing_attend": "memorizing.attend",
    "memorizing_attend_backward": "memorizing.attend",
    "htm_attend": "htm.attend",
    "htm_attend_backward": "htm.attend",
}


def flop_counter() -> FlopCounterMode:
    """A counter of all operations, a multiplication and an addition counted as two."""
    return FlopCounterMode(display=False, custom_mapping=_formulas())


def _formulas() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    for name, module in _OPERATORS.items():
        importlib.import_module(module)
        operator = getattr(torch.ops.memory_models, name, None)
        if operator is not None:
            found[operator] = _FORMULAS[name]
    aten = torch.ops.aten
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    ):
        operator = getattr(aten, name, None)
        if operator is not None and operator not in flop_registry:
            found[operator] = formula
    return found


def _memorizing(
    queries: Shape, keys: Shape, values: Shape, total: Shape, topk: int, *rest: Any, **_: Any
) -> int:
    batch, heads, asked, width = queries
    held = keys[2]
    return 2 * batch * heads * asked * (held * width + min(topk, held) * values[3])


def _memorizing_backward(
    grad: Any,
    log_grad: Any,
    keys: Shape,
    values: Shape,
    total: Shape,
    bias: Any,
    slots: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    batch, heads, asked, read = slots
    return 2 * batch * heads * asked * read * (values[3] + keys[3])


def _htm(
    queries: Shape,
    weights: Shape,
    chosen: Shape,
    tokens: Shape,
    positions: Any,
    places: Any,
    chunk_size: int,
    value_dim: int,
    *rest: Any,
    **_: Any,
) -> int:
    batch, asked, heads, width = queries
    return 2 * batch * asked * heads * chosen[2] * chunk_size * (width + value_dim)


def _htm_backward(
    grad: Shape,
    queries: Shape,
    weights: Shape,
    chosen: Shape,
    tokens: Shape,
    positions: Any,
    places: Any,
    kept: Any,
    chunk_size: int,
    value_dim: int,
    joint: bool,
    into_tokens: bool,
    *rest: Any,
    **_: Any,
) -> int:
    batch, asked, heads, width = queries
    read = 2 * batch * asked * heads * chosen[2] * chunk_size
    # The weights again, their gradient and the queries'; then the tokens' as keys and as values.
    return read * (2 * width + value_dim) + (read * (width + value_dim) if into_tokens else 0)


def _attention(queries: Shape, keys: Shape, values: Shape, *rest: Any, **_: Any) -> int:
    batch, heads, asked, width = queries
    return 2 * batch * heads * asked * keys[2] * (width + values[3])


def _attention_backward(grad: Shape, queries: Shape, keys: Shape, values: Shape, *rest: Any, **_: Any) -> int:
    batch, heads, asked, width = queries
    # The scores again, and gradients of queries, keys, weights and values.
    return 2 * batch * heads * asked * keys[2] * (3 * width + 2 * values[3])


_FORMULAS: dict[str, Callable[..., int]] = {
    "memorizing_attend": _memorizing,
    "memorizing_attend_backward": _memorizing_backward,
    "htm_attend": _htm,
    "htm_attend_backward": _htm_backward,
}
