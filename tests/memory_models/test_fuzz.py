"""Random calls to every member: any batch, any lengths, any masks, resets and closes, NaN at padding.

The reference takes each row alone, without a mask and without a reset: it drops the padding, cuts the row
into documents, and gives each one that begins a fresh memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models import MemoryModule, cat
from tests.members import MEMBERS, VARIANTS, small

LENGTH = 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAIRS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MEMBERS] + VARIANTS


@dataclass(frozen=True)
class Call:
    """One call, without its input: mask and reset are bool `[batch, time]`, reset may be `[batch]`."""

    time: int
    mask: Tensor | None
    reset: Tensor | None
    close: bool | Tensor

    def shorter(self, room: int) -> Call:
        """The first `room` tokens of the call."""
        time = min(room, self.time)
        mask = None if self.mask is None else self.mask[:, :time]
        reset = self.reset if self.reset is None or self.reset.dim() == 1 else self.reset[:, :time]
        return Call(time=time, mask=mask, reset=reset, close=self.close)

    def real(self, row: int) -> Tensor:
        """bool `[time]`, false at the row's padding."""
        return torch.ones(self.time, dtype=torch.bool) if self.mask is None else self.mask[row]

    def starts(self, row: int) -> list[int]:
        """Where in the call a new document of the row begins."""
        if self.reset is None:
            return []
        if self.reset.dim() == 1:
            return [0] if self.reset[row] else []
        return [int(time) for time in self.reset[row].nonzero()]


def flags(*shape: int) -> st.SearchStrategy[Tensor]:
    """bool tensors of a shape."""
    size = int(torch.tensor(shape).prod())
    drawn = st.lists(st.booleans(), min_size=size, max_size=size)
    return drawn.map(lambda values: torch.tensor(values, dtype=torch.bool).view(shape))


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, list[Call]]:
    """A number of rows, and a few calls in a row."""
    batch = draw(st.integers(0, 4))
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        time = draw(st.integers(0, LENGTH))
        calls.append(
            Call(
                time=time,
                mask=draw(st.none() | flags(batch, time)),
                reset=draw(st.none() | flags(batch) | flags(batch, time)),
                close=draw(st.booleans() | flags(batch)),
            )
        )
    return batch, calls


def run(module: MemoryModule[Any], batch: int, calls: list[Call]) -> None:
    """Make the calls, check what holds for each one alone, and compare rows with the reference if float64."""
    dtype = next(module.parameters()).dtype
    fresh = memory = module.init_memory(batch)
    rows = [module.init_memory(1) for _ in range(batch)]
    for drawn in calls:
        call = drawn.shorter(LENGTH - (int(memory.open_length.max()) if batch else 0))
        x = torch.randn(batch, call.time, module.dim, dtype=dtype)
        given = x if call.mask is None else torch.where(call.mask[..., None], x, torch.nan)
        before, given_before = memory.map(torch.clone), given.clone()
        y, after = module(given, memory, mask=call.mask, reset=call.reset, close=call.close)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.isfinite().all()
        if call.mask is not None:
            assert (y[~call.mask] == 0).all()
        torch.testing.assert_close(given, given_before, rtol=0, atol=0, equal_nan=True)
        for path, leaf in before.tensors().items():
            assert torch.equal(memory.tensors()[path], leaf), f"{path} of the memory given was changed"
            now = after.tensors()[path]
            assert (now.shape, now.dtype) == (leaf.shape, leaf.dtype), path
            assert not now.is_floating_point() or now.isfinite().all(), path
        assert pytree.tree_structure(after) == pytree.tree_structure(fresh)
        memory = after
        if dtype == torch.float64:
            rows = [compare_row(module, x, y, call, row, rows[row]) for row in range(batch)]
            if batch:
                same_memory(memory, cat(rows))


def compare_row(module: MemoryModule[Any], x: Tensor, y: Tensor, call: Call, row: int, memory: Any) -> Any:
    """Check one row of `y` against the reference; the reference's memory `[1]` after the call."""
    bounds = [0, *call.starts(row), call.time]
    for number in range(len(bounds) - 1):
        begin, end = bounds[number], bounds[number + 1]
        if number:
            memory = module.init_memory(1)
        chosen = torch.arange(begin, end)[call.real(row)[begin:end]]
        wanted, memory = module(x[row : row + 1, chosen], memory, close=False)
        torch.testing.assert_close(y[row : row + 1, chosen], wanted, rtol=1e-9, atol=1e-9)
    close = call.close if isinstance(call.close, bool) else bool(call.close[row])
    return module(x[row : row + 1, :0], memory)[1] if close else memory


def same_memory(seen: Any, wanted: Any) -> None:
    for path, leaf in wanted.tensors().items():
        torch.testing.assert_close(seen.tensors()[path], leaf, rtol=1e-9, atol=1e-9, msg=path)


def fuzz(name: str, options: dict[str, Any], *, dtypes: list[torch.dtype], examples: int) -> None:
    options = {key: value for key, value in options.items() if key != "segment_length"}
    module = small(name, **options, segment_length=LENGTH)

    @settings(max_examples=examples)
    @given(stream=streams(), dtype=st.sampled_from(dtypes), seed=st.integers(0, 2**16))
    def check(stream: tuple[int, list[Call]], dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            run(module.to(dtype), *stream)

    check()


@pytest.mark.parametrize("name", MEMBERS)
def test_random_calls_equal_each_row_alone(name: str) -> None:
    fuzz(name, {}, dtypes=[torch.float64], examples=8)


@pytest.mark.parametrize("name", MEMBERS)
def test_random_calls_stay_finite_in_every_dtype(name: str) -> None:
    fuzz(name, {}, dtypes=DTYPES[1:], examples=5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=str)
def test_many_random_calls(name: str, options: dict[str, Any]) -> None:
    fuzz(name, options, dtypes=DTYPES, examples=50)
