"""A memory is a value: rows can be taken, joined and chosen, and nothing is written in place."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models import Memory, cat, memory_state, static


@memory_state
class Layer(Memory):
    keys: Tensor
    count: Tensor


@memory_state
class Stack(Memory):
    layers: tuple[Layer, ...]
    flag: Tensor
    width: int = static()
    label: str = static(default="none")


ROWS = 4


def stack(rows: int = ROWS, *, width: int = 3, label: str = "none", seed: int = 0) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    return Stack(
        layers=tuple(
            Layer(
                keys=torch.randn(rows, 2, width, generator=generator),
                count=torch.randint(9, (rows,), generator=generator),
            )
            for _ in range(2)
        ),
        flag=torch.rand(rows, generator=generator) < 0.5,
        width=width,
        label=label,
    )


def assert_same(one: Memory, other: Memory) -> None:
    assert pytree.tree_structure(one) == pytree.tree_structure(other)
    theirs = other.tensors()
    for path, leaf in one.tensors().items():
        assert leaf.dtype == theirs[path].dtype
        assert torch.equal(leaf, theirs[path]), path


def test_leaves_are_named_by_path() -> None:
    memory = stack()
    named = memory.tensors()
    assert list(named) == [
        "layers.0.keys",
        "layers.0.count",
        "layers.1.keys",
        "layers.1.count",
        "flag",
    ]
    assert named["layers.1.keys"] is memory.layers[1].keys


def test_batch_size_and_bytes() -> None:
    # Two layers of 2 x 3 float32 and one int64, and one bool.
    assert stack().batch_size == ROWS
    assert stack().nbytes == ROWS * (2 * (2 * 3 * 4 + 8) + 1)
    assert stack(0).nbytes == 0


def test_map_changes_each_leaf_and_keeps_the_static_fields() -> None:
    memory = stack(label="old")
    doubled = memory.map(lambda leaf: leaf + leaf if leaf.dtype != torch.bool else ~leaf)
    assert (doubled.width, doubled.label) == (3, "old")
    assert torch.equal(doubled.layers[1].count, 2 * memory.layers[1].count)
    assert torch.equal(doubled.flag, ~memory.flag)


def test_detach_cuts_the_gradient_and_shares_the_values() -> None:
    memory = stack().map(lambda leaf: leaf.clone().requires_grad_() if leaf.is_floating_point() else leaf)
    detached = memory.detach()
    assert memory.layers[0].keys.requires_grad
    assert not any(leaf.requires_grad for leaf in detached.tensors().values())
    assert_same(detached, memory.map(lambda leaf: leaf.clone().detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_casts_floating_leaves_only(dtype: torch.dtype) -> None:
    memory = stack()
    cast = memory.to(dtype=dtype)
    assert cast.layers[0].keys.dtype == dtype
    assert cast.layers[0].count.dtype == torch.int64
    assert cast.flag.dtype == torch.bool
    assert memory.layers[0].keys.dtype == torch.float32
    assert torch.equal(cast.layers[0].keys, memory.layers[0].keys.to(dtype))


def test_to_moves_all_leaves() -> None:
    moved = stack().to("meta")
    assert {leaf.device.type for leaf in moved.tensors().values()} == {"meta"}
    assert_same(stack().to(), stack())


@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 1], [], [3, 2, 1, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_select_takes_rows(rows: list[int], dtype: torch.dtype) -> None:
    memory = stack()
    chosen = memory.select(torch.tensor(rows, dtype=dtype))
    assert chosen.batch_size == len(rows)
    for path, leaf in chosen.tensors().items():
        for place, row in enumerate(rows):
            assert torch.equal(leaf[place], memory.tensors()[path][row])


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False, True, False]), torch.tensor([[0, 1]]), torch.tensor([0.0])]
)
def test_select_refuses_what_is_no_index(rows: Tensor) -> None:
    with pytest.raises(TypeError, match=r"row indices.*mask\.nonzero\(\)\.squeeze\(1\)"):
        stack().select(rows)


def test_select_refuses_a_row_that_is_not_there() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        stack().select(torch.tensor([ROWS]))


def test_replace_takes_the_rows_of_another_memory() -> None:
    one, other, rows = stack(seed=0), stack(2, seed=1), torch.tensor([3, 1])
    before = {path: leaf.clone() for path, leaf in one.tensors().items()}
    mixed = one.replace(rows, other)
    for path, leaf in mixed.tensors().items():
        theirs = other.tensors()[path]
        assert torch.equal(leaf, torch.stack((before[path][0], theirs[1], before[path][2], theirs[0])))
        assert torch.equal(one.tensors()[path], before[path])


def test_replace_lets_neither_nan_nor_gradient_of_the_old_row_through() -> None:
    one, other = stack(), stack(1, seed=1)
    one.layers[0].keys[2] = torch.nan
    one.layers[0].keys.requires_grad_()
    other.layers[0].keys.requires_grad_()
    keys = one.replace(torch.tensor([2]), other).layers[0].keys
    keys.square().sum().backward()
    gradient = one.layers[0].keys.grad
    assert gradient is not None
    assert torch.equal(gradient[2], torch.zeros(2, 3))
    assert torch.equal(gradient[:2], 2 * one.layers[0].keys.detach()[:2])
    assert torch.equal(other.layers[0].keys.grad, 2 * other.layers[0].keys.detach())


@pytest.mark.parametrize(
    ("rows", "other", "error", "message"),
    [
        (torch.tensor([True, False, False, False]), stack(1), TypeError, "turn a boolean mask into indices"),
        (torch.tensor([0, 1]), stack(3), ValueError, "2 rows cannot be taken from a memory of 3"),
        (torch.tensor([0]), stack(1, width=5), ValueError, r"layers\.0\.keys is"),
        (torch.tensor([0]), stack(1).to(dtype=torch.float64), ValueError, r"float64\[0, 2, 3\]"),
        (torch.tensor([0]), stack(1).layers[0], TypeError, "expected a Stack, got Layer"),
    ],
    ids=["mask", "rows", "shape", "dtype", "class"],
)
def test_replace_refuses_what_does_not_fit(
    rows: Tensor, other: Memory, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stack().replace(rows, other)  # type: ignore[arg-type]


def test_where_picks_row_by_row() -> None:
    one, other = stack(seed=0), stack(seed=1)
    keep = torch.tensor([True, False, False, True])
    mixed = one.where(keep, other)
    for path, leaf in mixed.tensors().items():
        for row in range(ROWS):
            source = one if keep[row] else other
            assert torch.equal(leaf[row], source.tensors()[path][row])


def test_nan_in_a_row_left_out_does_not_survive() -> None:
    poisoned = stack().map(
        lambda leaf: torch.full_like(leaf, torch.nan) if leaf.is_floating_point() else leaf
    )
    fresh = stack(seed=1)
    for mixed in (
        poisoned.where(torch.zeros(ROWS, dtype=torch.bool), fresh),
        fresh.where(torch.ones(ROWS, dtype=torch.bool), poisoned),
    ):
        assert all(bool(leaf.isfinite().all()) for leaf in mixed.tensors().values())


def test_where_lets_gradients_through_for_the_row_it_picked_only() -> None:
    one, other = stack(), stack(seed=1)
    one.layers[0].keys.requires_grad_()
    keep = torch.tensor([True, False, True, True])
    one.where(keep, other).layers[0].keys.sum().backward()
    assert one.layers[0].keys.grad is not None
    assert torch.equal(one.layers[0].keys.grad, keep.float()[:, None, None].expand(ROWS, 2, 3))


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([True] * ROWS, TypeError, "keep must be a tensor, got list"),
        (torch.ones(ROWS), TypeError, "keep must be a bool tensor, got torch.float32"),
        (torch.ones(ROWS + 1, dtype=torch.bool), ValueError, r"keep has shape \(5,\), the memory has 4 rows"),
        (torch.ones(ROWS, 1, dtype=torch.bool), ValueError, r"keep has shape \(4, 1\)"),
    ],
)
def test_where_refuses_a_wrong_choice(keep: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stack().where(keep, stack())


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (stack(3), ValueError, r"layers\.0\.keys is float32\[4, 2, 3\] in one memory and float32\[3, 2, 3\]"),
        (stack(width=5), ValueError, r"layers\.0\.keys is"),
        (stack(label="new"), ValueError, "differ in their static fields"),
        (stack().to(dtype=torch.float64), ValueError, r"float64\[4, 2, 3\]"),
        (stack().layers[0], TypeError, "expected a Stack, got Layer"),
        (
            Stack(layers=stack().layers[:1], flag=stack().flag, width=3),
            ValueError,
            r"different tensors: layers\.1\.count, layers\.1\.keys",
        ),
    ],
    ids=["rows", "shape", "static", "dtype", "class", "layers"],
)
def test_where_refuses_a_memory_of_another_kind(other: Memory, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stack().where(torch.ones(ROWS, dtype=torch.bool), other)  # type: ignore[arg-type]


def test_cat_joins_and_select_splits() -> None:
    parts = [stack(2, seed=0), stack(0), stack(3, seed=1)]
    joined = cat(parts)
    assert joined.batch_size == 5
    assert_same(joined.select(torch.arange(2)), parts[0])
    assert_same(joined.select(torch.arange(2, 5)), parts[2])
    assert_same(cat([joined]), joined)


@pytest.mark.parametrize(
    ("memories", "error", "message"),
    [
        ([], ValueError, "at least one memory"),
        ([stack(), stack(width=5)], ValueError, r"layers\.0\.keys"),
        ([stack(), stack(label="new")], ValueError, "static"),
        ([stack(), stack().layers[0]], TypeError, "expected a Stack"),
    ],
)
def test_cat_refuses_what_does_not_fit(memories: list[Memory], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cat(memories)


def test_pytree_round_trip_keeps_static_fields() -> None:
    memory = stack(label="kept")
    leaves, structure = pytree.tree_flatten(memory)
    assert len(leaves) == 5
    again = pytree.tree_unflatten(leaves, structure)
    assert (again.width, again.label) == (3, "kept")
    assert all(one is two for one, two in zip(pytree.tree_leaves(again), leaves, strict=True))
    assert_same(pytree.tree_map_with_path(lambda path, leaf: leaf, memory), memory)
    # A memory inside other containers, as DDP and FSDP meet it.
    nested = pytree.tree_map(torch.clone, {"out": (memory, [torch.ones(1)])})
    assert_same(nested["out"][0], memory)


def test_memories_that_differ_in_a_static_field_are_different_trees() -> None:
    assert pytree.tree_structure(stack()) != pytree.tree_structure(stack(label="new"))
    with pytest.raises(ValueError):
        pytree.tree_map(torch.add, stack(), stack(label="new"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_are_equal(copied: object) -> None:
    memory = stack(label="kept")
    assert_same(copied(memory), memory)  # type: ignore[operator]


def test_deepcopy_shares_nothing() -> None:
    memory = stack()
    copy.deepcopy(memory).layers[0].keys.add_(1)
    assert_same(memory, stack())


def test_a_memory_is_frozen_and_keyword_only() -> None:
    memory = stack()
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.flag = torch.zeros(ROWS)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Layer(torch.zeros(1), torch.zeros(1))  # type: ignore[call-arg]


def test_comparison_is_by_identity() -> None:
    # Comparing tensors would ask for the truth of a tensor of many values.
    memory = stack()
    assert memory == memory
    assert memory != stack()
    assert len({memory, memory}) == 1


def test_unpacking_by_mistake_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Stack is one value; read its fields or \.tensors\(\)"):
        _y, _memory = stack()


def test_repr_shows_shapes_not_values() -> None:
    assert repr(stack().layers[0]) == "Layer(keys float32[4, 2, 3], count int64[4])"


def test_only_memories_can_be_states() -> None:
    class Foreign:
        x: Tensor

    with pytest.raises(TypeError, match="Foreign must subclass Memory"):
        memory_state(Foreign)


def test_open_length_is_zero_unless_a_memory_says_otherwise() -> None:
    assert torch.equal(stack().open_length, torch.zeros(ROWS, dtype=torch.int64))


@pytest.mark.slow
def test_export_takes_a_memory() -> None:
    class Count(torch.nn.Module):
        def forward(self, memory: Stack) -> Stack:
            return memory.map(lambda leaf: leaf if leaf.dtype == torch.bool else leaf + 1)

    program = torch.export.export(Count(), (stack(),))
    seen = program.module()(stack(seed=1))
    assert_same(seen, Count()(stack(seed=1)))


def test_what_is_no_tensor_and_no_memory_is_named() -> None:
    with pytest.raises(TypeError, match="rows must be a tensor, got list"):
        stack().select([0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="other must be a memory, got Tensor"):
        stack().replace(torch.arange(2), torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cat takes memories, got a Tensor"):
        cat([torch.zeros(2)])  # type: ignore[list-item]


def test_a_memory_goes_where_a_tensor_goes() -> None:
    memory = stack()
    for moved in (
        memory.to(torch.bfloat16),
        memory.to(dtype=torch.bfloat16),
        memory.to("cpu", torch.bfloat16),
        memory.to(memory.to(torch.bfloat16).select(torch.arange(1))),
    ):
        assert torch.equal(moved.layers[0].keys, memory.layers[0].keys.to(torch.bfloat16))
        assert torch.equal(moved.layers[0].count, memory.layers[0].count)
        assert moved.flag.dtype == torch.bool
    assert memory.to("meta").flag.device.type == memory.to(memory.to("meta")).flag.device.type == "meta"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.int64,), TypeError, "dtype must be a floating one, got torch.int64"),
        ((None, torch.bool), TypeError, "dtype must be a floating one, got torch.bool"),
        ((None, "float32"), TypeError, "dtype must be a floating one, got 'float32'"),
        ((torch.zeros(2),), TypeError, "a memory goes to a device, a dtype or a memory"),
        ((torch.float32, torch.float64), TypeError, "a memory goes to a device, a dtype or a memory"),
        ((stack().layers[0],), TypeError, "expected a Stack, got Layer"),
        ((stack(width=5),), ValueError, r"layers\.0\.keys is"),
    ],
)
def test_a_memory_does_not_go_elsewhere(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stack().to(*given)


def test_a_deepcopy_of_a_memory_in_a_graph_says_what_to_do() -> None:
    memory = stack().map(lambda leaf: leaf * torch.ones(1, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"layers\.0\.keys has a gradient .* copy memory\.detach\(\)"):
        copy.deepcopy({"memory": memory})
    assert_same(copy.deepcopy(memory.detach()), memory)
    assert memory.map(torch.clone).layers[0].keys.requires_grad
