"""The controls are what they are said to be: nothing, everything, one cache a layer, a recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memory_models import MemoryModule, unroll
from tests.members import small
from tests.reference.attention import causal_attention, rms_norm
from tests.reference.transformer import feedforward, segment_attention, token_shift, transformer

DIM, LENGTH = 8, 5
OPTIONS = {"dim": DIM, "segment_length": LENGTH}
BOTH = {"token_shift": True, "matching_layer": True}


def control(name: str, **options: Any) -> MemoryModule[Any]:
    made = small(name, **(OPTIONS | options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def stream(time: int = 3 * LENGTH + 2) -> Tensor:
    return torch.randn(2, time, DIM, dtype=torch.float64, requires_grad=True)


def assert_equal(made: MemoryModule[Any], x: Tensor, seen: Tensor, wanted: Tensor) -> None:
    """Values, and gradients for the input and every parameter."""
    torch.testing.assert_close(seen, wanted, atol=1e-10, rtol=1e-10)
    inputs, weights = [x, *made.parameters()], torch.randn_like(seen)
    ours, theirs = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, retain_graph=True)
        for y in (seen, wanted)
    )
    for name, one, other in zip(["x", *dict(made.named_parameters())], ours, theirs, strict=True):
        one, other = (torch.zeros((), dtype=seen.dtype) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("options", [{}, BOTH], ids=str)
def test_window_is_the_transformer_within_each_segment(options: dict[str, Any]) -> None:
    made, x = control("window", **options), stream()
    wanted = [
        transformer(made.trunk, row, segment=LENGTH, first=lambda time: time // LENGTH * LENGTH) for row in x
    ]
    assert_equal(made, x, unroll(made, x)[0], torch.stack(wanted))


def test_window_carries_nothing_from_segment_to_segment() -> None:
    made = control("window")
    with torch.no_grad():
        _, memory = unroll(made, stream())
    fresh = made.init_memory(2).tensors()
    assert all(torch.equal(leaf, fresh[path]) for path, leaf in memory.tensors().items())


@pytest.mark.parametrize("context", [0, 3, LENGTH, 7, 100])
@pytest.mark.parametrize("options", [{}, BOTH], ids=str)
def test_full_sees_the_context_before_its_segment(context: int, options: dict[str, Any]) -> None:
    made, x = control("full", context=context, **options), stream()
    wanted = [
        transformer(
            made.trunk, row, segment=LENGTH, first=lambda time: max(0, time // LENGTH * LENGTH - context)
        )
        for row in x
    ]
    assert_equal(made, x, unroll(made, x)[0], torch.stack(wanted))


def test_full_in_segments_equals_one_long_segment() -> None:
    made, x = control("full", context=100, depth=3), stream(4 * LENGTH + 3)
    for name in ("full", "window"):
        options = {"depth": 3, "segment_length": 4 * LENGTH + 3}
        long = control(name, **options)
        long.load_state_dict(made.state_dict())
        assert_equal(made, x, unroll(made, x)[0], unroll_with(made, long, x))


def unroll_with(made: MemoryModule[Any], long: MemoryModule[Any], x: Tensor) -> Tensor:
    # The same parameters, so that gradients can be compared.
    return torch.func.functional_call(long, dict(made.named_parameters()), (x,))[0]


def test_full_stays_exact_far_into_a_stream() -> None:
    # Distances, not places, decide: after many segments the same context gives the same output.
    made = control("full", context=2 * LENGTH, depth=1)
    tail = torch.randn(1, 3 * LENGTH, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, late = unroll(made, torch.randn(1, 200 * LENGTH, DIM, dtype=torch.float64))
        torch.testing.assert_close(
            unroll(made, tail, late)[0][:, -LENGTH:], unroll(made, tail)[0][:, -LENGTH:], atol=1e-10, rtol=0
        )


def transformer_xl(made: Any, x: Tensor, cache: int) -> Tensor:
    """One row, each token by itself; what came before its segment is seen without gradient."""
    x = token_shift(made.shift, x, LENGTH)

    def start(time: int) -> int:
        return time // LENGTH * LENGTH

    for layer, attention in enumerate(made.attentions):
        matching = hasattr(attention, "matching")
        gain = attention.norm.weight if matching else made.norms[layer].weight
        normed, cached = rms_norm(x, gain), rms_norm(x.detach(), gain)

        def see(time: int, place: int, normed: Tensor = normed, cached: Tensor = cached) -> Tensor:
            return normed[place] if place >= start(time) else cached[place]

        def first(time: int) -> int:
            return max(0, start(time) - cache)

        if matching:
            attended = segment_attention(attention, x, first=first, see=see)
        else:
            weights = {
                "queries": attention.to_q.weight,
                "keys": attention.to_k.weight,
                "values": attention.to_v.weight,
                "out": attention.to_out.weight,
            }
            attended = causal_attention(normed, weights, 2, first=first, neighbours=True, see=see)
        x = x + attended
        x = x + feedforward(made.feedforwards[layer], x)
    return rms_norm(x, made.norm.weight)


@pytest.mark.parametrize("cache", [0, 3, LENGTH, 8])
@pytest.mark.parametrize("options", [{}, BOTH, {"dim_head": 3}], ids=str)
def test_transformer_xl_equals_each_token_by_itself(cache: int, options: dict[str, Any]) -> None:
    made, x = control("transformer-xl", cache=cache, **options), stream()
    wanted = torch.stack([transformer_xl(made, row, cache) for row in x])
    assert_equal(made, x, unroll(made, x)[0], wanted)


def test_transformer_xl_with_all_of_the_past_is_one_long_segment() -> None:
    made, x = control("transformer-xl", cache=100), stream()
    long = control("transformer-xl", segment_length=x.shape[1], cache=0)
    long.load_state_dict(made.state_dict())
    torch.testing.assert_close(unroll(made, x)[0], long(x)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_transformer_xl_reaches_back_depth_times_cache(depth: int) -> None:
    made = control("transformer-xl", depth=depth, cache=LENGTH)
    x = stream(6 * LENGTH).detach()[:1]
    other = x.clone()
    other[:, :LENGTH] += 1
    with torch.no_grad():
        moved = (unroll(made, x)[0] != unroll(made, other)[0]).any(-1)[0]
    assert moved[: (depth + 1) * LENGTH].all()
    assert not moved[(depth + 1) * LENGTH :].any()


def test_the_matching_layer_of_transformer_xl_drops_out_in_training() -> None:
    made = control("transformer-xl", depth=1, dropout=0.5, matching_layer=True)
    # With the feed-forward silenced only attention can drop anything.
    with torch.no_grad():
        made.feedforwards[0].to_out.weight.zero_()  # type: ignore[index, union-attr]
    x = stream(LENGTH)
    assert not torch.equal(made.train()(x)[0], made(x)[0])
    assert torch.equal(made.eval()(x)[0], made(x)[0])


def gru_by_hand(made: Any, x: Tensor) -> Tensor:
    """One row; the gates as torch documents them (Cho et al. 2014)."""
    for layer in made.layers:
        state, states = torch.zeros(made.hidden, dtype=x.dtype), []
        for token in x:
            given = (layer.weight_ih_l0 @ token + layer.bias_ih_l0).chunk(3)
            kept = (layer.weight_hh_l0 @ state + layer.bias_hh_l0).chunk(3)
            reset, update = (torch.sigmoid(given[i] + kept[i]) for i in (0, 1))
            candidate = torch.tanh(given[2] + reset * kept[2])
            state = (1 - update) * candidate + update * state
            states.append(state)
        x = torch.stack(states)
    return rms_norm(x, made.norm.weight) @ made.to_out.weight.T


def test_gru_is_a_recurrence_over_all_tokens() -> None:
    made, x = control("gru"), stream()
    assert_equal(made, x, unroll(made, x)[0], torch.stack([gru_by_hand(made, row) for row in x]))


@pytest.mark.parametrize("name", ["window", "full", "transformer-xl"])
def test_transformers_of_one_size_have_the_same_parameters(name: str) -> None:
    def size(which: str) -> int:
        return sum(p.numel() for p in small(which, **(OPTIONS | BOTH)).parameters())

    # The comparison compares memories: what is around them must be the same.
    assert size(name) == size("window")
