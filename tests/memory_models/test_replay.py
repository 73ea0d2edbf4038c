"""Memory replay against one graph over the whole rollout: the same loss, gradients and memory."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memory_models import Memory, Replay, Segment, memory_replay, memory_state, unroll
from memory_models.lm import cross_entropy
from memory_models.models import config_fields
from tests.members import MEMBERS, VARIANTS, small, small_lm
from tests.memory_models.toys import Average, Mean, MeanConfig
from tests.reference.replay import full_graph

DIM, LENGTH = 16, 6


def drain(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by name; the model has none afterwards."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_equal(
    seen: dict[str, Tensor | None], wanted: dict[str, Tensor | None], rel: float = 1e-10
) -> None:
    assert any(gradient is not None and gradient.any() for gradient in wanted.values())
    assert seen.keys() == wanted.keys()
    for name, gradient in wanted.items():
        other = seen[name]
        assert (other is None) == (gradient is None), name
        if gradient is not None and other is not None:
            assert (other - gradient).norm() <= rel * gradient.norm(), name


def assert_same_memory(seen: Any, wanted: Any) -> None:
    for one, two in zip(pytree.tree_leaves(seen), pytree.tree_leaves(wanted), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, two.detach(), atol=1e-12, rtol=1e-12, equal_nan=True)


def squared(segments: list[Any], dim: int = DIM) -> Callable[[Any, int], Tensor]:
    """Distance to a random target for each segment."""
    targets = [torch.randn(dim, dtype=torch.float64) for _ in segments]
    return lambda y, index: (y - targets[index]).square().mean()


def compare(model: nn.Module, segments: list[Any], loss_fn: Any, memory: Any = None, **options: Any) -> None:
    """Run both from the same seed."""
    torch.manual_seed(1)
    wanted, after = full_graph(model, segments, loss_fn, memory, **options)
    expected, drawn = drain(model), torch.rand(1)
    torch.manual_seed(1)
    loss, now, losses = memory_replay(model, segments, loss_fn, memory, check=True, **options)
    # Training goes on with the random numbers it would have had.
    assert torch.equal(torch.rand(1), drawn)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    assert not loss.requires_grad
    assert len(losses) == len(segments)
    assert_equal(drain(model), expected)
    assert_same_memory(now, after)


def rollout(*, time: int = 4 * LENGTH - 2, dim: int = DIM) -> dict[str, Any]:
    """A long input with ragged rows, NaN at padding, and documents that begin inside segments."""
    x = torch.randn(3, time, dim, dtype=torch.float64)
    mask = torch.ones(3, time, dtype=torch.bool)
    mask[1, -5:] = False
    mask[2, 3:9] = False
    reset = torch.zeros(3, time, dtype=torch.bool)
    reset[0, 8] = reset[2, LENGTH] = True
    return {"x": torch.where(mask[..., None], x, torch.nan), "mask": mask, "reset": reset}


def dropout(name: str) -> dict[str, Any]:
    return {"dropout": 0.3} if "dropout" in config_fields(name) else {}


@pytest.mark.parametrize(
    ("name", "options"), [*((name, dropout(name)) for name in MEMBERS), *VARIANTS], ids=str
)
def test_members_with_masks_resets_and_dropout(name: str, options: dict[str, Any]) -> None:
    model = small(name, **options).double().train()
    segments = Segment.cut(**rollout(), length=min(LENGTH, model.segment_length))
    compare(model, segments, squared(segments))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("asked", [(3,), (0, 2)])
def test_a_loss_wherever_it_is_asked(name: str, asked: tuple[int, ...]) -> None:
    model = small(name).double()
    segments = list(torch.randn(2, 4 * LENGTH - 1, DIM, dtype=torch.float64).split(LENGTH, 1))
    loss_fn = squared(segments)
    compare(model, segments, lambda y, index: loss_fn(y, index) if index in asked else None)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("count", [1, 2])
def test_short_horizons(name: str, count: int) -> None:
    model = small(name).double()
    segments = list(torch.randn(count, 2, LENGTH, DIM, dtype=torch.float64))
    compare(model, segments, squared(segments))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("detach_every", [1, 2])
def test_truncation_is_where_unroll_truncates(name: str, detach_every: int) -> None:
    model = small(name).double()
    x = torch.randn(2, 5 * LENGTH, DIM, dtype=torch.float64)
    loss_fn = squared([None] * 5)
    y, after = unroll(model, x, detach_every=detach_every)
    wanted: Any = sum(loss_fn(part, index) for index, part in enumerate(y.split(LENGTH, 1)))
    wanted.backward()
    expected = drain(model)
    loss, memory, _ = memory_replay(model, x.split(LENGTH, 1), loss_fn, detach_every=detach_every)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    assert_equal(drain(model), expected)
    assert_same_memory(memory, after)


@pytest.mark.parametrize("name", [name for name in MEMBERS if small(name).differentiable_memory])
def test_the_gradient_through_the_memory_is_in_it(name: str) -> None:
    # Else the other laws would hold for a replay that carries nothing.
    model = small(name).double()
    segments = list(torch.randn(4, 2, LENGTH, DIM, dtype=torch.float64))
    loss_fn = squared(segments)
    memory_replay(model, segments, loss_fn)
    full = drain(model)
    memory_replay(model, segments, loss_fn, detach_every=1)
    cut = drain(model)
    differences = [
        float((one - two).norm() / one.norm())
        for one, two in zip(full.values(), cut.values(), strict=True)
        if one is not None and two is not None
    ]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", MEMBERS)
def test_language_models_with_tokens_and_padding(name: str) -> None:
    model = small_lm(name, **dropout(name)).train()
    labels = torch.randint(11, (3, 20))
    case = rollout(time=20)
    ids = torch.where(case["mask"], torch.randint(11, (3, 20)), -100)
    segments = Segment.cut(ids, LENGTH, mask=case["mask"], reset=case["reset"])
    parts = torch.where(case["mask"], labels, -100).split(LENGTH, 1)
    compare(model, segments, lambda logits, index: cross_entropy(logits, parts[index]))


def test_the_head_is_left_out_where_only_the_memory_counts() -> None:
    model = small_lm("gru")
    calls: list[str] = []
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    model.module.register_forward_hook(lambda *_: calls.append("module"))
    memory_replay(model, list(torch.randint(11, (4, 2, LENGTH))), lambda y, _: y.square().mean())
    assert calls == ["module"] * 3 + ["module", "head"] * 4


def test_carry_stands_for_the_model_in_the_first_pass() -> None:
    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Mean().double(), nn.Linear(4, 3).double()
            self.decoded = 0

        def forward(self, x: Tensor, memory: Any) -> Any:
            y, memory = self.encoder(x, memory)
            self.decoded += 1
            return self.decoder(y), memory

    model = Decoded()
    segments = list(torch.randn(4, 2, 5, 4, dtype=torch.float64))
    loss_fn = squared(segments, 3)
    full_graph(model, segments, loss_fn)
    expected, model.decoded = drain(model), 0
    memory_replay(model, segments, loss_fn, carry=model.encoder)
    assert model.decoded == 4
    assert_equal(drain(model), expected)


@memory_state
class Chain(Memory):
    """The memories of two modules in series, and a cache of what went between them."""

    first: Any
    second: Any
    cache: Tensor


class Series(nn.Module):
    """Two recurrent modules with a cache of the last tokens between them, as Transformer-XL keeps it."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.first, self.second = Mean(MeanConfig(dim=3, segment_length=4)), Average()
        self.between = nn.Linear(3, 3)
        self.detached = detached
        self.requiring: list[bool] = []

    def forward(self, x: Tensor, memory: Any = None, **flags: Any) -> Any:
        if memory is None:
            rows = x.shape[0]
            cache = x.new_zeros(rows, 3, 3)
            memory = Chain(
                first=self.first.init_memory(rows), second=self.second.init_memory(rows), cache=cache
            )
        self.requiring.append(memory.cache.requires_grad)
        hidden, first = self.first(x, memory.first, **flags)
        hidden = hidden + self.between(memory.cache).tanh().mean(1, keepdim=True)
        y, second = self.second(hidden, memory.second, **flags)
        cache = torch.cat([memory.cache, hidden], 1)[:, -3:]
        return y, Chain(first=first, second=second, cache=cache.detach() if self.detached else cache)


