"""What `MemoryModule.forward` does for every member, and that errors leave the memory as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from memory_models import Memory, MemoryModule, create, unroll
from tests.members import MEMBERS, OWN, SMALL, small
from tests.memory_models.toys import Mean, MeanConfig, MeanMemory

DIM, LENGTH = 16, 6


def bits(memory: Memory) -> list[bytes]:
    return [leaf.detach().numpy().tobytes() for leaf in pytree.tree_leaves(memory)]


def assert_close(seen: Memory, wanted: Memory) -> None:
    assert pytree.tree_structure(seen) == pytree.tree_structure(wanted)
    for path, leaf in wanted.tensors().items():
        torch.testing.assert_close(seen.tensors()[path], leaf, atol=1e-10, rtol=1e-10, msg=path)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


Case = tuple[Callable[[MemoryModule[Any], Tensor, Any], Any], type[Exception], str]
MISTAKES: dict[str, Case] = {
    "rank": (lambda m, x, s: m(x[0], s), ValueError, r"takes x \[batch, time, 16\], got \(4, 16\)"),
    "width": (lambda m, x, s: m(x[..., 1:], s), ValueError, r"takes x \[batch, time, 16\], got \(3, 4, 15\)"),
    "integers": (lambda m, x, s: m(x.long(), s), TypeError, "floating-point embeddings, got torch.int64"),
    "dtype": (lambda m, x, s: m(x.double(), s), TypeError, r"weights are torch\.float32; convert one: x\.to"),
    "device": (lambda m, x, s: m(x.to("meta"), s), ValueError, "x is on meta but .* weights are on cpu"),
    "too long": (
        lambda m, x, s: m(torch.cat([x, x], 1), s),
        ValueError,
        r"8 tokens, more than segment_length \(6\); cut it with memory_models\.unroll",
    ),
    "fewer rows": (lambda m, x, s: m(x[:2], s), ValueError, r"x has 2 rows but the memory has 3; .*select"),
    "no memory": (lambda m, x, s: m(x, x), TypeError, "memory must be what init_memory or the last call"),
    "other memory": (
        lambda m, x, s: m(x, Mean().init_memory(3)),
        TypeError,
        r"carries a \w+, got a MeanMemory",
    ),
    "memory dtype": (
        lambda m, x, s: m(x, s.to(dtype=torch.float64)),
        TypeError,
        r"is torch\.float64, this module keeps it in torch\.float32; use memory\.to\(module",
    ),
    "memory device": (
        lambda m, x, s: m(x, s.to("meta")),
        ValueError,
        r"is on meta, x on cpu; use memory\.to\('cpu'\)",
    ),
    "x is a list": (lambda m, x, s: m(x.tolist(), s), TypeError, "x must be a tensor, got list"),
    "x is none": (lambda m, x, s: m(None, s), TypeError, "x must be a tensor, got NoneType"),
    "mask is an array": (
        lambda m, x, s: m(x, s, mask=ones(3, 4).numpy()),
        TypeError,
        r"mask must be a bool tensor \[3, 4\], got ndarray",
    ),
    "mask device": (
        lambda m, x, s: m(x, s, mask=ones(3, 4).to("meta")),
        ValueError,
        r"mask is on meta, the input on cpu; use mask\.to\('cpu'\)",
    ),
    "reset is a bool": (
        lambda m, x, s: m(x, s, reset=True),
        TypeError,
        r"reset must be a bool tensor \[3, 4\], got bool",
    ),
    "reset device": (
        lambda m, x, s: m(x, s, reset=ones(3).to("meta")),
        ValueError,
        "reset is on meta, the input on cpu",
    ),
    "close is a list": (
        lambda m, x, s: m(x, s, close=[True, False, True]),
        TypeError,
        r"close must be a bool or a bool tensor \[3\], got list",
    ),
    "close device": (
        lambda m, x, s: m(x, s, close=ones(3).to("meta")),
        ValueError,
        "close is on meta, the input on cpu",
    ),
    "mask shape": (
        lambda m, x, s: m(x, s, mask=ones(3, 5)),
        ValueError,
        r"mask has shape \(3, 5\), expected \(3, 4\)",
    ),
    "mask dtype": (lambda m, x, s: m(x, s, mask=ones(3, 4).float()), TypeError, "mask must be a bool tensor"),
    "reset rows": (
        lambda m, x, s: m(x, s, reset=ones(4)),
        ValueError,
        r"reset has shape \(4,\), expected \(3,\)",
    ),
    "reset time": (
        lambda m, x, s: m(x, s, reset=ones(3, 3)),
        ValueError,
        r"reset has shape \(3, 3\), expected \(3, 4\)",
    ),
    "reset dtype": (lambda m, x, s: m(x, s, reset=ones(3).long()), TypeError, "reset must be a bool tensor"),
    "close rows": (lambda m, x, s: m(x, s, close=ones(2)), ValueError, r"close has shape \(2,\)"),
    "close dtype": (lambda m, x, s: m(x, s, close=ones(3).int()), TypeError, "close must be a bool tensor"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_mistake_is_named_and_the_memory_is_left_bit_for_bit(name: str, mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    model = small(name)
    with torch.no_grad():
        _, memory = unroll(model, torch.randn(3, 15, DIM), close=False)
        x = torch.randn(3, 4, DIM)
        wanted, before = model(x[:, :1], memory)[0], bits(memory)
        with pytest.raises(error, match=message):
            call(model, x, memory)
        assert bits(memory) == before
        # Nor is there a trace in the module.
        assert torch.equal(model(x[:, :1], memory)[0], wanted)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "gru"])
def test_an_open_segment_that_would_overflow_is_refused(name: str) -> None:
    model = small(name)
    _, memory = model(torch.randn(2, 4, DIM), close=False)
    before = bits(memory)
    with pytest.raises(ValueError, match=r"would hold 7 tokens, more than segment_length \(6\); end it"):
        model(torch.randn(2, 3, DIM), memory)
    assert bits(memory) == before
    # Padding takes no room, and a row that begins anew has all of it.
    short = torch.arange(3) < 2
    model(torch.randn(2, 3, DIM), memory, mask=short.expand(2, 3))
    model(torch.randn(2, 6, DIM), memory, reset=ones(2))
    with pytest.raises(ValueError, match="would hold 7 tokens"):
        model(torch.randn(2, 3, DIM), memory, reset=torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("window", {"depth": 2}, {"depth": 3}),
        ("window", {"depth": 3}, {"depth": 2}),
        ("window", {"token_shift": True}, {}),
        ("htm", {}, {"chunks": 4}),
        ("htm", {}, {"memory_layers": (0,)}),
        ("htm", {"memory_layers": (0,)}, {}),
        ("full", {}, {"context": 10}),
        ("transformer-xl", {}, {"cache": 4}),
        ("gru", {}, {"depth": 1}),
    ],
)
def test_the_memory_of_a_module_with_other_options_is_refused(
    name: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    memory = small(name, **other).init_memory(2)
    with pytest.raises(ValueError, match="it comes from a module with other options"):
        small(name, **one)(torch.randn(2, 4, DIM), memory)


def test_a_module_without_memory_given_starts_afresh_each_time() -> None:
    model, x = Mean(), torch.randn(2, 3, 4)
    model(x)
    wanted = torch.cumsum(model.mix(x), 1) / torch.tensor([1.0, 2.0, 3.0])[:, None]
    torch.testing.assert_close(model(x)[0], wanted)


def test_documents_packed_in_one_call_by_hand() -> None:
    model = Mean(MeanConfig(dim=1, segment_length=6))
    with torch.no_grad():
        model.mix.weight.fill_(1.0)
        model.mix.bias.fill_(0.0)
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 3.0, 4.0, torch.nan]])[..., None]
    reset = torch.tensor([[False, False, True, False, True], [False] * 5])
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    old = MeanMemory(
        count=torch.tensor([2, 4]),
        total=torch.tensor([[20.0], [40.0]]),
        filled=torch.tensor([1, 0]),
        open_total=torch.tensor([[5.0], [0.0]]),
    )
    y, memory = model(x, old, reset=reset, mask=mask)
    # Row 0: mean of (5, 1), of (5, 1, 2) and the past 20 / 2; then 4; (4 + 8) / 2; then 16.
    # Row 1: the past 40 / 4 and the mean of what is not padding.
    wanted = [[13.0, 8 / 3 + 10, 4.0, 6.0, 16.0], [11.0, 0.0, 12.0, 8 / 3 + 10, 0.0]]
    torch.testing.assert_close(y[..., 0], torch.tensor(wanted))
    assert memory.count.tolist() == [1, 7]
    assert memory.total.flatten().tolist() == [16.0, 48.0]
    assert memory.filled.tolist() == [0, 0]


def test_reset_memory_without_a_reset_returns_the_memory_itself() -> None:
    model = Mean()
    memory = model.init_memory(2)
    assert model.reset_memory(memory, torch.zeros(2, dtype=torch.bool)) is memory
    with pytest.raises(TypeError, match="rows must be a bool tensor"):
        model.reset_memory(memory, torch.tensor([1, 0]))


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """A stream of segments with padding and resets anywhere, and another way of cutting each segment."""
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        time = draw(st.integers(1, LENGTH))
        segments.append(
            {
                "x": torch.randn(batch, time, DIM, generator=generator, dtype=torch.float64),
                "mask": torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0])),
                "reset": torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.0, 0.2])),
                "cuts": sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=3)) & set(range(1, time))),
            }
        )
    return {"batch": batch, "segments": segments}


def fuzzed(name: str) -> MemoryModule[Any]:
    torch.manual_seed(1)
    return small(name, token_shift=True, matching_layer=True).double()


MODELS = {name: fuzzed(name) for name in ("window", "htm")}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20)
@given(stream=streams())
def test_masks_resets_and_cuts_agree_with_each_row_alone(name: str, stream: dict[str, Any]) -> None:
    model = MODELS[name]
    with torch.no_grad():
        whole = pieces = model.init_memory(stream["batch"])
        alone = [model.init_memory(1) for _ in range(stream["batch"])]
        for segment in stream["segments"]:
            x, mask, reset = segment["x"], segment["mask"], segment["reset"]
            poisoned = torch.where(mask[..., None], x, torch.nan)
            y, whole = model(poisoned, whole, mask=mask, reset=reset)
            # Row by row and document by document, without padding.
            for row in range(stream["batch"]):
                starts = [0, *(t for t in range(1, x.shape[1]) if reset[row, t]), x.shape[1]]
                if reset[row, 0]:
                    alone[row] = model.init_memory(1)
                for begin, end in itertools.pairwise(starts):
                    if begin:
                        alone[row] = model.init_memory(1)
                    kept = [t for t in range(begin, end) if mask[row, t]]
                    wanted, alone[row] = model(x[row : row + 1, kept], alone[row], close=end == x.shape[1])
                    torch.testing.assert_close(y[row : row + 1, kept], wanted, atol=1e-10, rtol=1e-10)
                assert_close(whole.select(torch.tensor([row])), alone[row])
            assert not y[~mask].any()
            # In pieces.
            cuts = [0, *segment["cuts"], x.shape[1]]
            parts = []
            for begin, end in itertools.pairwise(cuts):
                part, pieces = model(
                    poisoned[:, begin:end],
                    pieces,
                    mask=mask[:, begin:end],
                    reset=reset[:, begin:end],
                    close=end == x.shape[1],
                )
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), y, atol=1e-10, rtol=1e-10)
            assert_close(pieces, whole)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    model = small(name)
    x = torch.randn(2, 3 * LENGTH, DIM)
    with torch.no_grad():
        wanted, _ = unroll(model, x)
        half = copy.deepcopy(model).to(dtype)
        seen, memory = unroll(half, x.to(dtype))
    assert seen.dtype == dtype
    # A member may keep an accumulator in float32, but what it keeps so it keeps so for good.
    fresh = half.init_memory(2).tensors()
    assert {path: leaf.dtype for path, leaf in memory.tensors().items()} == {
        path: leaf.dtype for path, leaf in fresh.items()
    }
    assert dtype in {leaf.dtype for leaf in fresh.values()}
    assert (seen.float() - wanted).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * wanted.norm()


@pytest.mark.parametrize("name", MEMBERS)
def test_under_autocast_the_memory_keeps_its_dtype(name: str) -> None:
    model = small(name)
    x = torch.randn(2, 4, DIM)
    with torch.no_grad():
        wanted, _ = unroll(model, torch.cat([x, x, x], 1), segment=4)
        with torch.autocast("cpu", torch.bfloat16):
            y, memory = model(x)
            y, memory = model(x[:, :2], memory, close=False)
            y, memory = model(x[:, 2:], memory)
            y, memory = model(x, memory)
    fresh = model.init_memory(2).tensors()
    assert {path: leaf.dtype for path, leaf in memory.tensors().items()} == {
        path: leaf.dtype for path, leaf in fresh.items()
    }
    assert (y.float() - wanted[:, 8:]).norm() < 0.05 * wanted[:, 8:].norm()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_model_made_on_the_meta_device_takes_real_weights(name: str) -> None:
    real = small(name)
    options = {k: v for k, v in SMALL.items() if name != "gru" or k != "heads"} | OWN.get(name, {})
    with torch.device("meta"):
        hollow = create(name, **options).eval()
    assert {leaf.device.type for leaf in hollow.init_memory(2).tensors().values()} == {"meta"}
    hollow.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 2 * LENGTH, DIM)
    with torch.no_grad():
        assert torch.equal(unroll(hollow, x)[0], unroll(real, x)[0])


# x-transformers asks for the autocast dtype of the input's device, and meta has none.
@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "transformer-xl"])
def test_shapes_can_be_had_on_the_meta_device(name: str) -> None:
    model, x = small(name), torch.randn(3, 4, DIM)
    options = {"mask": ones(3, 4), "reset": ones(3), "close": ones(3)}
    _, wanted = model(x, model.init_memory(3), **options)
    hollow = model.to("meta")
    y, memory = hollow(
        x.to("meta"), hollow.init_memory(3), **{key: flags.to("meta") for key, flags in options.items()}
    )
    assert y.shape == x.shape
    assert {path: leaf.shape for path, leaf in memory.tensors().items()} == {
        path: leaf.shape for path, leaf in wanted.tensors().items()
    }


def test_a_module_may_change_its_dtype_between_calls() -> None:
    model = Mean()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y, memory = model.to(dtype)(torch.randn(1, 2, 4).to(dtype))
        y, memory = model(torch.randn(1, 2, 4).to(dtype), memory)
        assert y.dtype == memory.total.dtype == dtype


@pytest.mark.parametrize("name", MEMBERS)
def test_checkpointing_from_the_first_call_on_changes_no_gradient(name: str) -> None:
    def gradients(model: MemoryModule[Any], *, recompute: bool) -> list[Tensor | None]:
        leaves, layout = pytree.tree_flatten(model.init_memory(2))
        total = torch.zeros(())
        torch.manual_seed(3)
        for piece in x.split(LENGTH, 1):

            def segment(*leaves: Tensor, piece: Tensor = piece) -> tuple[Tensor, ...]:
                y, memory = model(piece, pytree.tree_unflatten(leaves, layout))
                return y, *pytree.tree_leaves(memory)

            y, *leaves = checkpoint(segment, *leaves, use_reentrant=False) if recompute else segment(*leaves)
            total = total + (y**2).mean()
        total.backward()
        return [parameter.grad for parameter in model.parameters()]

    x = torch.randn(2, 3 * LENGTH, DIM)
    model = small(name).train()
    again = copy.deepcopy(model)  # neither has been called
    for seen, wanted in zip(gradients(again, recompute=True), gradients(model, recompute=False), strict=True):
        torch.testing.assert_close(seen, wanted)
