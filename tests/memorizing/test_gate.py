"""Ages of memories: a bias on the logits and a gate that depend on them, both without effect at first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memorizing import KNNAttention, Memorizing, MemorizingConfig, PairMemory, read_pairs
from memorizing.attend import attend
from memorizing.gate import AgeBias, MemoryGate, log_age
from memorizing.layers import retrieve
from memory_models import create, unroll
from tests.reference.memorizing import knn_attention
from tests.reference.memorizing import memorizing as by_loops

HEADS, WIDTH, DIM, TIME = 4, 3, 8, 5
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
OPTIONS: list[dict[str, Any]] = [
    {"age_bias": True},
    {"age_bias": True, "combine": "softmax", "kv_heads": 2},
    {"gate_network": True},
    {"age_bias": True, "gate_network": True, "kv_heads": 1},
]


def disturbed(module: nn.Module) -> Any:
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def layer(**options: Any) -> KNNAttention:
    sizes = {"dim": DIM, "heads": HEADS, "dim_head": WIDTH, "memories": 9, "topk": 3}
    made: KNNAttention = disturbed(KNNAttention(MemorizingConfig(**(sizes | options))))
    return made


def newest_to_oldest(count: int, *, total: int | None = None) -> PairMemory:
    """Pairs with one and the same key; each value is the pair's age. One row, one store."""
    total = count if total is None else total
    memory = PairMemory.empty(1, count, 1, WIDTH, like=torch.zeros((), dtype=torch.float64))
    numbers = torch.arange(total, dtype=torch.float64)
    keys = F.one_hot(torch.zeros(1, total, 1, dtype=torch.int64), WIDTH).double()
    return memory.append(keys, (total - 1 - numbers)[None, :, None, None].expand(1, total, 1, WIDTH))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_equals_loops_over_a_stream(options: dict[str, Any]) -> None:
    module = layer(**options)
    x = torch.randn(4 * TIME, DIM, dtype=torch.float64, requires_grad=True)
    memory, outputs = None, []
    for part in x[None].split(TIME, 1):
        y, memory = module.segment(part, memory)
        outputs.append(y[0])
    seen, wanted = torch.cat(outputs), knn_attention(module, x, segment=TIME)
    torch.testing.assert_close(seen, wanted, **EXACT)
    push, inputs = torch.randn_like(wanted), [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad((y * push).sum(), inputs) for y in (seen, wanted))
    names = ["x", *(name for name, _ in module.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=name)
        assert bool(one.any()), name


@pytest.mark.parametrize("store", ["state", "outside"])
def test_the_model_equals_loops(store: str) -> None:
    sizes = {"dim": DIM, "depth": 2, "heads": HEADS, "segment_length": TIME, "memories": 14, "topk": 3}
    options = {"age_bias": True, "gate_network": True, "store": store, "pending_segments": 1, "xl_cache": 3}
    made = disturbed(create("memorizing", **sizes, **options))
    x = torch.randn(1, 6 * TIME, DIM, dtype=torch.float64)
    torch.testing.assert_close(unroll(made, x)[0][0], by_loops(made, x[0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_they_change_nothing_at_first(options: dict[str, Any]) -> None:
    sizes = {"dim": DIM, "depth": 2, "heads": HEADS, "segment_length": TIME, "memories": 9, "topk": 3}
    made, plain = create("memorizing", **sizes, **options), create("memorizing", **sizes, **_without(options))
    missing = made.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("age_bias" in name or "gate_network" in name for name in missing)
    x = torch.randn(2, 4 * TIME, DIM)
    torch.testing.assert_close(unroll(made, x)[0], unroll(plain, x)[0], atol=1e-6, rtol=0)


def _without(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("age_bias", "gate_network")}


def falling(heads: int = 1, *, slope: float = 1.0) -> AgeBias:
    """A bias of `silu(-x) - silu(x) = -x` times the slope, for x = log(1 + age)."""
    bias = AgeBias(heads).double()
    with torch.no_grad():
        bias.enter.bias.zero_()
        bias.enter.weight.zero_()
        bias.enter.weight[:2, 0] = torch.tensor([4.0, -4.0])
        bias.leave.weight.zero_()
        bias.leave.weight[:, :2] = torch.tensor([-slope, slope])
    return bias


@pytest.mark.parametrize("total", [6, 15])
def test_a_falling_bias_prefers_the_newer_of_equal_pairs(total: int) -> None:
    # Six pairs with one key: without a bias each gets a sixth, with -log(1 + age) shares as 1 / (1 + age).
    memory = newest_to_oldest(6, total=total)
    queries = torch.ones(1, 1, 1, WIDTH, dtype=torch.float64)
    mean_age = sum(range(6)) / 6
    assert math.isclose(read_pairs(queries, memory, topk=6)[0][0, 0, 0, 0], mean_age)
    found = retrieve(queries, memory, topk=6, age_bias=falling())
    shares = {age: 1 / (1 + age) / sum(1 / n for n in range(1, 7)) for age in range(6)}
    seen = dict(zip(found.ages.flatten().tolist(), found.weights.flatten().tolist(), strict=True))
    assert sorted(seen) == list(range(6))
    assert all(math.isclose(seen[age], share, rel_tol=1e-9) for age, share in shares.items())
    wanted = sum(age * share for age, share in shares.items())
    assert math.isclose(float(found.output[0, 0, 0, 0].detach()), wanted, rel_tol=1e-9)
    # The denominator too, so that one softmax over memory and segment weighs both rightly.
    assert math.isclose(
        float(found.total[0, 0, 0].detach()), 1 + math.log(sum(1 / n for n in range(1, 7))), rel_tol=1e-9
    )


def test_the_bias_does_not_change_which_pairs_are_read() -> None:
    memory = PairMemory.empty(1, 9, 1, WIDTH, like=torch.zeros((), dtype=torch.float64))
    memory = memory.append(*torch.randn(2, 1, 9, 1, WIDTH, dtype=torch.float64).unbind())
    queries = torch.randn(1, 4, 1, WIDTH, dtype=torch.float64)
    plain, biased = (
        retrieve(queries, memory, topk=3, age_bias=bias).ages for bias in (None, falling(slope=50.0))
    )
    assert torch.equal(plain.sort(-1).values, biased.sort(-1).values)


def test_the_gate_opens_with_what_is_held_and_closes_with_its_age() -> None:
    gate = MemoryGate(1).double()
    with torch.no_grad():
        gate.enter.bias.fill_(5.0)  # silu is nearly the identity there
        gate.enter.weight.zero_()
        gate.enter.weight[0] = torch.tensor([1.0, 0.0])
        gate.enter.weight[1] = torch.tensor([0.0, 1.0])
        gate.leave[0, :2] = torch.tensor([1.0, -1.0])
    weights = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)

    def logit(held: int, *ages: int) -> float:
        return float(gate(torch.tensor([held]), torch.tensor(ages).view(1, 1, 1, 2), weights).detach())

    assert logit(10, 3, 4) < logit(100, 3, 4) < logit(4000, 3, 4)
    assert logit(100, 0, 0) > logit(100, 0, 50) > logit(100, 50, 50)
    # What is missing (-1) counts as nothing.
    none = gate(torch.tensor([1]), torch.tensor([[[[7, -1]]]]), torch.tensor([[[[1.0, 0.0]]]]).double())
    assert math.isclose(float(none.detach()), logit(1, 7, 7))


def test_the_operator_has_the_gradient_of_its_bias() -> None:
    keys, values = torch.randn(2, 2, 2, 7, WIDTH, dtype=torch.float64).unbind()
    queries = torch.randn(2, 2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    total = torch.tensor([12, 5])
    torch.library.opcheck(
        attend, (queries, keys, values, total, 3, bias), test_utils=("test_schema", "test_faketensor")
    )
    assert torch.autograd.gradcheck(lambda q, b: attend(q, keys, values, total, 3, b)[:2], (queries, bias))


def test_ages_are_known_at_any_size() -> None:
    ages = torch.tensor([-1, 0, 1, 262_143])
    seen: Tensor = log_age(ages, torch.float64) * 4
    assert torch.allclose(seen, torch.tensor([0, 0, math.log(2), math.log(262_144)], dtype=torch.float64))
    made = create("memorizing", dim=DIM, heads=HEADS, memories=3, age_bias=True, gate_network=True)
    larger = create("memorizing", dim=DIM, heads=HEADS, memories=300, age_bias=True, gate_network=True)
    larger.load_state_dict(made.state_dict())
    assert isinstance(larger, Memorizing)


def test_a_gate_network_without_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="combine='gate'"):
        MemorizingConfig(dim=DIM, heads=HEADS, combine="softmax", gate_network=True)


def test_reading_no_pairs_is_refused() -> None:
    memory = PairMemory(
        keys=torch.zeros(1, 1, 3, 4), values=torch.zeros(1, 1, 3, 4), total=torch.zeros(1, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=r"topk \(0\) must be at least 1"):
        read_pairs(torch.randn(1, 2, 1, 4), memory, topk=0)