@pytest.mark.parametrize("detached", [True, False])
def test_modules_in_series_with_a_transformer_xl_cache(detached: bool) -> None:
    model = Series(detached=detached).double()
    x = torch.randn(2, 18, 3, dtype=torch.float64)
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, 5:7] = False
    segments = Segment.cut(x, 4, mask=mask)
    model.requiring.clear()
    compare(model, segments, squared(segments, 3))
    # The cache is asked for a gradient exactly where the one graph has it: 5 calls there, 4 + 5 in replay.
    wanted = [False] + [not detached] * 4
    assert model.requiring == wanted + wanted[:4] + wanted[::-1]


def test_a_plain_function_over_any_pytree_is_a_model() -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def model(x: dict[str, Tensor], memory: Any = None) -> Any:
        state, count = memory or (torch.zeros(2, 3, dtype=torch.float64), 0)
        state = torch.tanh(x["input"] @ weight + state)
        return state * x["gain"], (state, count + 1)

    segments = [
        Segment(x={"input": torch.randn(2, 3, dtype=torch.float64), "gain": torch.rand(2, 1)})
        for _ in range(5)
    ]
    loss_fn = squared(segments, 3)
    wanted, after = full_graph(model, segments, loss_fn)
    expected, weight.grad = weight.grad, None
    loss, memory, _ = memory_replay(model, segments, loss_fn)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=0)
    assert memory[1] == after[1] == 5
    torch.testing.assert_close(memory[0], after[0].detach())


