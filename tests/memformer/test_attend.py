"""Attention with logits by distance, against one attention matrix per head."""

import math

import pytest
import torch
from torch import Tensor

from memformer import attend as module
from memformer.attend import attend

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 4, 5, 7, 6


def inputs() -> list[Tensor]:
    shapes = [(BATCH, HEADS, length, WIDTH) for length in (QUERIES, KEYS, KEYS)]
    shapes.append((HEADS, QUERIES + KEYS - 1))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def forbidden(table: Tensor) -> Tensor:
    # Keys after the query, whose distances are the last ones of the table.
    return table.masked_fill(torch.arange(QUERIES + KEYS - 1) >= KEYS, -torch.inf)


def one_matrix(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, keep: Tensor | None) -> Tensor:
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(WIDTH)
    for place in range(QUERIES):
        for other in range(KEYS):
            distance = other - (KEYS - QUERIES + place)
            logits[:, :, place, other] += table[:, distance + KEYS - 1]
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
    return logits.softmax(-1) @ values


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("budget", [1, 2 * QUERIES * KEYS, 5 * HEADS * QUERIES * KEYS])
def test_chunks_of_heads_and_rows_equal_one_matrix(
    monkeypatch: pytest.MonkeyPatch, causal: bool, masked: bool, budget: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_CPU", budget)
    given = inputs()
    keep = None
    if masked:
        keep = torch.rand(BATCH, KEYS) < 0.5
        keep[:, 1] = True
    tables = forbidden(given[3]) if causal else given[3]
    ours = attend(*given[:3], bias=tables, keep=keep)
    expected = one_matrix(*given[:3], tables, keep)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, given, direction, retain_graph=True),
        torch.autograd.grad(expected, given, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_a_row_without_keys_is_zero_and_has_finite_gradients(biased: bool) -> None:
    queries, keys, values, table = inputs()
    keep = torch.ones(BATCH, KEYS, dtype=torch.bool)
    keep[1] = False
    out = attend(queries, keys, values, bias=table if biased else None, keep=keep)
    assert not out[1].any()
    assert out[0].any()
    given = [queries, keys, values, *([table] if biased else [])]
    for gradient in torch.autograd.grad(out.square().sum(), given):
        assert gradient.isfinite().all()


def test_a_query_whose_allowed_keys_are_all_left_out_does_not_become_nan() -> None:
    queries, keys, values, table = inputs()
    keep = torch.ones(BATCH, KEYS, dtype=torch.bool)
    keep[:, : KEYS - 1] = False
    assert attend(queries, keys, values, bias=forbidden(table), keep=keep).isfinite().all()


def test_no_matrix_of_all_heads_is_kept_for_the_backward_pass() -> None:
    length = 64
    queries, keys, values = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    table = torch.randn(HEADS, 2 * length - 1, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(queries, keys, values, bias=table)
    assert kept
    assert max(kept) < length * length
