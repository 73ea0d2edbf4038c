"""Long input through short segments: where it is cut, where the gradient is cut, what is carried."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import memory_models
from memory_models import MemoryLM, MemoryModule, Segment, unroll
from tests.members import MEMBERS, small, small_lm
from tests.memory_models.toys import Average, Mean, MeanConfig

LENGTH = 6


class Watched(Mean):
    """Notes what each call was given."""

    def __init__(self) -> None:
        super().__init__(MeanConfig(dim=1, segment_length=4))
        self.calls: list[tuple[int, Any]] = []

    def forward(self, x: Tensor, memory: Any = None, *, close: Any = True, **options: Any) -> Any:
        self.calls.append((x.shape[1], close))
        return super().forward(x, memory, close=close, **options)


def assert_close(seen: Any, wanted: Any) -> None:
    theirs = wanted.tensors()
    for path, leaf in seen.tensors().items():
        torch.testing.assert_close(leaf, theirs[path], atol=1e-10, rtol=1e-10, msg=path)


@pytest.mark.parametrize(
    ("time", "segment", "close", "calls"),
    [
        (8, None, True, [(4, True), (4, True)]),
        (9, None, True, [(4, True), (4, True), (1, True)]),
        (9, None, False, [(4, True), (4, True), (1, False)]),
        (8, None, False, [(4, True), (4, True)]),
        (5, 2, True, [(2, True), (2, True), (1, True)]),
        (3, None, False, [(3, False)]),
        (0, None, False, [(0, False)]),
    ],
)
def test_where_the_input_is_cut(
    time: int, segment: int | None, close: bool, calls: list[tuple[int, bool]]
) -> None:
    model = Watched()
    y, memory = unroll(model, torch.randn(2, time, 1), segment=segment, close=close)
    assert model.calls == calls
    assert y.shape == (2, time, 1)
    assert memory.filled.tolist() == [0 if calls[-1][1] else calls[-1][0]] * 2


@pytest.mark.parametrize("opened", [0, 1, 3, 4])
def test_an_open_segment_is_completed_first(opened: int) -> None:
    model = Watched()
    x = torch.randn(2, 11, 1)
    wanted, after = unroll(model, x)
    _, memory = model(x[:, :opened], close=False)
    model.calls.clear()
    y, now = unroll(model, x[:, opened:], memory)
    assert [size for size, _ in model.calls] == [4 - opened, 4, 3]
    torch.testing.assert_close(y, wanted[:, opened:])
    torch.testing.assert_close(now.total, after.total)


def test_an_open_segment_longer_than_the_cut_ends_before_the_first_token() -> None:
    model = Watched()
    _, memory = model(torch.randn(2, 3, 1), close=False)
    model.calls.clear()
    y, memory = unroll(model, torch.randn(2, 4, 1), memory, segment=2)
    assert model.calls == [(0, True), (2, True), (2, True)]
    assert y.shape == (2, 4, 1)
    assert memory.count.tolist() == [7, 7]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("cut", [1, 5, 6, 7, 14, 18])
def test_going_on_where_the_last_call_stopped(name: str, cut: int) -> None:
    model = small(name).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted, after = unroll(model, x)
        first, memory = unroll(model, x[:, :cut], close=False)
        second, memory = unroll(model, x[:, cut:], memory)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted, atol=1e-10, rtol=1e-10)
    assert_close(memory, after)


@pytest.mark.parametrize("detach_every", [1, 2, 3, None])
def test_the_gradient_is_cut_exactly_there(detach_every: int | None) -> None:
    model = Mean(MeanConfig(dim=2, segment_length=3)).double()
    x = torch.randn(1, 5 * 3, 2, dtype=torch.float64, requires_grad=True)
    y, memory = unroll(model, x, detach_every=detach_every)
    for segment in range(5):
        (gradient,) = torch.autograd.grad(y[:, 3 * segment + 2].sum(), x, retain_graph=True)
        reached = {i for i in range(5) if gradient[:, 3 * i : 3 * i + 3].abs().sum() > 0}
        first = 0 if detach_every is None else segment // detach_every * detach_every
        assert reached == set(range(first, segment + 1))
    torch.testing.assert_close(y, unroll(model, x)[0], atol=0, rtol=0)
    # After the last segment it is for the caller to cut.
    assert memory.total.requires_grad


def test_the_gradient_of_the_full_control_is_cut_there_too() -> None:
    model = small("full", context=64).double()
    x = torch.randn(1, 4 * LENGTH, 16, dtype=torch.float64, requires_grad=True)
    y, _ = unroll(model, x, detach_every=2)
    weights = torch.randn(16, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y[:, -1] @ weights).sum(), x)
    assert not gradient[:, : 2 * LENGTH].any()
    assert (gradient[:, 2 * LENGTH :].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["htm", "window", "gru"])
def test_both_forms_of_a_reset_mean_the_first_token(name: str) -> None:
    model = small(name).double()
    x = torch.randn(3, 14, 16, dtype=torch.float64)
    with torch.no_grad():
        _, memory = unroll(model, torch.randn(3, 12, 16, dtype=torch.float64))
        rows = torch.tensor([True, False, True])
        starts = torch.zeros(3, 14, dtype=torch.bool)
        starts[:, 0] = rows
        one, two = unroll(model, x, memory, reset=rows), unroll(model, x, memory, reset=starts)
        fresh, kept = unroll(model, x), unroll(model, x, memory)
    assert torch.equal(one[0], two[0])
    assert_close(one[1], two[1])
    torch.testing.assert_close(one[0], torch.where(rows[:, None, None], fresh[0], kept[0]))


def test_masks_and_resets_are_cut_with_the_input() -> None:
    model = Mean(MeanConfig(dim=2, segment_length=4)).double()
    x = torch.randn(2, 10, 2, dtype=torch.float64)
    mask = torch.rand(2, 10) < 0.7
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 6] = reset[1, 4] = True
    y, memory = unroll(model, x, mask=mask, reset=reset)
    for row, start in ((0, 6), (1, 4)):
        # What follows the reset: the rest of the segment in which it lies, then the segments after it.
        real = x[row : row + 1, start:][:, mask[row, start:]]
        state, outputs = model.init_memory(1), []
        rest = 4 - int(mask[row, :start].sum()) % 4
        for piece in (real[:, :rest], *real[:, rest:].split(4, 1)):
            out, state = model(piece, state)
            outputs.append(out)
        seen = y[row : row + 1, start:][:, mask[row, start:]]
        torch.testing.assert_close(seen, torch.cat(outputs, 1), atol=1e-12, rtol=0)
        torch.testing.assert_close(memory.total[row : row + 1], state.total, atol=1e-12, rtol=0)


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("opened", [0, 2])
@pytest.mark.parametrize("name", MEMBERS)
def test_padding_anywhere_changes_nothing(name: str, opened: int, close: bool) -> None:
    model, time = small(name).double().eval(), 3 * LENGTH + 1
    x = torch.randn(5, time, 16, dtype=torch.float64)
    mask = torch.ones(5, time, dtype=torch.bool)
    mask[0, :4] = False  # in front
    mask[1, -8:] = False  # behind, more than a segment
    mask[2, [0, 3, 4, 11]] = False  # between
    mask[3] = False
    reset = torch.zeros_like(mask)
    reset[0, 2] = reset[1, -3] = reset[2, 4] = reset[2, 9] = True
    with torch.no_grad():
        _, memory = model(torch.randn(5, opened, 16, dtype=torch.float64), close=False)
        y, after = unroll(
            model, torch.where(mask[..., None], x, torch.nan), memory, mask=mask, reset=reset, close=close
        )
        assert not y[~mask].any()
        for row in range(5):
            own, only = mask[row], torch.tensor([row])
            begins = reset[row]
            if row in (0, 2):
                # Alone, the document that begins at padding begins at the next token.
                begins = begins.clone()
                begins[4 if row == 0 else 5] = True
            wanted, kept = unroll(
                model, x[only][:, own], memory.select(only), reset=begins[own][None], close=close
            )
            if row == 1:
                # The last document has no token.
                kept = model.init_memory(1)
            torch.testing.assert_close(y[only][:, own], wanted, atol=1e-10, rtol=1e-10)
            assert_close(after.select(only), kept)


def test_a_language_model_gives_logits() -> None:
    model = small_lm("htm")
    ids = torch.randint(11, (2, 15))
    logits, memory = unroll(model, ids)
    assert logits.shape == (2, 15, 11)
    wanted, state = unroll(model.module, model.embedding(ids) * model.embedding_scale)
    torch.testing.assert_close(logits, model.head(wanted), atol=1e-12, rtol=0)
    assert_close(memory, state)


def test_a_module_that_is_no_subclass_can_be_unrolled() -> None:
    model = Average()
    x = torch.randn(2, 11, 3)
    y, memory = unroll(model, x)  # type: ignore[arg-type]
    state = torch.zeros(2, 3)
    for time in range(11):
        state = (state + model.mix(x[:, time])) / 2
        torch.testing.assert_close(y[:, time], state)
    torch.testing.assert_close(memory.average, state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"segment": 0}, ValueError, r"segment \(0\) must lie between 1 and segment_length \(5\)"),
        ({"segment": 6}, ValueError, r"segment \(6\) must lie between 1 and segment_length \(5\)"),
        ({"detach_every": 0}, ValueError, r"detach_every \(0\) must be at least 1, or None"),
        (
            {"mask": torch.ones(2, 13, dtype=torch.bool)},
            ValueError,
            r"mask has shape \(2, 13\), expected \(2, 12\)",
        ),
        ({"mask": torch.ones(2, 12)}, TypeError, "mask must be a bool tensor"),
        ({"reset": torch.ones(1, dtype=torch.bool)}, ValueError, r"reset has shape \(1,\), expected \(2,\)"),
        ({"reset": torch.tensor([0, 1])}, TypeError, "reset must be a bool tensor"),
        ({"reset": torch.ones(2, 11, dtype=torch.bool)}, ValueError, r"reset has shape \(2, 11\)"),
    ],
)
def test_wrong_options_are_refused_before_any_segment_is_read(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    class Unread(Mean):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("a segment was read")

    with pytest.raises(error, match=message):
        unroll(Unread(), torch.randn(2, 12, 4), **options)


def test_input_without_a_time_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("x [batch, time, ...], got (12,)")):
        unroll(MemoryLM(Mean(), vocab_size=3), torch.zeros(12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
        ({"mask": [True]}, TypeError, r"mask must be a bool tensor \[2, 9\], got list"),
        ({"reset": True}, TypeError, r"reset must be a bool tensor \[2, 9\], got bool"),
        (
            {"mask": torch.ones(2, 9, dtype=torch.bool, device="meta")},
            ValueError,
            "mask is on meta, the input on cpu",
        ),
    ],
)
def test_what_is_no_tensor_or_elsewhere_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"x": torch.randn(2, 9, 4)} | options
    with pytest.raises(error, match=message):
        unroll(Mean(), **given)
    with pytest.raises(error, match=message):
        Segment.cut(length=5, **given)


def test_open_rows_of_different_length_are_refused() -> None:
    model: MemoryModule[Any] = Mean()
    mask = torch.tensor([[True, True], [True, False]])
    _, memory = model(torch.randn(2, 2, 4), mask=mask, close=False)
    before = memory.map(torch.clone)
    with pytest.raises(ValueError, match=r"differ in length \(\[2, 1\]\); end it with close=True"):
        unroll(model, torch.randn(2, 9, 4), memory)
    assert_close(memory, before)


@pytest.mark.parametrize("close", [True, False])
def test_an_outside_store_is_written_once_after_each_segment(close: bool) -> None:
    model = memory_models.create("window", dim=8, depth=1, heads=2, segment_length=4)
    seen: list[int] = []
    model.commit = lambda memory: (seen.append(int(memory.open_length[0])), memory)[1]  # type: ignore[method-assign]
    memory_models.unroll(model, torch.randn(1, 10, 8), close=close)
    assert seen == [0] * (3 if close else 2)