@pytest.mark.parametrize("kind", ["leaf", "graph"])
def test_the_memory_given_gets_its_gradient(kind: str) -> None:
    model = small("gru").double()
    segments = list(torch.randn(3, 2, LENGTH, DIM, dtype=torch.float64))
    loss_fn = squared(segments)
    with torch.no_grad():
        _, start = model(torch.randn(2, LENGTH, DIM, dtype=torch.float64))
    leaves = [leaf for leaf in start.tensors().values() if leaf.is_floating_point()]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (full_graph, memory_replay):
        for leaf in (*leaves, scale):
            leaf.requires_grad_(True).grad = None
        memory = start if kind == "leaf" else start.map(lambda t: t * scale if t.is_floating_point() else t)
        run(model, segments, loss_fn, memory)
        names = [*leaves, *([scale] if kind == "graph" else [])]
        found.append({str(place): leaf.grad for place, leaf in enumerate(names)} | drain(model))
    assert_equal(found[1], found[0])


def test_inputs_that_share_one_graph_get_their_gradients() -> None:
    encoder, model = nn.Linear(5, DIM).double(), small("gru").double()
    raw = torch.randn(2, 4 * LENGTH, 5, dtype=torch.float64, requires_grad=True)
    loss_fn = squared([None] * 4)
    found = []
    for run in (full_graph, memory_replay):
        raw.grad = None
        run(model, list(encoder(raw).split(LENGTH, 1)), loss_fn)
        found.append({"raw": raw.grad} | drain(encoder) | {f"model.{k}": v for k, v in drain(model).items()})
    assert_equal(found[1], found[0])


def test_pieces_of_an_open_segment() -> None:
    model = small("full").double()
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    segments = [
        Segment(x=x[:, :2], close=False),
        Segment(x=x[:, 2:5], close=torch.tensor([True, False])),
        Segment(x=x[:, 5:6], close=True),
        Segment(x=x[:, 6:]),
    ]
    compare(model, segments, squared(segments))


def test_calls_accumulate() -> None:
    model = small("gru").double()
    one, two = torch.randn(2, 3, 2, LENGTH, DIM, dtype=torch.float64)
    loss_fn = squared(list(one))
    full_graph(model, list(one), loss_fn)
    _, memory = full_graph(model, list(two), loss_fn)
    expected = drain(model)
    first = memory_replay(model, list(one), loss_fn)
    second = memory_replay(model, list(two), loss_fn)
    assert_equal(drain(model), expected)
    assert_same_memory(second.memory, memory)
    # The next rollout goes on from the memory of the last, and what is left requires no gradient.
    memory_replay(model, list(two), loss_fn, first.memory)
    full_graph(copy.deepcopy(model), list(two), loss_fn, first.memory)


