"""The memformer member: equal to loops over tokens and slots, and what its memory does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.controls.window import Window
from memformer import MemformerConfig, MemformerDecoder, SlotWrite
from memory_models import check_model, collect_stats, create, create_lm, unroll
from memory_models.transformer import TransformerConfig
from tests.reference.memformer import memformer as by_loops

DIM, LENGTH, SLOTS = 8, 4, 3
OPTIONS: dict[str, Any] = {"dim": DIM, "depth": 2, "heads": 2, "segment_length": LENGTH, "slots": SLOTS}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"token_shift": True, "matching_layer": True},
    {"write": "gru"},
    {"memory_layers": (0, -1), "write_iterations": 2},
    {"write_heads": 4, "dim_head": 3, "temperature": 1.0, "memory_layers": (0,)},
    {"write": "gru", "write_heads": 1, "write_iterations": 2, "depth": 1, "dropout": 0.1},
    {"slots": 1, "own_bias": -1.0, "forgetting": 2.0},
    {
        "write": "gru",
        "memory_layers": (0, 1),
        "token_shift": True,
        "matching_layer": True,
        "segment_length": 1,
    },
]


def model(**options: Any) -> MemformerDecoder:
    made = create("memformer", **(OPTIONS | options)).double().eval()
    assert isinstance(made, MemformerDecoder)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    # Compiling, the slowest rule, is tested where every member and option is.
    check_model(model(**options).float(), skip=["compile"])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_model_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    made = model(**options)
    length = made.segment_length
    x = torch.randn(2, 3 * length - length // 2, DIM, dtype=torch.float64, requires_grad=True)
    y, memory = unroll(made, x)
    wanted, slots = (torch.stack(parts) for parts in zip(*(by_loops(made, row) for row in x), strict=True))
    torch.testing.assert_close(y, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(memory.slots, slots, atol=1e-9, rtol=1e-9)
    push, push_slots = torch.randn_like(y), torch.randn_like(slots)
    names, inputs = ["x", *dict(made.named_parameters())], [x, *made.parameters()]
    ours, theirs = (
        torch.autograd.grad((out * push).sum() + (held * push_slots).sum(), inputs, allow_unused=True)
        for out, held in ((y, memory.slots), (wanted, slots))
    )
    for name, one, other in zip(names, ours, theirs, strict=True):
        # The loops do not touch what a segment of one token has no use for.
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name)


def test_a_model_that_reads_nothing_is_the_transformer_without_memory() -> None:
    made = model(memory_layers=(0, 1), token_shift=True, matching_layer=True)
    for read in made.reads:
        read.to_out.weight.data.zero_()  # type: ignore[union-attr, operator]
    options = {key: value for key, value in OPTIONS.items() if key != "slots"}
    window = Window(TransformerConfig(**options, token_shift=True, matching_layer=True)).double().eval()
    weights = made.state_dict()
    window.load_state_dict({name: weights[name] for name in window.state_dict()})
    x = torch.randn(2, 3 * LENGTH, DIM, dtype=torch.float64)
    torch.testing.assert_close(unroll(made, x)[0], unroll(window, x)[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("write", ["bmn", "gru"])
def test_a_segment_reads_what_the_one_before_left(write: str) -> None:
    # Nothing of a segment reaches its own tokens through the slots, everything the next one's.
    made = model(write=write, depth=1)
    x = torch.randn(1, 2 * LENGTH, DIM, dtype=torch.float64)
    first, memory = made(x[:, :LENGTH])
    opened = made(x[:, :LENGTH], close=False)[1]
    assert torch.equal(opened.slots, made.init_memory(1).slots)
    assert not torch.allclose(memory.slots, opened.slots)
    again = made(x[:, LENGTH:], memory)[0]
    assert not torch.allclose(again, made(x[:, LENGTH:])[0])
    torch.testing.assert_close(torch.cat([first, again], 1), unroll(made, x)[0], atol=1e-13, rtol=0)


def test_slots_stay_on_the_unit_sphere_and_finite_over_many_segments() -> None:
    made = model()
    memory = made.init_memory(2)
    for _ in range(100):
        y, memory = made(100 * torch.randn(2, LENGTH, DIM, dtype=torch.float64), memory)
        memory = memory.detach()
    assert bool(y.isfinite().all())
    torch.testing.assert_close(memory.slots.norm(dim=-1), torch.ones(2, SLOTS).double(), atol=1e-14, rtol=0)


def test_without_new_input_a_document_goes_back_to_where_it_began() -> None:
    made = model()
    _, memory = unroll(made, torch.randn(1, 3 * LENGTH, DIM, dtype=torch.float64))
    fresh = made.init_memory(1).slots
    assert float((memory.slots - fresh).detach().norm()) > 0.1
    assert isinstance(made.writer, SlotWrite)
    made.writer.own_bias.data.fill_(1e6)
    made.writer.bias.data.mul_(0.5 / made.writer.bias.detach().norm(dim=-1, keepdim=True))
    _, memory = unroll(made, torch.randn(1, 90 * LENGTH, DIM, dtype=torch.float64), memory)
    torch.testing.assert_close(memory.slots, fresh, atol=1e-12, rtol=0)


@pytest.mark.parametrize("write", ["bmn", "gru"])
def test_a_row_that_reads_only_padding_keeps_its_slots_to_the_last_bit(write: str) -> None:
    made = model(write=write)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    _, memory = made(x)
    mask = torch.tensor([[False] * LENGTH, [True] * LENGTH])
    _, after = made(x, memory, mask=mask)
    assert torch.equal(after.slots[0], memory.slots[0])
    assert not torch.allclose(after.slots[1], memory.slots[1])


@pytest.mark.parametrize("options", VARIANTS[:6], ids=str)
def test_a_later_loss_trains_every_weight(options: dict[str, Any]) -> None:
    made = create("memformer", **(OPTIONS | options))
    y, _ = unroll(made, torch.randn(2, 3 * LENGTH, DIM))
    (y[:, 2 * LENGTH :] * torch.randn(2, LENGTH, DIM)).sum().backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def test_diagnostics_come_with_the_language_model() -> None:
    lm = create_lm("memformer", vocab_size=7, **OPTIONS)
    tokens = torch.randint(7, (2, LENGTH))
    assert lm(tokens).stats == {}
    stats = lm(tokens, stats=True).stats
    written = {f"memformer/write/{name}": (2, SLOTS) for name in ("own share", "moved", "slot norm")}
    heads = OPTIONS["heads"]
    read = {
        "memformer/layer 1/largest slot share": (2, LENGTH, heads),
        "memformer/layer 1/slots used": (2,),
    }
    assert {name: tuple(value.shape) for name, value in stats.items()} == written | read
    with collect_stats() as open_stats:
        lm.module(torch.randn(2, LENGTH, DIM), close=False)
    assert open_stats.keys() == read.keys()


def test_the_last_layer_reads_unless_told_otherwise() -> None:
    assert MemformerConfig(depth=12).layers_with_memory == (11,)
    assert MemformerConfig(depth=3, memory_layers=(0, -1)).layers_with_memory == (0, 2)
    assert MemformerConfig(heads=8).heads_of_write == 8
    assert MemformerConfig(heads=8, write_heads=2).heads_of_write == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, r"slots \(0\) must be at least 1"),
        ({"write_iterations": 0}, r"write_iterations \(0\)"),
        ({"write": "lstm"}, r"write \('lstm'\) must be one of 'bmn', 'gru'"),
        ({"write_heads": 0}, r"write_heads \(0\)"),
        ({"write_heads": 3}, r"dim \(8\) must be divisible by the heads of the write \(3\)"),
        ({"heads": 3, "dim_head": 2}, "give write_heads"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
        ({"forgetting": float("inf")}, "forgetting"),
        ({"own_bias": float("nan")}, "own_bias"),
        ({"memory_layers": ()}, "memory_layers"),
        ({"memory_layers": (2,)}, "of 0 to 1"),
        ({"memory_layers": (1, -1)}, "different"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemformerConfig(**(OPTIONS | options))
