"""The parts that all members share, against the loops of `tests/reference/attention.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memory_models.transformer import (
    FeedForward,
    Past,
    Place,
    SegmentAttention,
    TokenShift,
    TransformerConfig,
    Trunk,
    last_token,
    previous,
    rotate,
)
from tests.reference import attention as reference
from tests.reference.transformer import segment_attention

CONFIG = TransformerConfig(dim=10, heads=2, dim_head=5, depth=2, segment_length=7)


def attention(*, matching: bool = False, config: TransformerConfig = CONFIG) -> SegmentAttention:
    module = SegmentAttention(config, matching=matching).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def by_loops(module: SegmentAttention, x: Tensor, *, context: Tensor | None = None) -> Tensor:
    """`module` over the rows of `x`, each token seeing all tokens before it, those of `context` too."""
    rows = x if context is None else torch.cat([context, x], 1)
    outputs = [segment_attention(module, row, first=lambda time: 0) for row in rows]
    return torch.stack(outputs)[:, -x.shape[1] :]


def forward(module: SegmentAttention, x: Tensor, pieces: list[int]) -> Tensor:
    cache, outputs, begin = module.init_cache(len(x)), [], 0
    for size in pieces:
        filled = torch.full((len(x),), begin)
        place = Place.of(filled, size, None, module.config.segment_length)
        y, cache = module(x[:, begin : begin + size], cache, place)
        outputs.append(y)
        begin += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("matching", [False, True])
@pytest.mark.parametrize("pieces", [[7], [3, 4], [1] * 7, [5]])
def test_attention_equals_the_loop_in_values_and_gradients(matching: bool, pieces: list[int]) -> None:
    module = attention(matching=matching)
    x = torch.randn(2, sum(pieces), CONFIG.dim, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    seen, wanted = forward(module, x, pieces), by_loops(module, x)
    torch.testing.assert_close(seen, wanted, atol=1e-10, rtol=0)
    weights = torch.randn_like(seen)
    for ours, theirs in zip(
        torch.autograd.grad((seen * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_attention_over_a_past_equals_attention_over_one_longer_segment() -> None:
    module = attention()
    before = torch.randn(2, 3, CONFIG.dim, dtype=torch.float64)
    x = torch.randn(2, CONFIG.segment_length, CONFIG.dim, dtype=torch.float64)
    cache = module.init_cache(2)
    place = Place.of(torch.zeros(2, dtype=torch.int64), CONFIG.segment_length, None, CONFIG.segment_length)
    _, keys, values, _ = module.project(module.norm(before), cache, place)
    past = Past(
        keys=rotate(keys, torch.arange(-3, 0)[None]), values=values, held=torch.ones(2, 3, dtype=torch.bool)
    )
    seen, _ = module(x, cache, place, past=past)
    torch.testing.assert_close(seen, by_loops(module, x, context=before), atol=1e-10, rtol=0)
    # Where nothing is held the past is not there, whatever it holds.
    hidden = Past(keys=past.keys * 100, values=past.values * 100, held=torch.zeros(2, 3, dtype=torch.bool))
    alone, _ = module(x, cache, place, past=hidden)
    torch.testing.assert_close(alone, by_loops(module, x), atol=1e-10, rtol=0)


def test_a_piece_may_see_a_past_too() -> None:
    module = attention()
    x = torch.randn(1, 4, CONFIG.dim, dtype=torch.float64)
    past = Past(
        keys=torch.randn(1, 2, 2, 5, dtype=torch.float64),
        values=torch.randn(1, 2, 2, 5, dtype=torch.float64),
        held=torch.tensor([[True, False]]),
    )

    def run(sizes: list[int]) -> Tensor:
        cache, outputs, begin = module.init_cache(1), [], 0
        for size in sizes:
            place = Place.of(torch.tensor([begin]), size, None, CONFIG.segment_length)
            y, cache = module(x[:, begin : begin + size], cache, place, past=past)
            outputs.append(y)
            begin += size
        return torch.cat(outputs, 1)

    torch.testing.assert_close(run([1, 1, 2]), run([4]), atol=1e-12, rtol=0)


def test_a_matching_layer_finds_what_followed_last_time_from_the_first_step() -> None:
    torch.manual_seed(1)
    config = TransformerConfig(dim=64, heads=2, segment_length=12, matching_layer=True)
    module = SegmentAttention(config, matching=True).eval()
    tokens = torch.tensor([3, 8, 1, 9, 4, 7, 2, 6, 5, 0, 10, 1])
    x = torch.randn(11, 64)[tokens][None]
    place = Place.of(torch.zeros(1, dtype=torch.int64), 12, None, 12)
    queries, keys, _, _ = module.project(module.norm(x), module.init_cache(1), place)
    scores = torch.einsum("bihd,bjhd->bhij", queries, keys)
    # Token 1 stood at place 2, so that its follower at place 3 is what the last place looks for.
    assert scores[0, :, -1].argmax(-1).tolist() == [3, 3]
    assert scores.abs().max() <= 10 + 1e-4


def test_the_matching_layer_starts_as_described() -> None:
    module = SegmentAttention(CONFIG, matching=True)
    assert torch.equal(module.to_keys.weight, module.to_queries.weight)
    torch.testing.assert_close(module.log_scale.exp(), torch.full((2, 1), 10.0))
    plain = SegmentAttention(CONFIG)
    assert not torch.equal(plain.to_keys.weight, plain.to_queries.weight)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("position", [-40, -1, 0, 1, 1000])
def test_rotary_equals_complex_multiplication(width: int, position: int) -> None:
    x = torch.randn(1, 1, 2, width, dtype=torch.float64)
    seen = rotate(x, torch.tensor([[position]]))
    for head in range(2):
        wanted = reference.rotary(x[0, 0, head], position)
        torch.testing.assert_close(seen[0, 0, head], wanted, atol=1e-12, rtol=0)


@given(st.integers(-500, 500), st.integers(0, 500))
def test_rotary_depends_on_distance_only_and_keeps_lengths(shift: int, distance: int) -> None:
    query, key = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)

    def score(a: int, b: int) -> Tensor:
        return (rotate(query, torch.tensor([[a]])) * rotate(key, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score(distance, 0), score(distance + shift, shift), atol=1e-9, rtol=0)
    turned = rotate(query, torch.tensor([[shift]]))
    torch.testing.assert_close(turned.norm(), query.norm(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tells_distant_neighbours_apart_in_half_precision(dtype: torch.dtype) -> None:
    # Angles in bfloat16 would round positions 1000 and 1001 to the same number.
    x = torch.ones(1, 2, 1, 4, dtype=dtype)
    seen = rotate(x, torch.tensor([[1000, 1001]]))
    wanted = rotate(x.double(), torch.tensor([[1000, 1001]]))
    assert seen.dtype == dtype
    torch.testing.assert_close(seen.double(), wanted, atol=0.02, rtol=0)


def test_feedforward_is_swiglu() -> None:
    module = FeedForward(6, 8).double()
    torch.nn.init.normal_(module.norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    wanted = reference.swiglu(x, module.norm.weight, module.to_inner.weight, module.to_out.weight)
    torch.testing.assert_close(module(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pieces", [[5], [2, 3], [1, 1, 3]])
def test_token_shift_adds_the_token_before(pieces: list[int]) -> None:
    module = TokenShift(4).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    wanted = torch.stack([x[:, t] + (x[:, t - 1] @ module.mix.weight.T if t else 0) for t in range(5)], 1)
    last, outputs, begin = torch.full((2, 4), torch.nan, dtype=torch.float64), [], 0
    for size in pieces:
        place = Place.of(torch.full((2,), begin), size, None, 5)
        y, last = module(x[:, begin : begin + size], last, place)
        outputs.append(y)
        begin += size
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, atol=1e-12, rtol=0)
    assert torch.equal(last, x[:, -1])


def test_the_token_before_the_first_is_zero_even_if_the_last_one_kept_is_nan() -> None:
    x, stale = torch.ones(2, 3, 1), torch.full((2, 1), torch.nan)
    before = previous(x, stale, torch.tensor([0, 2]))
    assert before[0].flatten().tolist() == [0.0, 1.0, 1.0]
    assert before[1, 0].isnan()


def test_the_last_token_of_a_ragged_row() -> None:
    x, old = torch.arange(6.0).view(3, 2, 1), torch.full((3, 1), 9.0)
    assert last_token(x, old, torch.tensor([0, 1, 2])).flatten().tolist() == [9.0, 2.0, 5.0]
    assert last_token(x, old, None).flatten().tolist() == [1.0, 3.0, 5.0]


def test_a_place_sees_the_open_segment_up_to_each_token() -> None:
    place = Place.of(torch.tensor([0, 2]), 2, torch.tensor([2, 1]), 4)
    assert place.positions.tolist() == [[0, 1], [2, 3]]
    assert place.after.tolist() == [2, 3]
    assert place.causal is not None
    assert place.causal[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_dropout_acts_in_training_only() -> None:
    config = TransformerConfig(dim=8, heads=2, segment_length=4, dropout=0.5)
    x = torch.randn(1, 4, 8)
    place = Place.of(torch.zeros(1, dtype=torch.int64), 4, None, 4)
    for part in (SegmentAttention(config), SegmentAttention(config, matching=True)):
        one, two = (part.train()(x, part.init_cache(1), place)[0] for _ in range(2))
        assert not torch.equal(one, two)
        one, two = (part.eval()(x, part.init_cache(1), place)[0] for _ in range(2))
        assert torch.equal(one, two)
    layer = FeedForward(8, 8, dropout=0.5)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_only_the_last_layer_is_the_matching_layer() -> None:
    trunk = Trunk(TransformerConfig(dim=8, depth=3, heads=2, segment_length=4, matching_layer=True))
    assert [part.matching for part in trunk.attentions] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, r"dim \(0\) must be at least 1"),
        ({"depth": 0}, r"depth \(0\)"),
        ({"segment_length": -1}, r"segment_length \(-1\)"),
        ({"dim": 10, "heads": 4}, r"dim \(10\) must be divisible by heads \(4\), or give dim_head"),
        ({"dim_head": 0}, r"dim_head \(0\)"),
        ({"ff_dim": 0}, r"ff_dim \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1\.0\) must lie in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**options)


def test_widths_that_follow_from_others() -> None:
    config = TransformerConfig(dim=100, heads=4)
    assert config.head_width == 25
    assert config.feedforward_width == 8 * math.ceil(100 * 8 / 3 / 8) == 272
    chosen = TransformerConfig(dim=10, heads=4, dim_head=3, ff_dim=7)
    assert (chosen.head_width, chosen.feedforward_width) == (3, 7)