def test_frozen_parameters_stay_without_gradient() -> None:
    model = small("gru").double()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    segments = list(torch.randn(3, 2, LENGTH, DIM, dtype=torch.float64))
    compare(model, segments, squared(segments))


class Held:
    """A saved tensor that is counted as long as it lives."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that is saved would else keep itself alive.
        self.tensor = tensor.detach()


def most_saved(run: Callable[[], Any]) -> int:
    """The most bytes that autograd held at one time."""
    alive = most = 0

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def pack(tensor: Tensor) -> Held:
        nonlocal alive, most
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        alive += size
        most = max(most, alive)
        weakref.finalize(held, release, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = run()
    # Whatever it returns keeps no activation alive.
    assert not isinstance(result, Replay) or alive == 0
    return most


@pytest.mark.parametrize("name", [name for name in MEMBERS if small(name).differentiable_memory])
def test_saved_activations_do_not_grow_with_the_horizon(name: str) -> None:
    model = small(name)

    def replayed(count: int) -> int:
        segments = list(torch.randn(count, 2, LENGTH, DIM))
        return most_saved(lambda: memory_replay(model, segments, lambda y, _: y.square().mean()))

    def unrolled(count: int) -> int:
        segments = list(torch.randn(count, 2, LENGTH, DIM))
        return most_saved(lambda: full_graph(model, segments, lambda y, _: y.square().mean()))

    two, eight, many = replayed(2), replayed(8), replayed(32)
    assert eight <= 1.05 * two
    assert many == eight
    assert unrolled(8) > 3.5 * unrolled(2)


def test_clipping_of_the_gradient_through_the_memory() -> None:
    model = Mean(MeanConfig(dim=2, segment_length=3)).double()
    segments = list(torch.randn(4, 3, 3, 2, dtype=torch.float64))
    loss_fn = squared(segments, 2)
    memories: list[Any] = [model.init_memory(3)]
    for x in segments[:-1]:
        memories.append(model(x, memories[-1])[1].detach())

    def chain(limit: float) -> Tensor:
        """By hand: the gradient of each segment's memory, cut down before it is handed on; its norms."""
        at, norms = torch.zeros(3, 2, dtype=torch.float64), []
        for index in reversed(range(4)):
            total = memories[index].total.detach().requires_grad_()
            y, after = model(segments[index], replace(memories[index], total=total))
            (loss_fn(y, index) + (after.total * at).sum()).backward()
            assert total.grad is not None
            norms.append(total.grad.norm(dim=1))
            at = torch.stack([row * min(1.0, limit / float(row.norm())) for row in total.grad])
        return torch.stack(norms[:-1])

    limit = float(chain(math.inf).median())
    unclipped = drain(model)
    norms = chain(limit)
    expected = drain(model)
    assert bool((norms > limit).any())
    assert bool((norms < limit).any())
    with pytest.raises(AssertionError):
        assert_equal(unclipped, expected, rel=1e-3)
    memory_replay(model, segments, loss_fn, clip_memory_gradient=limit)
    assert_equal(drain(model), expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    memory_replay(model, segments, loss_fn, clip_memory_gradient=limit, scaler=scaler)
    assert_equal({name: g if g is None else g / 256 for name, g in drain(model).items()}, expected)


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (lambda y, memory: y, r"a Tensor of shape \(2, 6, 16\)"),
        (lambda y, memory: (y,), "a tuple of 1: Tensor"),
        (lambda y, memory: (y, memory, y), "a tuple of 3: Tensor, Tensor, Tensor"),
        (lambda y, memory: {"output": y, "memory": memory}, "a dict"),
    ],
)
@pytest.mark.parametrize("segments", [1, 2])
def test_a_model_that_does_not_return_output_and_memory_is_refused(
    returned: Any, seen: str, segments: int
) -> None:
    weight = torch.ones(DIM, requires_grad=True)

    def model(x: Tensor, memory: Tensor | None) -> Any:
        y = x * weight if memory is None else x * weight + memory[:, None]
        return returned(y, y.mean(1))

    with pytest.raises(TypeError, match=rf"must return \(output, memory\), got {seen}"):
        memory_replay(model, [torch.randn(2, 6, DIM)] * segments, lambda y, _: y.square().mean())
    assert weight.grad is None
