"""What the rules of the contract share: the module under test with its inputs, and the comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models.module import MemoryModule
from memory_models.state import Memory
from memory_models.unroll import unroll

BATCH = 3
# Float64 rounding over a few hundred operations, relative to the size of what is compared.
TOLERANCE = 1e-9


class Broken(Exception):
    """A rule is broken; the message says what was seen."""


@dataclass(frozen=True)
class Rule:
    """One law: its name, what it says, and the check, which raises `Broken`."""

    name: str
    law: str
    check: Callable[[Subject], None]


def rule(name: str, law: str) -> Callable[[Callable[[Subject], None]], Rule]:
    """Make the decorated check a rule."""

    def make(check: Callable[[Subject], None]) -> Rule:
        return Rule(name, law, check)

    return make


class Subject:
    """A float64 copy of a module in evaluation mode, with reproducible inputs.

    Attributes:
        original: the module itself.
        model: the copy.
        length: the longest segment.
        generator: of the inputs.
        device: of the module.
    """

    def __init__(self, model: MemoryModule[Any]) -> None:
        self.original = model
        self.model = copy.deepcopy(model).double().eval()
        self.length = model.segment_length
        self.generator = torch.Generator().manual_seed(0)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def input(self, time: int, batch: int = BATCH) -> Tensor:
        """Random `[batch, time, dim]`, others at each call."""
        x = torch.randn(batch, time, self.model.dim, generator=self.generator, dtype=torch.float64)
        return x.to(self.device)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        """Random bool of a shape, of which about `share` are true."""
        return (torch.rand(*shape, generator=self.generator) < share).to(self.device)

    def warm(self, batch: int = BATCH, segments: int = 2) -> Any:
        """A memory that has read some random segments; no gradient."""
        with torch.no_grad():
            return unroll(self.model, self.input(segments * self.length, batch))[1]


def same(what: str, seen: Tensor, wanted: Tensor, *, exact: bool = False) -> None:
    """Raise `Broken` unless both are equal, `exact` or up to rounding; integers and bool always exactly."""
    if seen.shape != wanted.shape or seen.dtype != wanted.dtype:
        raise Broken(
            f"{what} is {seen.dtype}{list(seen.shape)}, should be {wanted.dtype}{list(wanted.shape)}"
        )
    if seen.numel() == 0:
        return
    if exact or not seen.is_floating_point():
        # NaN equals NaN here, and nothing else.
        if not torch.equal(seen.isnan(), wanted.isnan()) or not bool(((seen == wanted) | seen.isnan()).all()):
            raise Broken(f"{what} differs")
        return
    difference = (seen - wanted).detach().abs().max()
    # Not "difference > tolerance", which is false for NaN.
    if not bool(difference <= TOLERANCE * (1 + wanted.abs().max())):
        raise Broken(f"{what} differs by {float(difference):.3g}")


def same_memory(what: str, seen: Memory, wanted: Memory, *, exact: bool = False) -> None:
    """`same` for every leaf, addresses apart, and for the structure."""
    if pytree.tree_structure(seen) != pytree.tree_structure(wanted):
        raise Broken(f"{what} has another structure: {seen} instead of {wanted}")
    ours, theirs = seen.tensors(), wanted.tensors()
    addresses = wanted.addresses()
    for path, leaf in theirs.items():
        if path not in addresses:
            same(f"{what}'s {path}", ours[path], leaf, exact=exact)


def row_of(memory: Any, row: int) -> Any:
    """A memory of that row alone."""
    return memory.select(torch.tensor([row], device=next(iter(memory.tensors().values())).device))


def poison(memory: Any, rows: Tensor) -> Any:
    """The memory with NaN in all floating leaves of some rows, bool `[batch]`."""

    def fill(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return torch.where(rows.view(-1, *[1] * (leaf.dim() - 1)), torch.nan, leaf)

    return memory.map(fill)
