"""Memory replay and all that a forward pass changes beside its return value; and what it refuses."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memory_models import Memory, Segment, collect_stats, memory_replay, memory_state
from tests.memory_models.test_replay import assert_equal, drain, squared
from tests.memory_models.toys import Mean, MeanConfig
from tests.reference.replay import full_graph

DIM = 4


class Noisy(Mean):
    """Draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> Any:
        x = nn.functional.dropout(x, 0.5) * random.random() * np.random.rand()  # noqa: NPY002
        return super().read(x * torch.rand(DIM, generator=self.own), memory, lengths)


class Buffered(Mean):
    """Buffers written in place (also by BatchNorm) and replaced, on which the output depends."""

    count: Tensor
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("fixed", torch.arange(3))

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> Any:
        self.count += 1
        self.gain = self.gain * 0.7
        x = self.norm(x.flatten(0, 1)).view_as(x) * self.count.clone() + self.gain + self.norm.running_mean
        return super().read(x, memory, lengths)


@memory_state
class StoreMemory(Memory):
    """How much of the store belongs to a state, what waits for it, and a state with gradient."""

    written: Tensor
    pending: Tensor
    state: Tensor


class Stored(nn.Module):
    """Reads the mean of what an outside store held at the time of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(DIM, DIM)
        self.store: list[Tensor] = []

    def forward(self, x: Tensor, memory: Any = None, **_: Any) -> Any:
        if memory is None:
            zeros = x.new_zeros(x.shape[0], DIM)
            memory = StoreMemory(written=torch.zeros(x.shape[0]).long(), pending=zeros, state=zeros)
        old = self.store[: int(memory.written[0])]
        read = torch.stack(old).mean(0) if old else torch.zeros_like(memory.state)
        state = (self.mix(x).mean(1) + memory.state + read).tanh()
        return state, replace(memory, pending=state.detach(), state=state)

    def commit(self, memory: Any) -> Any:
        self.store.append(memory.pending)
        return replace(
            memory, written=memory.written + 1, pending=torch.zeros_like(memory.pending), state=memory.state
        )


def inputs(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 3, 5, DIM, dtype=torch.float64))


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


@pytest.mark.parametrize("count", [1, 4])
def test_every_generator_is_replayed_and_left_where_one_pass_leaves_it(count: int) -> None:
    model, segments = Noisy().double(), inputs(count)
    loss_fn = squared(segments, DIM)
    found, after = [], []
    for run in (full_graph, memory_replay):
        seed()
        model.own.manual_seed(3)
        options: dict[str, Any] = {"generators": [model.own], "check": True} if run is memory_replay else {}
        run(model, segments, loss_fn, **options)
        found.append(drain(model))
        left = [torch.rand(1), torch.rand(1, generator=model.own)]
        after.append([*map(float, left), random.random(), np.random.rand()])  # noqa: NPY002
    assert_equal(found[1], found[0])
    assert after[1] == after[0]


def test_a_generator_that_is_not_replayed_is_found() -> None:
    model, segments = Noisy().double(), inputs(3)
    with pytest.raises(RuntimeError, match=r"segment 1 left another memory\.total"):
        memory_replay(model, segments, squared(segments, DIM), check=True)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_updated_once_and_seen_as_they_were(count: int, training: bool) -> None:
    model, segments = Buffered().double().train(training), inputs(count)
    other = copy.deepcopy(model)
    loss_fn = squared(segments, DIM)
    for _ in range(2):
        full_graph(other, segments, loss_fn)
        memory_replay(model, segments, loss_fn, check=True)
        assert_equal(drain(model), drain(other))
        wanted = dict(other.named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, wanted[name], rtol=0, atol=0, msg=name)


def test_an_error_in_the_middle_leaves_buffers_as_after_the_first_pass() -> None:
    model, segments = Buffered().double(), inputs(4)

    def loss_fn(y: Tensor, index: int) -> Tensor:
        if index == 1:
            raise KeyError("target 1")
        return y.square().mean()

    with pytest.raises(KeyError, match="target 1"):
        memory_replay(model, segments, loss_fn)
    assert float(model.count) == 4


def test_an_outside_store_is_written_once_and_read_as_it_was() -> None:
    model, segments = Stored().double(), inputs(5)
    loss_fn = squared(segments, DIM)
    full_graph(model, segments, loss_fn, commit=model.commit)
    expected, wanted = drain(model), model.store
    model.store = []
    memory = memory_replay(model, segments, loss_fn, check=True).memory
    assert_equal(drain(model), expected)
    assert len(model.store) == 5
    torch.testing.assert_close(torch.stack(model.store), torch.stack(wanted))
    assert memory.written.tolist() == [5] * 3


def test_open_segments_are_not_committed() -> None:
    model, segments = Stored().double(), inputs(3)
    parts = [Segment(x=x, close=index != 1) for index, x in enumerate(segments)]
    memory_replay(model, parts, squared(segments, DIM))
    assert len(model.store) == 2


def test_a_commit_that_carries_gradient_is_refused() -> None:
    class Doubled(Stored):
        def commit(self, memory: Any) -> Any:
            return replace(memory, state=memory.state * 2)

    with pytest.raises(RuntimeError, match=r"commit returned a new tensor with gradient at \.state"):
        memory_replay(Doubled().double(), inputs(), squared(inputs(), DIM))


def test_diagnostics_are_those_of_the_last_segment() -> None:
    model, segments = Mean().double(), inputs(4)
    with collect_stats() as wanted:
        full_graph(model, segments, squared(segments, DIM))
    with collect_stats() as seen:
        memory_replay(model, segments, squared(segments, DIM))
    torch.testing.assert_close(seen, wanted)


def test_the_scaler_scales_each_gradient_once() -> None:
    model, segments = Mean().double(), inputs(4)
    loss_fn = squared(segments, DIM)
    full_graph(model, segments, loss_fn)
    expected = drain(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = memory_replay(model, segments, loss_fn, scaler=scaler).loss
    assert float(loss) == pytest.approx(float(memory_replay(copy.deepcopy(model), segments, loss_fn).loss))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.unscale_(optimizer)
    assert_equal(drain(model), expected)


class WithoutAutocast(torch.autograd.Function):
    """Notes in its backward pass whether autocast is on."""

    seen: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        WithoutAutocast.seen.append(torch.is_autocast_enabled("cpu"))
        return gradients[0]


def test_autocast_is_on_in_both_forward_passes_and_in_no_backward_pass() -> None:
    model = Mean(MeanConfig(dim=16, segment_length=5))
    segments = list(torch.randn(4, 3, 5, 16))
    seen: list[bool] = []
    model.mix.register_forward_hook(lambda *out: seen.append(out[2].dtype == torch.bfloat16))
    WithoutAutocast.seen.clear()

    def loss_fn(y: Tensor, _: int) -> Tensor:
        return WithoutAutocast.apply(y).square().mean()

    full_graph(model, segments, loss_fn)
    exact = drain(model)
    seen.clear()
    WithoutAutocast.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        memory_replay(model, segments, loss_fn)
        replayed = drain(model)
        # Weights changed here and now are not hidden by a cast kept from before.
        with torch.no_grad():
            before = model(segments[0])[0]
            model.mix.weight.zero_()
        memory_replay(model, segments, loss_fn)
        assert not torch.equal(model(segments[0])[0], before)
    assert all(seen)
    assert WithoutAutocast.seen == [False] * 8
    assert_equal(replayed, exact, rel=0.02)


def test_what_is_not_finite_is_not_hidden() -> None:
    model, segments = Mean().double(), inputs(4)
    loss = memory_replay(
        model,
        segments,
        lambda y, index: y.mean() * (torch.nan if index == 2 else 1),
        clip_memory_gradient=1.0,
    ).loss
    assert loss.isnan()
    assert all(bool(gradient.isnan().all()) for gradient in drain(model).values() if gradient is not None)


def mean(y: Tensor, _: int) -> Tensor:
    return y.mean()


@pytest.mark.parametrize(
    ("segments", "loss_fn", "options", "error", "message"),
    [
        ([], mean, {}, ValueError, "at least one segment, got none"),
        (torch.zeros(2, 9, DIM), mean, {}, TypeError, r"one tensor \(2, 9, 4\); cut it .* Segment.cut"),
        (["a"], mean, {}, TypeError, r"segment 0 must be a tensor or a Segment, got <class 'str'>"),
        ([torch.zeros(2, 3, DIM), torch.zeros(1, 3, DIM)], mean, {}, ValueError, "segment 1 has 1 rows"),
        (None, lambda y, _: y, {}, ValueError, r"shape \(3, 5, 4\) for segment 2; reduce it"),
        (None, lambda y, _: y.mean().item(), {}, TypeError, r"got <class 'float'> for segment 2"),
        (None, lambda y, _: None, {}, ValueError, "no loss depends on anything that requires gradient"),
        (
            None,
            lambda y, _: y.mean().detach(),
            {},
            ValueError,
            "a loss computed from the output and not detached",
        ),
        (None, mean, {"detach_every": 0}, ValueError, r"detach_every \(0\) must be at least 1"),
        (
            None,
            mean,
            {"clip_memory_gradient": 0.0},
            ValueError,
            r"clip_memory_gradient \(0.0\) must be positive",
        ),
    ],
)
def test_wrong_arguments(
    segments: Any, loss_fn: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Mean().double()
    with pytest.raises(error, match=message):
        memory_replay(model, inputs(3) if segments is None else segments, loss_fn, **options)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_must_not_be_switched_off() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad\(\)"):
        memory_replay(Mean().double(), inputs(), mean)


def test_cutting_an_input() -> None:
    x = torch.arange(14).view(2, 7)
    mask, starts = x % 3 > 0, x % 5 == 0
    cut = Segment.cut(x, 3, mask=mask, reset=starts)
    for field, whole in (("x", x), ("mask", mask), ("reset", starts)):
        parts = [getattr(segment, field) for segment in cut]
        assert [part.shape[1] for part in parts] == [3, 3, 1]
        assert torch.equal(torch.cat(parts, 1), whole)
    once = Segment.cut(x, 3, reset=torch.tensor([True, False]))
    assert [segment.reset is None for segment in once] == [False, True, True]
    assert once[0].flags().keys() == {"reset"}
    with pytest.raises(ValueError, match=r"length \(0\) must be at least 1"):
        Segment.cut(x, 0)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\), expected \(2, 7\)"):
        Segment.cut(x, 3, mask=mask[:, 1:])
    with pytest.raises(TypeError, match="reset must be a bool tensor"):
        Segment.cut(x, 3, reset=x)
    with pytest.raises(ValueError, match=r"takes x \[batch, time, ...\], got \(7,\)"):
        Segment.cut(x[0], 3)
