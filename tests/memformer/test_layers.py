"""Reading and writing slots: equal to loops over slots and tokens, and the laws of the paper's write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, zeros

from memformer import GatedSlotWrite, SlotAttention, SlotWrite
from memory_models import collect_stats
from tests.reference import memformer as by_loops

DIM, SLOTS, TIME = 8, 5, 4
Write = SlotWrite | GatedSlotWrite
# So large that no token gets any weight: exp(-1e6) is 0.
CLOSED = 1e6

WRITES: list[tuple[type[Write], dict[str, Any]]] = [
    (SlotWrite, {"heads": 2}),
    (SlotWrite, {"heads": 1, "temperature": 1.0, "own_bias": 0.0, "forgetting": 1.5}),
    (SlotWrite, {"heads": 4, "iterations": 3}),
    (GatedSlotWrite, {"heads": 2}),
    (GatedSlotWrite, {"heads": 8, "iterations": 2}),
]
both = pytest.mark.parametrize(("kind", "options"), WRITES, ids=str)


def shaken(module: nn.Module) -> Any:
    """The module in float64, with all weights moved so that none is special."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def make(kind: type[Write], options: dict[str, Any]) -> Any:
    return shaken(kind(DIM, slots=SLOTS, **options))


def sphere(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def closed_write(forgetting: float = 0.2) -> SlotWrite:
    """A write whose slots attend to nothing but themselves."""
    return SlotWrite(DIM, slots=SLOTS, heads=2, forgetting=forgetting, own_bias=CLOSED).double()


def assert_same_gradients(module: nn.Module, inputs: list[Tensor], seen: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(seen, wanted, atol=1e-10, rtol=1e-10)
    push, names = torch.randn_like(seen), [f"input {n}" for n in range(len(inputs))]
    named = [*zip(names, inputs, strict=True), *module.named_parameters()]
    found = [
        torch.autograd.grad((out * push).sum(), [leaf for _, leaf in named], allow_unused=True)
        for out in (seen, wanted)
    ]
    for (name, _), one, other in zip(named, *found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9, msg=name)


@both
def test_the_write_equals_loops_in_values_and_gradients(kind: type[Write], options: dict[str, Any]) -> None:
    write = make(kind, options)
    slots, hiddens = sphere(2, SLOTS, DIM).requires_grad_(), tokens(2, TIME, DIM).requires_grad_()
    loop = getattr(by_loops, "slot_write" if kind is SlotWrite else "gated_slot_write")
    wanted = torch.stack([loop(write, *row) for row in zip(slots, hiddens, strict=True)])
    assert_same_gradients(write, [slots, hiddens], write(slots, hiddens), wanted)


@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 3, "dim_head": 5}, {"heads": 1}], ids=str)
def test_the_read_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    read = shaken(SlotAttention(DIM, **options))
    x, slots = tokens(2, TIME, DIM).requires_grad_(), sphere(2, SLOTS, DIM).requires_grad_()
    wanted = torch.stack([by_loops.slot_attention(read, *row) for row in zip(x, slots, strict=True)])
    assert_same_gradients(read, [x, slots], read(x, slots), wanted)


@both
def test_a_padded_write_is_the_write_of_the_real_tokens(kind: type[Write], options: dict[str, Any]) -> None:
    write = make(kind, options)
    slots, hiddens = sphere(3, SLOTS, DIM), tokens(3, TIME, DIM)
    mask = torch.tensor([[True] * 4, [False, True, False, True], [False] * 4])
    seen = write(slots, torch.where(mask[..., None], hiddens, torch.nan), mask)
    torch.testing.assert_close(seen[:1], write(slots[:1], hiddens[:1]), atol=1e-14, rtol=0)
    torch.testing.assert_close(seen[1:2], write(slots[1:2], hiddens[1:2, mask[1]]), atol=1e-14, rtol=0)
    assert torch.equal(seen[2], slots[2])


@both
def test_a_row_without_tokens_passes_its_gradient_on(kind: type[Write], options: dict[str, Any]) -> None:
    write = make(kind, options)
    slots = sphere(1, SLOTS, DIM).requires_grad_()
    hiddens = torch.full((1, TIME, DIM), torch.nan, dtype=torch.float64, requires_grad=True)
    kept = write(slots, hiddens, torch.zeros(1, TIME, dtype=torch.bool))
    weight = torch.randn_like(kept)
    through, into = torch.autograd.grad((kept * weight).sum(), [slots, hiddens])
    assert torch.equal(through, weight)
    assert not bool(into.any())
    assert torch.equal(write(slots, tokens(1, 0, DIM)), slots)


