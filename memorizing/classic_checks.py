"""What the classic `MemorizingTransformer` accepts: arguments, tokens, stores and published weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from memorizing.knn import KNNMemory
from memorizing.knn.checks import whole
from memory_models.checks import check_ids, check_tensor
from memory_models.lm import IGNORED_LABEL

if TYPE_CHECKING:
    from memorizing.classic import MemorizingTransformer

T = TypeVar("T")


def load_published(model: MemorizingTransformer, state_dict: Mapping[str, Tensor]) -> MemorizingTransformer:
    """Copy weights of memorizing-transformers-pytorch's class of the same name into `model`.

    The outputs then agree to rounding wherever the package is not at fault (docs/memorizing-published.md).

    Args:
        model: built with the published model's arguments.
        state_dict: as saved by memorizing-transformers-pytorch.

    Returns:
        `model` itself.

    Raises:
        ValueError: if a weight is missing, unknown or of another shape; nothing is loaded then.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"not the weights of such a model: missing {missing}, unknown {unknown}; build it with the "
            "published model's depth and memorizing_layers"
        )
    for name, weight in own.items():
        if state_dict[name].shape != weight.shape:
            raise ValueError(
                f"{name} has shape {list(state_dict[name].shape)}, this model needs {list(weight.shape)}: "
                "build it with the published model's num_tokens, dim, dim_head, heads and ff_mult"
            )
    if model.shift_knn_memories_down % max(1, model.num_memory_layers):
        warnings.warn(
            "the published package ignores shift_knn_memories_down: weights trained with it were trained "
            "without a shift; build the model with 0 for the same outputs",
            stacklevel=2,
        )
    model.load_state_dict(state_dict)
    return model


def layer_numbers(name: str, chosen: int | Iterable[int], depth: int) -> tuple[int, ...]:
    """Layers in order, each once; as in the published package those that do not exist are left out."""
    numbers = (
        {whole(name, chosen, least=0)}
        if isinstance(chosen, int)
        else {whole(name, n, least=0) for n in chosen}
    )
    outside = sorted(number for number in numbers if not 1 <= number <= depth)
    if outside:
        warnings.warn(f"{name}: {outside} are left out, layers are 1 to {depth}", stacklevel=3)
    return tuple(sorted(numbers.difference(outside)))


def shift_number(name: str, value: float) -> int:
    # The published default is the float 0.
    return whole(name, int(value) if isinstance(value, float) and value.is_integer() else value, least=0)


def shifted(memories: dict[int, T], shift: int) -> dict[int, T]:
    """For each layer the memory of the one `shift` places further on, the first following the last."""
    items = list(memories.values())
    return {layer: items[(index + shift) % len(items)] for index, layer in enumerate(memories)}


def check_tokens(x: Tensor, labels: Tensor | None, number: int | None) -> None:
    """Tokens `[batch, time]` below `number`, and labels of the same shape, -100 where none is asked."""
    check_ids("x", x, number)
    if x.shape[1] == 0:
        raise ValueError(f"x must be [batch, time] with at least one token, got {list(x.shape)}")
    if labels is None:
        return
    check_tensor("labels", labels, x.device)
    check_ids("labels", torch.where(labels == IGNORED_LABEL, 0, labels), number)
    if labels.shape != x.shape:
        raise ValueError(f"labels are {list(labels.shape)}, x is {list(x.shape)}: one label for each token")


def check_stores(stores: Sequence[KNNMemory], layers: int, batch: int) -> None:
    if len(stores) != layers:
        raise ValueError(
            f"{layers} memorizing layers need as many knn_memories, got {len(stores)}: pass "
            "create_knn_memories(batch_size=...), within its context"
        )
    for store in stores:
        rows = len(store._scope)
        if rows != batch:
            raise ValueError(
                f"x has {batch} rows, knn_memories have {rows}: create them with batch_size={batch}, or "
                "choose rows with knn_memories.at_batch_indices"
            )
        if store.metric == "l2":
            raise ValueError("knn_memories must be searched by metric 'ip' or 'cosine', got 'l2'")
