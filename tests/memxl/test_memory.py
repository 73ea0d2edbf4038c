"""What memxl carries: linear attention as loops do it, a queue, and slots that are written and bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memxl import MemoryWriter, MemXLConfig, ShortMemory, linear_attention
from tests.reference.memxl import linear_attention as by_loops
from tests.reference.memxl import write as write_by_loops

DIM, SLOTS, TOKENS = 8, 3, 5


def asked(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 2 rows and 2 heads."""
    shapes = ((2, SLOTS, 2, 4), (2, TOKENS, 2, 4), (2, TOKENS, 2, 3))
    made = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2]


def everywhere() -> Tensor:
    return torch.ones(2, TOKENS, dtype=torch.bool)


def test_linear_attention_equals_loops_in_values_and_gradients() -> None:
    inputs, valid = asked(), everywhere()
    valid[0, 1] = valid[1, 3:] = False
    seen = linear_attention(*inputs, valid)
    rows = []
    for row in range(2):
        queries, keys, values = (part[row] for part in inputs)
        keys, values = keys[valid[row]], values[valid[row]]
        rows.append(torch.stack([by_loops(queries[:, h], keys[:, h], values[:, h]) for h in range(2)], 1))
    wanted = torch.stack(rows)
    torch.testing.assert_close(seen, wanted, atol=1e-12, rtol=0)
    push = torch.randn_like(seen)
    ours, theirs = (torch.autograd.grad((y * push).sum(), inputs) for y in (seen, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_linear_attention_is_a_mean_of_the_values() -> None:
    # Both softmaxes sum to one, so that equal values come out as they went in, and others within bounds.
    queries, keys, values = asked()
    ones = linear_attention(queries, keys, torch.ones_like(values), everywhere())
    torch.testing.assert_close(ones, torch.ones_like(ones), atol=1e-12, rtol=0)
    mixed = linear_attention(queries, keys, values, everywhere())
    assert bool((mixed >= values.amin(1, keepdim=True)).all())
    assert bool((mixed <= values.amax(1, keepdim=True)).all())


def test_linear_attention_does_not_know_the_order_of_the_tokens() -> None:
    queries, keys, values = asked()
    order = torch.randperm(TOKENS)
    one = linear_attention(queries, keys, values, everywhere())
    two = linear_attention(queries, keys[:, order], values[:, order], everywhere())
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_a_row_without_tokens_gets_zero_and_finite_gradients() -> None:
    inputs, valid = asked(), everywhere()
    valid[1] = False
    seen = linear_attention(*inputs, valid)
    assert not bool(seen[1].any())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(seen.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    inputs = asked(dtype)
    wanted = linear_attention(*(part.float() for part in inputs), everywhere())
    assert wanted.dtype == torch.float32
    assert torch.equal(linear_attention(*inputs, everywhere()), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(*inputs, everywhere()), wanted)


@pytest.mark.parametrize("length", [0, 1, 3, 8])
def test_the_short_memory_is_a_queue_of_each_row(length: int) -> None:
    # Tokens are numbers; rows get segments of unequal lengths, and what is past their ends is no token.
    generator = torch.Generator().manual_seed(length)
    memory = ShortMemory.empty(2, length, 2, 1, like=torch.zeros((), dtype=torch.float64))
    given = [0, 0]
    for _ in range(9):
        filled = torch.randint(0, 6, (2,), generator=generator)
        tokens = 1 + torch.tensor(given)[:, None] + torch.arange(TOKENS)
        tokens = torch.where(torch.arange(TOKENS) < filled[:, None], tokens.double(), torch.nan)[..., None]
        memory = memory.push([tokens, -tokens], filled)
        given = [now + new for now, new in zip(given, filled.tolist(), strict=True)]
        assert memory.held.tolist() == [min(n, length) for n in given]
        for row, last in enumerate(given):
            wanted = list(range(max(0, last - length) + 1, last + 1))
            assert memory.places()[row].tolist() == [False] * (length - len(wanted)) + [True] * len(wanted)
            for layer, sign in ((0, 1), (1, -1)):
                kept = memory.hiddens[layer][row, length - len(wanted) :, 0]
                assert kept.tolist() == [sign * n for n in wanted]


def writer(**options: Any) -> MemoryWriter:
    config = MemXLConfig(**({"dim": DIM, "depth": 2, "heads": 2, "lmem_len": SLOTS} | options))
    made = MemoryWriter(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def segment(layers: int = 2) -> list[Tensor]:
    return [torch.randn(2, TOKENS, DIM, dtype=torch.float64) for _ in range(layers)]


@pytest.mark.parametrize(
    "options",
    [{}, {"write_iterations": 3, "gate": "nbrc"}, {"write_heads": 4, "write_features": 5, "mogrify": True}],
    ids=str,
)
def test_the_write_equals_loops(options: dict[str, Any]) -> None:
    made, hiddens, valid = writer(**options), segment(), everywhere()
    valid[0, :2] = False
    slots = torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    seen = made(slots, hiddens, valid)
    wanted = [
        write_by_loops(made, slots[row], [list(layer[row][valid[row]]) for layer in hiddens])
        for row in range(2)
    ]
    torch.testing.assert_close(seen, torch.stack(wanted), atol=1e-12, rtol=0)


def test_what_does_not_count_is_not_written() -> None:
    made, hiddens, valid = writer(), segment(), everywhere()
    valid[0, 3:] = False
    other = [torch.where(valid[..., None], layer, 1e3) for layer in hiddens]
    slots = made.init_slots(2)
    torch.testing.assert_close(made(slots, hiddens, valid), made(slots, other, valid), atol=0, rtol=0)


def test_a_row_without_a_token_keeps_its_slots_exactly() -> None:
    made, valid = writer(), everywhere()
    valid[1] = False
    slots = torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    after = made(slots, segment(), valid)
    assert torch.equal(after[1], slots[1])
    assert not torch.equal(after[0], slots[0])


def test_the_writer_knows_the_layers_apart_and_not_the_tokens() -> None:
    made, (one, two), slots = writer(), segment(), writer().init_slots(2)
    order = torch.randperm(TOKENS)
    wanted = made(slots, [one, two], everywhere())
    swapped = made(slots, [two, one], everywhere())
    permuted = made(slots, [one[:, order], two[:, order]], everywhere())
    assert not torch.allclose(swapped, wanted, atol=1e-3)
    torch.testing.assert_close(permuted, wanted, atol=1e-12, rtol=0)


def test_a_slots_place_is_asked_with_but_not_carried() -> None:
    # With a closed gate nothing is added however often it is written.
    made, slots = writer(gate_bias=torch.inf), torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    for _ in range(3):
        assert torch.equal(made(slots, segment(), everywhere()), slots)
    # Equal slots at different places ask for different things.
    equal = slots[:, :1].expand(-1, SLOTS, -1)
    after = writer()(equal, segment(), everywhere())
    assert not torch.allclose(after[:, 0], after[:, 1], atol=1e-3)


@pytest.mark.parametrize("writes", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"gate": "nbrc", "mogrify": True}], ids=str)
def test_slots_stay_within_bounds_over_many_writes_and_go_on_changing(
    options: dict[str, Any], writes: int
) -> None:
    made = writer(lmem_len=2, **options).float()
    slots, valid = made.init_slots(1), torch.ones(1, 2, dtype=torch.bool)
    limit = float(slots.detach().abs().max().clamp(min=1))
    sources, changes = 5 * torch.randn(100, 2, 1, 2, DIM), []
    with torch.no_grad():
        for count in range(writes):
            after = made(slots, list(sources[count % 100]), valid)
            if count < 100 or count >= writes - 100:
                changes.append((after - slots).norm())
            slots = after
            assert bool((slots.abs() <= limit).all())
    early, late = torch.stack(changes).view(2, 100).mean(1)
    assert float(late) > 0.2 * float(early)
