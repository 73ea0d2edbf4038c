"""A memory is a value: a frozen dataclass of tensors, one row for each stream of the batch.

`@memory_state` makes the class frozen and keyword-only and registers it as a torch pytree node, so that
DDP, FSDP2, `torch.compile` and `torch.export` see its tensors. Every tensor leaf is `[batch, ...]`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models.checks import check_tensor

_STATIC = "memory_models_static"
_ADDRESS = "memory_models_address"


def static(**options: Any) -> Any:
    """Declare a field that is not a tensor (a length, a name): it travels in the pytree's context."""
    return dataclasses.field(metadata={_STATIC: True}, **options)


def address() -> Any:
    """Declare a tensor that says where an outside store keeps a row: equal streams may differ in it."""
    return dataclasses.field(metadata={_ADDRESS: True})


def is_static(field: dataclasses.Field[Any]) -> bool:
    """Whether a memory's field was declared with `static`."""
    return bool(field.metadata.get(_STATIC))


class Memory:
    """Base of every memory. Subclasses carry `@memory_state`; nothing here writes in place."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same memory with `fn` applied to every tensor leaf."""
        return pytree.tree_map(fn, self)

    def detach(self) -> Self:
        """Cut the gradient at this point of the stream (truncated back-propagation)."""
        return self.map(Tensor.detach)

    def to(
        self,
        device: torch.device | str | int | torch.dtype | Memory | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """As `Tensor.to`: `to(device)`, `to(dtype)`, `to(device, dtype)` or `to(other)`.

        After a module was moved or converted, `memory.to(module.init_memory(1))` is a memory that it takes:
        some members keep some leaves in float32 whatever their weights are in.

        Args:
            device: where to; or the dtype; or a memory of the same kind, whose leaves' devices and dtypes are
                taken one by one.
            dtype: of floating leaves; counters and masks keep theirs.

        Raises:
            TypeError: if the dtype is not a floating one, or `other` another module's memory.
            ValueError: if `other` comes from a module with other options.
        """
        if isinstance(device, Memory) and dtype is None:
            return self._like(device)
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        if device is not None and not isinstance(device, torch.device | str | int):
            raise TypeError(f"a memory goes to a device, a dtype or a memory, got {device!r} and {dtype!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating one, got {dtype!r}: counters and masks keep theirs")

        def move(leaf: Tensor) -> Tensor:
            return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

        return self.map(move)

    def _like(self, other: Memory) -> Self:
        theirs = other.tensors()
        _check_same_leaves(self, other)
        leaves = [leaf.to(theirs[path].device, theirs[path].dtype) for path, leaf in self.tensors().items()]
        moved = pytree.tree_unflatten(leaves, pytree.tree_structure(self))
        check_same_structure(moved.map(_no_rows), other.map(_no_rows))
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares nothing.

        Raises:
            RuntimeError: if a leaf is part of a graph, which cannot be copied.
        """
        for path, leaf in self.tensors().items():
            if not leaf.is_leaf:
                raise RuntimeError(
                    f"the memory's {path} has a gradient to earlier segments, which deepcopy cannot copy; "
                    "copy memory.detach(), or use memory.map(torch.clone) to stay in the graph"
                )
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            object.__setattr__(made, name, copy.deepcopy(value, memo))
        return made

    def select(self, rows: Tensor) -> Self:
        """The rows at int64 indices `rows` `[n]`, repeats allowed: beam search, forks, subsets.

        Raises:
            TypeError: if `rows` is not a one-dimensional integer tensor.
        """
        _check_rows(rows)
        return self.map(lambda leaf: leaf.index_select(0, rows.to(leaf.device)))

    def replace(self, rows: Tensor, other: Self) -> Self:
        """The same memory with its rows at int64 indices `rows` `[n]`, no repeats, taken from `other`.

        For few rows of a large memory this is several times cheaper than `where`.

        Args:
            rows: places in this memory.
            other: of `n` rows.

        Raises:
            TypeError: if `rows` is not a one-dimensional integer tensor.
            ValueError: if `other` has another number of rows, or the structures differ.
        """
        _check_rows(rows)
        if not isinstance(other, Memory):
            raise TypeError(f"other must be a memory, got {type(other).__name__}")
        if other.batch_size != len(rows):
            raise ValueError(f"{len(rows)} rows cannot be taken from a memory of {other.batch_size}")
        check_same_structure(self.map(_no_rows), other.map(_no_rows))

        # A copy, not a product: a NaN in a row that is replaced must not survive.
        def put(mine: Tensor, theirs: Tensor) -> Tensor:
            return mine.index_copy(0, rows.to(mine.device, torch.int64), theirs)

        return pytree.tree_map(put, self, other)

    def where(self, keep: Tensor, other: Self) -> Self:
        """Row by row: this memory where bool `keep` `[batch]` is true, `other` elsewhere.

        Raises:
            TypeError: if `keep` is not boolean.
            ValueError: if the shapes or the structures differ.
        """
        check_tensor("keep", keep)
        if keep.dtype != torch.bool:
            raise TypeError(f"keep must be a bool tensor, got {keep.dtype}")
        if keep.shape != (self.batch_size,):
            raise ValueError(f"keep has shape {tuple(keep.shape)}, the memory has {self.batch_size} rows")
        check_same_structure(self, other)

        # where, not multiply: a NaN in a row that is left out must not survive.
        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(keep.to(mine.device).view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return pytree.tree_map(pick, self, other)

    def tensors(self) -> dict[str, Tensor]:
        """The leaves by path, such as `layers.0.keys`."""
        pairs, _ = pytree.tree_flatten_with_path(self)
        return {".".join(_part(key) for key in path): leaf for path, leaf in pairs}

    def addresses(self) -> set[str]:
        """Paths of the leaves that were declared with `address`."""
        pairs, _ = pytree.tree_flatten_with_path(self)
        return {".".join(_part(key) for key in path) for path, _ in pairs if _is_address(self, path)}

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return next(iter(pytree.tree_leaves(self))).shape[0]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`: tokens of the open segment, not yet written. Zero for members without one."""
        return torch.zeros(
            self.batch_size, dtype=torch.int64, device=next(iter(pytree.tree_leaves(self))).device
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by all leaves."""
        return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(self))

    def __iter__(self) -> Iterator[Any]:
        # Without this a stray `y, memory = memory` would fail in a puzzling way.
        raise TypeError(f"{type(self).__name__} is one value; read its fields or .tensors()")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {_shape(leaf)}" for name, leaf in self.tensors().items())
        return f"{type(self).__name__}({fields})"


T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(static, address))
def memory_state(cls: type[T]) -> type[T]:
    """Make `cls` (a subclass of `Memory`) a frozen keyword-only dataclass and a pytree node.

    Fields are tensors `[batch, ...]`, other memories, or tuples of these; others are marked `static()`.
    """
    if not issubclass(cls, Memory):
        raise TypeError(f"{cls.__name__} must subclass Memory")
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)(cls)
    names = [field.name for field in dataclasses.fields(made) if not is_static(field)]
    fixed = [field.name for field in dataclasses.fields(made) if is_static(field)]

    def flatten(memory: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(memory, n) for n in names], tuple(getattr(memory, n) for n in fixed)

    def flatten_with_keys(memory: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return (
            [(pytree.GetAttrKey(n), getattr(memory, n)) for n in names],
            tuple(getattr(memory, n) for n in fixed),
        )

    def unflatten(leaves: Any, context: tuple[Any, ...]) -> Any:
        return made(**dict(zip(names, leaves, strict=True)), **dict(zip(fixed, context, strict=True)))

    pytree.register_pytree_node(
        made,
        flatten,
        unflatten,
        serialized_type_name=f"{made.__module__}.{made.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return made


def _check_rows(rows: Tensor) -> None:
    check_tensor("rows", rows)
    if rows.dtype not in (torch.int64, torch.int32) or rows.dim() != 1:
        raise TypeError(
            f"rows must be a one-dimensional int64 tensor of row indices, got {rows.dtype} with shape "
            f"{tuple(rows.shape)}; turn a boolean mask into indices with mask.nonzero().squeeze(1)"
        )


def _no_rows(leaf: Tensor) -> Tensor:
    return leaf[:0]


def check_same_structure(one: Memory, other: Memory) -> None:
    """Refuse two memories of different kinds, configurations or shapes (the batch included).

    Raises:
        TypeError: if `other` is not a memory of the same class.
        ValueError: if static fields, paths, shapes or dtypes differ; the message names the first.
    """
    _check_same_leaves(one, other)
    mine, theirs = one.tensors(), other.tensors()
    for name, leaf in mine.items():
        if leaf.shape != theirs[name].shape or leaf.dtype != theirs[name].dtype:
            raise ValueError(
                f"{name} is {_shape(leaf)} in one memory and {_shape(theirs[name])} in the other"
            )
    if pytree.tree_structure(one) != pytree.tree_structure(other):
        raise ValueError(f"the {type(one).__name__}s differ in their static fields")


def _check_same_leaves(one: Memory, other: Memory) -> None:
    if type(one) is not type(other):
        raise TypeError(f"expected a {type(one).__name__}, got {type(other).__name__}")
    odd = sorted(one.tensors().keys() ^ other.tensors().keys())
    if odd:
        raise ValueError(f"the memories hold different tensors: {', '.join(odd)}")


def cat(memories: Sequence[Memory]) -> Any:
    """Join memories along the batch.

    Raises:
        TypeError: if one of them is no memory.
        ValueError: if there is none, or if anything but the number of rows differs.
    """
    if not memories:
        raise ValueError("cat needs at least one memory")
    for memory in memories:
        if not isinstance(memory, Memory):
            raise TypeError(f"cat takes memories, got a {type(memory).__name__}")
    first = memories[0]
    empty = torch.zeros(0, dtype=torch.int64)
    for memory in memories[1:]:
        check_same_structure(first.select(empty), memory.select(empty))
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *memories)


def _is_address(memory: Memory, path: Sequence[Any]) -> bool:
    owner: Any = memory
    for key in path[:-1]:
        owner = key.get(owner)
    return isinstance(owner, Memory) and any(
        field.name == _part(path[-1]) and field.metadata.get(_ADDRESS)
        for field in dataclasses.fields(owner)  # type: ignore[arg-type]
    )


def _part(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _shape(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
