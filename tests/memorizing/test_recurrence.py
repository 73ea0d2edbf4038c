"""Enhanced recurrence (`xl_shift`): a layer caches its own outputs, and information reaches further."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing import Memorizing
from memory_models import check_model, create, unroll
from tests.reference.memorizing import shifted_recurrence

DIM, LENGTH = 8, 4
OPTIONS: dict[str, Any] = {"dim": DIM, "depth": 2, "heads": 2, "segment_length": LENGTH, "xl_shift": True}
VARIANTS: list[dict[str, Any]] = [
    {"xl_cache": 4, "memories": 0},
    {"xl_cache": 3, "memories": 7, "topk": 3},
    {"xl_cache": 6, "memories": 5, "topk": 2, "matching_layer": True, "token_shift": True},
    {"xl_cache": 2, "memories": 6, "topk": 2, "combine": "softmax", "memory_layers": (0, 1), "kv_heads": 1},
    {"xl_cache": 5, "memories": 9, "topk": 3, "age_bias": True, "gate_network": True, "depth": 1},
]


def model(**options: Any) -> Memorizing:
    made = create("memorizing", **(OPTIONS | options)).double().eval()
    assert isinstance(made, Memorizing)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def stream(segments: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, segments * LENGTH, DIM, dtype=torch.float64)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    made = model(**options)
    x = stream(4, rows=2)[:, :-1].requires_grad_()
    seen, wanted = unroll(made, x)[0], torch.stack([shifted_recurrence(made, row) for row in x])
    torch.testing.assert_close(seen, wanted, atol=1e-9, rtol=1e-9)
    inputs, push = [x, *made.parameters()], torch.randn_like(seen)
    ours, theirs = (torch.autograd.grad((y * push).sum(), inputs, allow_unused=True) for y in (seen, wanted))
    names = ["x", *(name for name, _ in made.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        if one is None or other is None:
            # A gate that is never opened takes no part in the loops; in the layer its gradient is zero.
            assert other is None
            assert one is None or not bool(one.any())
            continue
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("options", VARIANTS[1:4:2], ids=str)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    check_model(model(**options).float(), skip=("compile",))


def reach(made: Memorizing, segments: int = 12) -> int:
    """How many segments after the first one its tokens still have an influence."""
    x = stream(segments)
    other = x.clone()
    other[:, 0] += 1
    moved = (unroll(made, x)[0] - unroll(made, other)[0]).abs().amax((0, 2)).view(segments, LENGTH)
    return int((moved.amax(1) > 0).nonzero().max())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_information_reaches_as_far_as_the_stream_and_without_it_depth_segments(depth: int) -> None:
    # A cache of one segment and no memory: plain recurrence goes down one layer for each segment back
    # (Transformer-XL, depth segments in all), enhanced recurrence stays in its layer and never ends.
    sizes: dict[str, Any] = {"depth": depth, "memories": 0, "xl_cache": LENGTH}
    assert reach(model(**sizes, xl_shift=False)) == depth
    assert reach(model(**sizes)) == 11


def test_what_is_cached_carries_no_gradient() -> None:
    made = model(xl_cache=3, memories=5, topk=2)
    _, memory = unroll(made, stream(3).requires_grad_())
    assert not any(leaf.requires_grad for leaf in memory.tensors().values())


def test_the_first_segment_is_as_without_it() -> None:
    made = model(xl_cache=3, memories=5, topk=2)
    plain = model(xl_cache=3, memories=5, topk=2, xl_shift=False)
    plain.load_state_dict(made.state_dict())
    x = stream(2)
    torch.testing.assert_close(made(x[:, :LENGTH])[0], plain(x[:, :LENGTH])[0], atol=0, rtol=0)
    assert not torch.allclose(unroll(made, x)[0], unroll(plain, x)[0])