@both
def test_a_slot_is_written_without_regard_to_the_others(kind: type[Write], options: dict[str, Any]) -> None:
    write = make(kind, options)
    slots, hiddens = sphere(1, SLOTS, DIM), tokens(1, TIME, DIM)
    other = slots.clone()
    other[:, 2] = -other[:, 2]
    one, two = write(slots, hiddens), write(other, hiddens)
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(one[:, rest], two[:, rest], atol=1e-15, rtol=0)
    assert not torch.allclose(one[:, 2], two[:, 2])


@both
def test_the_order_of_the_tokens_does_not_matter(kind: type[Write], options: dict[str, Any]) -> None:
    write = make(kind, options)
    slots, hiddens = sphere(2, SLOTS, DIM), tokens(2, TIME, DIM)
    torch.testing.assert_close(
        write(slots, hiddens.flip(1)), write(slots, hiddens), atol=1e-13, rtol=0, msg="order"
    )


@pytest.mark.parametrize("kind", [SlotWrite, GatedSlotWrite])
def test_slots_may_be_numbered_in_any_order(kind: type[Write]) -> None:
    write, order = make(kind, {"heads": 2}), torch.tensor([3, 0, 4, 1, 2])
    own = "bias" if kind is SlotWrite else "start"
    slots, hiddens = sphere(2, SLOTS, DIM), tokens(2, TIME, DIM)
    wanted, begin = write(slots, hiddens)[:, order], write.initial()[order]
    getattr(write, own).data = getattr(write, own).data[order]
    torch.testing.assert_close(write(slots[:, order], hiddens), wanted, atol=1e-14, rtol=0)
    torch.testing.assert_close(write.initial(), begin, atol=0, rtol=0)


def test_slots_stay_on_the_unit_sphere() -> None:
    write = make(SlotWrite, {"heads": 2})
    slots = write.initial().expand(2, -1, -1)
    for _ in range(20):
        torch.testing.assert_close(slots.norm(dim=-1), torch.ones(2, SLOTS).double(), atol=1e-15, rtol=0)
        slots = write(slots, 10 * tokens(2, TIME, DIM))


def test_a_slot_that_attends_to_itself_keeps_what_it_holds() -> None:
    write = closed_write()
    write.bias.data.zero_()
    slots = sphere(2, SLOTS, DIM)
    torch.testing.assert_close(write(slots, tokens(2, TIME, DIM)), slots, atol=1e-15, rtol=0)


def test_what_is_not_renewed_is_forgotten_at_the_rate_of_the_bias() -> None:
    write, slots = closed_write(0.3), sphere(1, SLOTS, DIM)
    forgetting, goal, angles = write.bias.detach().norm(dim=-1), write.initial(), []
    cosine = (slots[0] * goal).sum(-1)
    for _ in range(60):
        slots = write(slots, tokens(1, TIME, DIM))
        # |m + v|^2 = 1 + 2 r cos + r^2, of which m + v has cos + r along v.
        cosine = (cosine + forgetting) / (1 + 2 * forgetting * cosine + forgetting**2).sqrt()
        torch.testing.assert_close((slots[0] * goal).sum(-1), cosine, atol=1e-12, rtol=0)
        angles.append((slots[0] - goal).norm(dim=-1))
    # Near v the angle shrinks by 1 + r at each write: geometric.
    torch.testing.assert_close(angles[39] / angles[59], (1 + forgetting) ** 20, rtol=1e-4, atol=0)


