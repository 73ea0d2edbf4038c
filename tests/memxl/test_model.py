"""The memxl member: Transformer-XL where it must be, equal to loops, bounded, gradients where it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.controls.transformer_xl import TransformerXL, TransformerXLConfig
from benchmarks.controls.window import Window
from memory_models import Segment, collect_stats, create, memory_replay, unroll
from memory_models.transformer import TransformerConfig
from memxl import MemXL, MemXLConfig
from tests.reference.memxl import memxl as by_loops

TARGET = "memxl.model:MemXL"
DIM, LENGTH = 8, 5
OPTIONS: dict[str, Any] = {
    "dim": DIM,
    "depth": 2,
    "heads": 2,
    "segment_length": LENGTH,
    "mem_len": 3,
    "lmem_len": 3,
}
MATCHING = {"token_shift": True, "matching_layer": True}


def model(**options: Any) -> MemXL:
    made = create(TARGET, **(OPTIONS | options)).double().eval()
    assert isinstance(made, MemXL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def stream(segments: int = 4, rest: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, segments * LENGTH + rest, DIM, dtype=torch.float64)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"write_gradient": False},
    MATCHING,
    {**MATCHING, "persistent": 2, "long_layers": (0, -1), "mem_len": 7},
    {"gate": "nbrc", "mogrify": True, "write_iterations": 2, "mem_len": 5},
    {"write_heads": 4, "write_features": 3, "persistent": 1, "dim_head": 3},
    {"memory_layers": (0,), "long_layers": (1,), "mem_len": 0},
    {"memory_layers": (1,), "depth": 3, "long_layers": (0, 1), "write_gradient": False},
    {"lmem_len": 0, "persistent": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_model_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    made = model(**options)
    x = stream(3, rest=2).requires_grad_()
    seen, memory = unroll(made, x)
    rows = [by_loops(made, row) for row in x]
    wanted, slots = (torch.stack(parts) for parts in zip(*rows, strict=True))
    torch.testing.assert_close(seen, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(memory.long, slots, atol=1e-9, rtol=1e-9)
    inputs, push = [x, *made.parameters()], torch.randn_like(seen)
    ours, theirs = (
        torch.autograd.grad((y * push).sum() + long.sum(), inputs, allow_unused=True)
        for y, long in ((seen, memory.long), (wanted, slots))
    )
    names = ["x", *(name for name, _ in made.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        one, other = (torch.zeros((), dtype=x.dtype) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name)


def as_transformer_xl(made: MemXL, cache: int, **options: Any) -> TransformerXL:
    """The control with the same weights; its rotary pairs neighbouring channels."""
    sizes = {name: OPTIONS[name] for name in ("dim", "heads", "segment_length")}
    control = TransformerXL(TransformerXLConfig(cache=cache, depth=made.config.depth, **sizes, **options))
    width = DIM // 2
    # Channel 2i of the control is our channel i, channel 2i + 1 our channel i + width / 2.
    order = torch.arange(width).view(2, -1).T.flatten()
    order = torch.cat([order, width + order])
    weights = {}
    for name, value in made.state_dict().items():
        name = name.removeprefix("trunk.")
        parts = name.split(".")
        matching = made.config.matching_layer and parts[1] == str(made.config.depth - 1)
        if parts[0] == "attentions" and not matching:
            short = {"to_queries": "to_q", "to_keys": "to_k", "to_values": "to_v", "to_out": "to_out"}
            if parts[2] == "norm":
                name = f"norms.{parts[1]}.weight"
            else:
                name = f"attentions.{parts[1]}.{short[parts[2]]}.weight"
                value = value[order] if parts[2] in ("to_queries", "to_keys") else value
        weights[name] = value
    control = control.double().eval()
    control.load_state_dict(weights)
    return control


@pytest.mark.parametrize("options", [{}, MATCHING], ids=["plain", "matching"])
@pytest.mark.parametrize("mem_len", [0, 3, LENGTH, 8])
def test_without_slots_it_is_transformer_xl(mem_len: int, options: dict[str, Any]) -> None:
    made = model(lmem_len=0, mem_len=mem_len, depth=3, **options)
    control, x = as_transformer_xl(made, mem_len, **options), stream(4, rest=2)
    torch.testing.assert_close(unroll(made, x)[0], unroll(control, x)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, MATCHING], ids=["plain", "matching"])
def test_without_any_memory_it_is_the_window(options: dict[str, Any]) -> None:
    made, x = model(lmem_len=0, mem_len=0, **options), stream()
    sizes = {name: OPTIONS[name] for name in ("dim", "depth", "heads", "segment_length")}
    window = Window(TransformerConfig(**sizes, **options)).double().eval()
    window.load_state_dict(made.state_dict())
    torch.testing.assert_close(unroll(made, x)[0], unroll(window, x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"matching_layer": True}], ids=["plain", "matching"])
def test_with_enough_short_memory_segments_are_one_long_segment(depth: int, options: dict[str, Any]) -> None:
    x = stream(4)
    made = model(lmem_len=0, mem_len=4 * LENGTH, depth=depth, persistent=2, **options)
    whole = model(lmem_len=0, mem_len=0, depth=depth, persistent=2, segment_length=4 * LENGTH, **options)
    whole.load_state_dict(made.state_dict())
    torch.testing.assert_close(unroll(made, x)[0], whole(x)[0], atol=1e-12, rtol=0)


def test_a_distance_is_the_same_in_every_segment() -> None:
    # Once the short memory is full and the slots hold still, the same tokens give the same output.
    made = model(gate_bias=torch.inf, depth=1)
    tail = stream(2, batch=1)
    _, late = unroll(made, stream(50, batch=1))
    one, two = unroll(made, tail)[0], unroll(made, tail, late)[0]
    torch.testing.assert_close(one[:, LENGTH:], two[:, LENGTH:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, MATCHING], ids=["plain", "matching"])
def test_token_by_token_is_segment_by_segment(options: dict[str, Any]) -> None:
    made, x = model(mem_len=7, **options), stream(3)
    wanted, memory_wanted = unroll(made, x)
    outputs, memory = [], None
    for time in range(x.shape[1]):
        y, memory = made(x[:, time : time + 1], memory, close=(time + 1) % LENGTH == 0)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, atol=1e-12, rtol=0)
    assert memory is not None
    for path, leaf in memory_wanted.tensors().items():
        torch.testing.assert_close(memory.tensors()[path], leaf, atol=1e-12, rtol=0)


def test_a_segment_that_is_open_writes_nothing() -> None:
    made = model()
    _, memory = unroll(made, stream())
    _, opened = made(stream(1)[:, :3], memory, close=False)
    assert torch.equal(opened.long, memory.long)
    assert all(torch.equal(a, b) for a, b in zip(opened.short.hiddens, memory.short.hiddens, strict=True))
    closed = made.write(opened)
    assert not torch.equal(closed.long, memory.long)


def test_the_short_memory_is_what_entered_each_layer_last() -> None:
    made = model(mem_len=7, depth=3)
    entered: dict[int, list[Tensor]] = {}
    for layer, attention in enumerate(made.trunk.attentions):
        entered[layer] = []
        attention.register_forward_pre_hook(lambda _, args, seen=entered[layer]: seen.append(args[0]))
    _, memory = unroll(made, stream(3))
    assert memory.short.held.tolist() == [7, 7]
    for layer, kept in enumerate(memory.short.hiddens):
        torch.testing.assert_close(kept, torch.cat(entered[layer], 1)[:, -7:])


@pytest.mark.parametrize("gate", ["gru", "nbrc"])
def test_a_closed_gate_leaves_the_long_memory_unchanged(gate: str) -> None:
    made = model(gate=gate, gate_bias=torch.inf, write_iterations=3, mogrify=True)
    _, memory = unroll(made, stream())
    assert torch.equal(memory.long, made.init_memory(2).long)


def segment_gradients(made: MemXL, *, detach_every: int | None = None) -> list[float]:
    # Of the last segment's output, into the input of each segment.
    x = stream(5, batch=1).requires_grad_()
    y, _ = unroll(made, x, detach_every=detach_every)
    weights = torch.randn_like(y[:, -LENGTH:])
    (gradient,) = torch.autograd.grad((y[:, -LENGTH:] * weights).sum(), x)
    return [float(gradient[:, n * LENGTH : (n + 1) * LENGTH].abs().sum()) for n in range(5)]


def test_gradients_reach_all_that_was_written_and_stop_where_told() -> None:
    made = model()
    assert made.differentiable_memory
    assert all(size > 0 for size in segment_gradients(made))
    assert [size > 0 for size in segment_gradients(made, detach_every=2)] == [False] * 4 + [True]
    assert [size > 0 for size in segment_gradients(made, detach_every=3)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("write_gradient", [False, True])
@pytest.mark.parametrize("detach_every", [None, 2])
def test_memory_replay_gives_the_gradients_of_back_propagation_through_time(
    write_gradient: bool, detach_every: int | None
) -> None:
    made, x = model(write_gradient=write_gradient), stream(5)
    segments = Segment.cut(x, LENGTH)
    targets = torch.randn(5, DIM, dtype=torch.float64)
    replayed = memory_replay(
        made, segments, lambda y, n: (y - targets[n]).square().mean(), detach_every=detach_every
    )
    seen = {name: parameter.grad for name, parameter in made.named_parameters()}
    made.zero_grad()
    y, memory = unroll(made, x, detach_every=detach_every)
    sum(
        (part - target).square().mean() for part, target in zip(y.split(LENGTH, 1), targets, strict=True)
    ).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, atol=1e-10, rtol=1e-8, msg=name)
    torch.testing.assert_close(replayed.memory.long, memory.long.detach())


def test_without_write_gradient_only_the_writer_learns_through_the_slots() -> None:
    made = model(write_gradient=False)
    assert not made.differentiable_memory
    assert [size > 0 for size in segment_gradients(made)] == [False] * 4 + [True]
    _, memory = unroll(made, stream())
    gradients = torch.autograd.grad(memory.long.sum(), list(made.parameters()), allow_unused=True)
    reached = {name for (name, _), g in zip(made.named_parameters(), gradients, strict=True) if g is not None}
    assert reached
    assert all(name.startswith("writer.") for name in reached)


def test_the_short_memory_never_carries_a_gradient() -> None:
    made = model(lmem_len=0)
    assert not made.differentiable_memory
    assert [size > 0 for size in segment_gradients(made)] == [False] * 4 + [True]
    _, memory = unroll(model(), stream().requires_grad_())
    assert memory.long.requires_grad
    assert not any(hidden.requires_grad for hidden in memory.short.hiddens)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gate": "nbrc", "mogrify": True}], ids=str)
def test_the_long_memory_is_bounded_and_still_written_after_ten_thousand_segments(
    options: dict[str, Any],
) -> None:
    made = model(segment_length=2, mem_len=1, depth=1, **options).float()
    limit = float(made.init_memory(1).long.detach().abs().max().clamp(min=1))

    def written(memory: Any) -> Tensor:
        # What difference it makes to the slots whether one segment or another comes.
        one, two = (made(sign * probe, memory)[1].long for sign in (1, -1))
        return (one - two).norm()

    probe = torch.randn(1, 2, DIM)
    with torch.no_grad():
        memory = made.init_memory(1)
        early = written(unroll(made, torch.randn(1, 20, DIM))[1])
        for begin in range(0, 10_000, 1000):
            _, memory = unroll(made, 5 * torch.randn(1, 2000, DIM), memory)
            assert float(memory.long.abs().max()) <= limit, begin
        assert float(written(memory)) > 0.1 * float(early)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_long_memory_is_still_read_right_after_ten_thousand_segments() -> None:
    """Each segment begins with a symbol and ends with the question which one began the last but one.

    There is no short memory, so that what is found was in the slots, and written there over one write more.
    """
    torch.manual_seed(0)
    symbols, gap = 8, 2
    options = {"dim": 16, "depth": 1, "segment_length": 3, "mem_len": 0, "lmem_len": 4}
    made = create(TARGET, **(OPTIONS | options))
    embed, head = torch.nn.Embedding(symbols + 2, 16), torch.nn.Linear(16, symbols)

    def draw(rows: int, segments: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(symbols, (rows, segments))
        tokens = torch.full((rows, segments, 3), symbols)
        tokens[:, :, 0], tokens[:, :, -1] = drawn, symbols + 1
        return drawn, embed(tokens)

    parameters = [*made.parameters(), *embed.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(300):
        drawn, x = draw(64, 8)
        y = unroll(made, x.flatten(1, 2))[0].unflatten(1, (8, 3))
        answers = head(y[:, gap:, -1])
        loss = torch.nn.functional.cross_entropy(answers.flatten(0, 1), drawn[:, :-gap].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    def share(memory: Any, segments: int) -> tuple[float, Any]:
        drawn, x = draw(2, segments)
        y, memory = unroll(made, x.flatten(1, 2), memory)
        right = head(y.unflatten(1, (segments, 3))[:, gap:, -1]).argmax(-1) == drawn[:, :-gap]
        return float(right.float().mean()), memory

    made.eval()
    with torch.no_grad():
        early, memory = share(made.init_memory(2), 100)
        for _ in range(9):
            _, memory = share(memory, 1100)
        late, _ = share(memory, 100)
        drawn, x = draw(100, 1 + gap)
        # A memory that was emptied leaves one guess of eight.
        guessed = head(made(x[:, gap])[0][:, -1]).argmax(-1) == drawn[:, 0]
    assert early > 0.95
    assert late > 0.95
    assert float(guessed.float().mean()) < 0.4


def test_in_bfloat16_small_changes_add_up() -> None:
    # A gate that lets 1/3000 through changes nothing in bfloat16, whose steps are 1/256 of the value.
    exact = create(TARGET, **(OPTIONS | {"gate_bias": 8.0})).eval()
    half = create(TARGET, **(OPTIONS | {"gate_bias": 8.0})).eval()
    half.load_state_dict(exact.state_dict())
    half, x = half.bfloat16(), torch.randn(2, 50 * LENGTH, DIM)
    fresh = half.init_memory(2).long
    with torch.no_grad():
        wanted = unroll(exact, x)[1].long - exact.init_memory(2).long
        seen = unroll(half, x.bfloat16())[1].long - fresh
    assert fresh.dtype == torch.float32
    assert half.init_memory(2).short.hiddens[0].dtype == torch.bfloat16
    torch.testing.assert_close(seen, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0.1)


def test_autocast_keeps_the_slots_in_float32() -> None:
    made, x = model().float(), stream().float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, memory = unroll(made, x)
    with torch.no_grad():
        _, wanted = unroll(made, x)
    assert memory.long.dtype == torch.float32
    torch.testing.assert_close(memory.long, wanted.long, atol=0.1, rtol=0.1)


def test_the_bytes_of_the_memory_by_hand() -> None:
    segment = 4 * 2 * 2 * LENGTH * DIM + 8
    hiddens, short, long = 4 * 2 * LENGTH * DIM, 4 * 2 * 3 * DIM + 8, 4 * 3 * DIM
    made = MemXL(MemXLConfig(**OPTIONS))
    assert made.init_memory(3).nbytes == 3 * (segment + hiddens + short + long)


def test_diagnostics_say_where_attention_goes() -> None:
    made = model(persistent=2, long_layers=(0, 1))
    _, memory = unroll(made, stream())
    with collect_stats() as stats:
        made(stream(1), memory)
    for layer in range(2):
        long, short = (stats[f"memxl/layer {layer}/{name} share"] for name in ("long", "short"))
        assert long.shape == short.shape == (2, LENGTH, 2, 1)
        assert bool((long > 0).all())
        assert bool((short > 0).all())
        assert bool((long + short < 1).all())
    assert stats["memxl/slot norm"].shape == stats["memxl/slot change"].shape == (2, 3)


def test_an_empty_long_memory_costs_nothing() -> None:
    names = {name.split(".")[0] for name, _ in model(lmem_len=0).named_parameters()}
    assert names == {"trunk"}


def test_training_reaches_every_weight() -> None:
    for options in ({}, MATCHING, {"gate": "nbrc", "mogrify": True, "persistent": 2, "write_iterations": 2}):
        made = create(TARGET, **(OPTIONS | options))
        y, _ = unroll(made, stream(3).float())
        (y * torch.randn_like(y)).sum().backward()
        missing = [name for name, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert not missing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mem_len": -1}, "mem_len"),
        ({"lmem_len": -1}, "lmem_len"),
        ({"persistent": -1}, "persistent"),
        ({"write_iterations": 0}, "write_iterations"),
        ({"write_heads": 3}, "write_heads"),
        ({"write_features": 0}, "write_features"),
        ({"query_scale": 0.0}, "query_scale"),
        ({"key_scale": -1.0}, "key_scale"),
        ({"slot_scale": -1.0}, "slot_scale"),
        ({"gate": "lstm"}, "gru"),
        ({"gate_bias": torch.nan}, "gate_bias"),
        ({"memory_layers": (2,)}, r"memory_layers .* 0 to 1"),
        ({"long_layers": (0, 0)}, "long_layers .* different"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemXLConfig(**(OPTIONS | options))


def test_which_layers_have_a_memory() -> None:
    assert MemXLConfig(depth=3).layers_with_memory == (0, 1, 2)
    assert MemXLConfig(depth=3).layers_with_long_memory == (2,)
    assert MemXLConfig(depth=3, memory_layers=(-2,), long_layers=(0, -1)).layers_with_memory == (1,)
    assert MemXLConfig(depth=3, memory_layers=(-2,), long_layers=(0, -1)).layers_with_long_memory == (0, 2)
    assert MemXLConfig(lmem_len=0, long_layers=(0,)).layers_with_long_memory == ()
    assert MemXLConfig(segment_length=7).short_length == 7