def test_the_initial_state_is_what_is_left_when_all_is_forgotten() -> None:
    write = closed_write()
    initial = write.initial()[None]
    torch.testing.assert_close(initial[0], write.bias / write.bias.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(write(initial, tokens(1, TIME, DIM)), initial, atol=1e-15, rtol=0)


def test_without_a_temperature_left_a_slot_takes_one_token_or_nothing() -> None:
    write = shaken(SlotWrite(DIM, slots=SLOTS, heads=1, temperature=1e-6, own_bias=0.0))
    slots, hiddens = sphere(SLOTS, DIM), tokens(TIME, DIM)
    normed = F.rms_norm(slots, (DIM,), write.slot_norm.weight)
    to_query, to_key, to_value = write.to_queries_keys_values.weight.chunk(3)
    queries = normed @ to_query.T
    logits = queries @ (hiddens @ to_key.T).T
    own = (queries * (normed @ to_key.T)).sum(-1, keepdim=True)
    assert not bool(write.own_bias.detach().abs() > 10)  # nothing beside logits of a million
    chosen = torch.cat([own, logits], 1).argmax(1)
    values = hiddens @ to_value.T / math.sqrt(DIM)
    taken = [slots[n] if c == 0 else values[c - 1] for n, c in enumerate(chosen.tolist())]
    wanted = torch.stack(taken) + write.bias
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(write(slots[None], hiddens[None])[0], wanted, atol=1e-9, rtol=0)


def test_the_options_set_the_initial_weights() -> None:
    write = SlotWrite(DIM, slots=SLOTS, heads=2, forgetting=0.7, own_bias=1.5)
    torch.testing.assert_close(write.bias.norm(dim=-1), torch.full((SLOTS,), 0.7))
    assert write.own_bias.flatten().tolist() == [1.5, 1.5]
    assert write.initial().shape == GatedSlotWrite(DIM, slots=SLOTS).initial().shape == (SLOTS, DIM)


def test_slots_begin_orthogonal_while_they_fit() -> None:
    initial = SlotWrite(32, slots=32).initial()
    torch.testing.assert_close(initial @ initial.T, torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(SlotWrite(4, slots=9).initial().norm(dim=-1), torch.ones(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SlotWrite, GatedSlotWrite])
def test_the_dtype_of_the_slots_stays(kind: type[Write], dtype: torch.dtype) -> None:
    write = kind(DIM, slots=SLOTS, heads=2).to(dtype)
    read = SlotAttention(DIM, heads=2).to(dtype)
    exact_write, exact_read = kind(DIM, slots=SLOTS, heads=2).double(), SlotAttention(DIM, heads=2).double()
    exact_write.load_state_dict(write.state_dict())
    exact_read.load_state_dict(read.state_dict())
    slots, hiddens = sphere(2, SLOTS, DIM).to(dtype), tokens(2, TIME, DIM).to(dtype)
    mask = torch.tensor([[True, True, False, False]] * 2)
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    for _ in range(3):
        written, wanted = write(slots, hiddens, mask), exact_write(slots.double(), hiddens.double(), mask)
        assert written.dtype == write.initial().dtype == read(hiddens, slots).dtype == dtype
        torch.testing.assert_close(written.double(), wanted, atol=bound, rtol=0)
        found, wanted = read(hiddens, slots), exact_read(hiddens.double(), slots.double())
        torch.testing.assert_close(found.double(), wanted, atol=bound, rtol=0)
        slots = written


@pytest.mark.parametrize("kind", [SlotWrite, GatedSlotWrite])
def test_under_autocast_slots_stay_in_float32(kind: type[Write]) -> None:
    write = kind(DIM, slots=SLOTS, heads=2)
    slots, hiddens = sphere(2, SLOTS, DIM).float(), tokens(2, TIME, DIM).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = write(slots, hiddens)
    assert written.dtype == torch.float32
    torch.testing.assert_close(written, write(slots, hiddens), atol=0.05, rtol=0)


def test_dropout_is_only_for_training() -> None:
    read = SlotAttention(DIM, heads=2, dropout=0.5)
    x, slots = torch.randn(1, TIME, DIM), sphere(1, SLOTS, DIM).float()
    assert not torch.equal(read(x, slots), read(x, slots))
    read.eval()
    assert torch.equal(read(x, slots), read(x, slots))


def test_diagnostics_say_which_slots_take_something() -> None:
    hiddens = tokens(2, TIME, DIM)
    with collect_stats() as stats:
        closed_write(forgetting=1e-12)(sphere(2, SLOTS, DIM), hiddens)
    assert stats.keys() == {f"memformer/write/{name}" for name in ("own share", "moved", "slot norm")}
    ones = torch.ones(2, SLOTS).double()
    for name, wanted in (("own share", ones), ("moved", 0 * ones), ("slot norm", ones)):
        torch.testing.assert_close(stats[f"memformer/write/{name}"], wanted, atol=1e-11, rtol=0)
    write = SlotWrite(DIM, slots=SLOTS, heads=2, own_bias=-CLOSED, name="mine").double()
    with collect_stats() as stats:
        write(sphere(2, SLOTS, DIM), hiddens, torch.tensor([[True] * TIME, [False] * TIME]))
    assert stats["mine/own share"].tolist() == [[0.0] * SLOTS, [1.0] * SLOTS]
    assert stats["mine/moved"][1].tolist() == [0.0] * SLOTS
    assert bool((stats["mine/moved"][0] > 0.1).all())


def test_diagnostics_say_how_slots_are_read() -> None:
    # One head and unit weights: logits are products of RMS-normalised vectors over sqrt(dim).
    read = SlotAttention(DIM, heads=1).double()
    read.to_queries.weight.data.copy_(torch.eye(DIM))
    read.to_keys_values.weight.data[:DIM].copy_(torch.eye(DIM))
    x, slots = tokens(1, 1, DIM), torch.stack([torch.eye(DIM).double()[:2]])
    with collect_stats() as stats:
        read(x, slots)
    logits = math.sqrt(DIM) * x[0, 0, :2] / x.pow(2).mean().sqrt() / math.sqrt(DIM)
    wanted = logits.exp() / logits.exp().sum()
    largest, used = (
        stats[f"memformer/read/{name}"].double() for name in ("largest slot share", "slots used")
    )
    torch.testing.assert_close(largest, wanted.max().view(1, 1, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(used, (-wanted * wanted.log()).sum().exp().view(1), atol=1e-6, rtol=0)


def test_slots_are_used_if_each_is_read_by_some_token() -> None:
    read = SlotAttention(DIM, heads=1).double()
    for weight in (read.to_queries.weight, read.to_keys_values.weight):
        weight.data[:DIM].copy_(100 * torch.eye(DIM))
    slots = torch.eye(DIM).double()[None]
    for tokens_of, number in ((slots, DIM), (slots[:, :1].expand(1, DIM, DIM), 1)):
        with collect_stats() as stats:
            read(tokens_of, slots)
        assert stats["memformer/read/slots used"].tolist() == pytest.approx([number])
        assert bool((stats["memformer/read/largest slot share"] > 0.999).all())
    with collect_stats() as stats:
        read(slots, slots[:, :1])
    assert "memformer/read/slots used" not in stats  # of one slot there is nothing to choose


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SlotWrite(DIM, slots=0), r"slots \(0\)"),
        (lambda: SlotWrite(DIM, slots=2, heads=3), r"dim \(8\) must be divisible by heads \(3\)"),
        (lambda: SlotWrite(DIM, slots=2, temperature=0.0), r"temperature \(0.0\) must be positive"),
        (lambda: SlotWrite(DIM, slots=2, forgetting=-1.0), r"forgetting \(-1.0\) must be positive"),
        (lambda: SlotWrite(DIM, slots=2, forgetting=math.nan), "forgetting"),
        (lambda: GatedSlotWrite(DIM, slots=2, iterations=0), r"iterations \(0\)"),
        (lambda: GatedSlotWrite(0, slots=2), r"dim \(0\)"),
        (lambda: SlotAttention(DIM, heads=3), "or give dim_head"),
        (lambda: SlotAttention(DIM, dim_head=0), r"dim_head \(0\)"),
        (lambda: SlotAttention(DIM)(zeros(2, 3, DIM), zeros(1, 2, DIM)), "2 rows of tokens but 1 of slots"),
        (lambda: SlotAttention(DIM)(zeros(2, 3, 4), zeros(2, 2, DIM)), r"tokens \[batch, time, 8\]"),
        (lambda: SlotWrite(DIM, slots=2)(zeros(2, DIM), zeros(2, 3, DIM)), r"slots \[batch, slots, 8\]"),
        (lambda: SlotWrite(DIM, slots=2)(zeros(2, 3, DIM), zeros(2, 3, DIM)), "3 slots, not 2"),
    ],
)
def test_wrong_sizes_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_mask_must_be_boolean() -> None:
    slots, hiddens = torch.zeros(1, SLOTS, DIM), torch.zeros(1, TIME, DIM)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        SlotWrite(DIM, slots=SLOTS)(slots, hiddens, torch.ones(1, TIME))
    with pytest.raises(ValueError, match="mask has shape"):
        SlotWrite(DIM, slots=SLOTS)(slots, hiddens, torch.ones(1, 2, dtype=torch.bool))
