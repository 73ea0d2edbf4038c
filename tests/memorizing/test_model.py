"""The memorizing member: equal to loops over tokens, and what its memory and its cache hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.controls.window import Window
from memorizing import Memorizing, MemorizingConfig, PairMemory, XLCache
from memory_models import check_model, create, unroll
from memory_models.transformer import TransformerConfig
from tests.reference.memorizing import memorizing as by_loops

TARGET = "memorizing.model:Memorizing"
DIM, LENGTH = 8, 5
OPTIONS: dict[str, Any] = {
    "dim": DIM,
    "depth": 2,
    "heads": 2,
    "segment_length": LENGTH,
    "memories": 7,
    "topk": 3,
}


def model(**options: Any) -> Memorizing:
    made = create(TARGET, **(OPTIONS | options)).double().eval()
    assert isinstance(made, Memorizing)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


VARIANTS: list[dict[str, Any]] = [
    {},
    {"token_shift": True, "matching_layer": True},
    {"combine": "softmax"},
    {"memories": 3},
    {"memory_layers": (0, 1)},
    {"topk": 50, "combine": "softmax", "depth": 1},
    {"heads": 4, "kv_heads": 2, "combine": "softmax"},
    {"kv_heads": 1, "matching_layer": True, "xl_cache": 2},
    {"xl_cache": 4, "combine": "softmax"},
    {"xl_cache": 7, "matching_layer": True, "memory_layers": (0, 1)},
]


# Compiling is the slowest rule: once plain and once with everything, and not in the gate, where every
# member's plain form is compiled.
COMPILED = (VARIANTS[0], VARIANTS[-1])


@pytest.mark.parametrize(
    "options",
    [pytest.param(one, marks=[pytest.mark.slow] if one in COMPILED else []) for one in VARIANTS],
    ids=str,
)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    skip = () if options in COMPILED else ("compile",)
    check_model(model(**options).float(), skip=skip)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_model_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    made = model(**options)
    x = torch.randn(2, 4 * LENGTH + 2, DIM, dtype=torch.float64, requires_grad=True)
    seen, wanted = unroll(made, x)[0], torch.stack([by_loops(made, row) for row in x])
    torch.testing.assert_close(seen, wanted, atol=1e-9, rtol=1e-9)
    if made.config.xl_cache and len(made.config.layers_with_memory) < made.config.depth:
        return  # the loops of layers without memory let gradients into the cache
    inputs, push = [x, *made.parameters()], torch.randn_like(seen)
    ours, theirs = (torch.autograd.grad((y * push).sum(), inputs) for y in (seen, wanted))
    names = ["x", *(name for name, _ in made.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name)


def window_of(made: Memorizing, **options: Any) -> Window:
    """The same transformer with no memory, in the memory's layer with the same attention."""
    plain = Window(TransformerConfig(dim=DIM, depth=2, heads=2, segment_length=LENGTH, **options)).double()
    weights = {name: value for name, value in made.state_dict().items() if not name.endswith("gate")}
    plain.load_state_dict(weights)
    return plain.eval()


@pytest.mark.parametrize("combine", ["gate", "softmax"])
def test_the_first_segment_is_the_transformer_without_memory(combine: str) -> None:
    made = model(matching_layer=True, combine=combine)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    wanted = window_of(made, matching_layer=True)(x)[0]
    torch.testing.assert_close(made(x)[0], wanted, atol=1e-12, rtol=0)


def test_with_the_gate_closed_it_is_the_transformer_without_memory_throughout() -> None:
    made = model(matching_layer=True)
    made.trunk.attentions[1].gate.data.fill_(-torch.inf)  # type: ignore[union-attr, operator]
    x = torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    wanted = unroll(window_of(made, matching_layer=True), x)[0]
    torch.testing.assert_close(unroll(made, x)[0], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"combine": "softmax"}, {"age_bias": True, "gate_network": True}, {"store": "outside"}],
    ids=str,
)
def test_without_memories_it_is_the_transformer_without_memory(options: dict[str, Any]) -> None:
    made = model(matching_layer=True, memories=0, **options)
    plain = Window(TransformerConfig(dim=DIM, depth=2, heads=2, segment_length=LENGTH, matching_layer=True))
    plain = plain.double().eval()
    own = plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in made.state_dict().items() if name in own})
    x = torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    seen, wanted = unroll(made, x)[0], unroll(plain, x)[0]
    torch.testing.assert_close(seen, wanted, atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (seen, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("store", ["state", "outside"])
def test_weights_fit_a_memory_of_any_size(store: str) -> None:
    # With room for all there is, more room changes nothing; with less, only what is out of reach.
    trained = model(memories=20, topk=20)
    x = torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    wanted = unroll(trained, x)[0]
    for memories in (0, 1, 10, 20, 300, 262_144 if store == "outside" else 3000):
        other = model(memories=memories, topk=20, store=store, pending_segments=1)
        other.load_state_dict(trained.state_dict())
        y = unroll(other, x)[0]
        seen = min(4, 1 + memories // LENGTH) * LENGTH
        torch.testing.assert_close(y[:, :seen], wanted[:, :seen], atol=1e-12, rtol=0)
        assert seen == y.shape[1] or not torch.allclose(y[:, seen:], wanted[:, seen:])


def test_a_pair_that_left_has_no_more_influence() -> None:
    made = model(depth=1, memories=LENGTH)
    x = torch.randn(1, 3 * LENGTH, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, :LENGTH] += 1
    one, two = unroll(made, x)[0], unroll(made, other)[0]
    assert not torch.allclose(one[:, LENGTH : 2 * LENGTH], two[:, LENGTH : 2 * LENGTH])
    torch.testing.assert_close(one[:, 2 * LENGTH :], two[:, 2 * LENGTH :], atol=0, rtol=0)


def test_a_segment_that_is_open_writes_nothing() -> None:
    made = model(xl_cache=3)
    _, memory = unroll(made, torch.randn(1, 3 * LENGTH, DIM, dtype=torch.float64))
    _, opened = made(torch.randn(1, 3, DIM, dtype=torch.float64), memory, close=False)
    for kind in ("layers", "caches"):
        for before, after in zip(getattr(memory, kind), getattr(opened, kind), strict=True):
            assert all(torch.equal(after.tensors()[path], leaf) for path, leaf in before.tensors().items())


@pytest.mark.parametrize("length", [1, 3, 8])
def test_each_token_is_in_the_cache_or_the_memory_exactly_once(length: int) -> None:
    # Tokens are numbers; two rows get segments of unequal lengths.
    generator = torch.Generator().manual_seed(length)
    like = torch.zeros((), dtype=torch.float64)
    cache = XLCache.empty(2, length, 1, 1, like=like)
    memory, given = PairMemory.empty(2, 100, 1, 1, like=like), [0, 0]
    for _ in range(9):
        filled = torch.randint(0, 6, (2,), generator=generator)
        tokens = torch.tensor(given)[:, None] + torch.arange(5)
        keys = torch.where(torch.arange(5) < filled[:, None], tokens.double(), torch.nan)[..., None, None]
        cache, keys, values, count = cache.push(keys, -keys, filled)
        memory = memory.append(keys, values, count)
        given = [now + new for now, new in zip(given, filled.tolist(), strict=True)]
        for row in range(2):
            far, near = int(memory.total[row]), int(cache.held[row])
            assert near == min(given[row], length)
            seen = [*memory.keys[row, 0, :far, 0].tolist(), *cache.keys[row, length - near :, 0, 0].tolist()]
            assert seen == list(range(given[row]))
            assert memory.values[row, 0, :far, 0].tolist() == [-n for n in seen[:far]]


def test_a_long_cache_makes_segments_one_long_segment() -> None:
    # Depth 1: what is cached does not depend on how far its own attention reached.
    made = model(depth=1, xl_cache=30, memory_layers=(0,))
    x = torch.randn(2, 3 * LENGTH, DIM, dtype=torch.float64)
    whole = model(depth=1, segment_length=3 * LENGTH)
    whole.load_state_dict(made.state_dict())
    torch.testing.assert_close(unroll(made, x)[0], whole(x)[0], atol=1e-12, rtol=0)


def test_with_everything_in_reach_nothing_depends_on_where_it_is_kept() -> None:
    # One softmax over [memory; cache; segment] sees the same tokens however they are divided.
    plain = model(depth=1, memories=50, topk=50, combine="softmax")
    x = torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    for options in ({"xl_cache": 3}, {"xl_cache": 50}, {"segment_length": 4 * LENGTH}):
        other = model(**({"depth": 1, "memories": 50, "topk": 50, "combine": "softmax"} | options))
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(unroll(other, x)[0], unroll(plain, x)[0], atol=1e-12, rtol=0)


def test_what_is_stored_carries_no_gradient() -> None:
    made = model(xl_cache=3, memory_layers=(0, 1))
    _, memory = unroll(made, torch.randn(1, 2 * LENGTH, DIM, dtype=torch.float64, requires_grad=True))
    assert not any(leaf.requires_grad for leaf in memory.tensors().values())
    assert not made.differentiable_memory


def test_the_bytes_of_the_memory_by_hand() -> None:
    pairs = 4 * 2 * 7 * DIM + 8
    segment = 2 * 4 * 2 * LENGTH * DIM + 8
    assert Memorizing(MemorizingConfig(**OPTIONS)).init_memory(3).nbytes == 3 * (pairs + segment)
    caches = 2 * (4 * 2 * 6 * DIM + 8)
    with_cache = Memorizing(MemorizingConfig(**OPTIONS, xl_cache=6)).init_memory(3)
    assert with_cache.nbytes == 3 * (pairs + segment + caches)


def test_the_memory_stands_where_the_paper_has_it() -> None:
    # Layer 9 of 12 (§4.1), counted from 1; a matching layer takes it to itself.
    assert MemorizingConfig(depth=12).layers_with_memory == (8,)
    assert [MemorizingConfig(depth=depth).layers_with_memory for depth in (1, 2, 4, 8)] == [
        (0,),
        (1,),
        (2,),
        (5,),
    ]
    assert MemorizingConfig(depth=12, matching_layer=True).layers_with_memory == (11,)
    assert MemorizingConfig(depth=3, matching_layer=True, memory_layers=(0,)).layers_with_memory == (0,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memories": -1}, "memories"),
        ({"topk": 0}, "topk"),
        ({"xl_cache": -1}, "xl_cache"),
        ({"xl_shift": True}, "xl_cache"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"combine": "sum"}, "gate"),
        ({"memory_layers": ()}, "memory_layers"),
        ({"memory_layers": (2,)}, "of 0 to 1"),
        ({"memory_layers": (0, 0)}, "different"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemorizingConfig(**(OPTIONS | options))


def test_heads_that_share_a_store_equal_heads_with_the_same_weights() -> None:
    shared = model(heads=4, kv_heads=2)
    apart = model(heads=4)
    weights = shared.state_dict()
    for name in ("trunk.attentions.1.to_keys.weight", "trunk.attentions.1.to_values.weight"):
        weights[name] = weights[name].view(2, 2, DIM).repeat_interleave(2, 0).flatten(0, 1)
    apart.load_state_dict(weights)
    x = torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    (y, memory), (wanted, larger) = unroll(shared, x), unroll(apart, x)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(memory.layers[0].keys, larger.layers[0].keys[:, ::2])
    tied = create(TARGET, **(OPTIONS | {"heads": 4, "kv_heads": 2, "matching_layer": True}))
    queries, keys = tied.trunk.attentions[1].to_queries, tied.trunk.attentions[1].to_keys  # type: ignore[union-attr]
    assert torch.equal(keys.weight.view(2, 2, DIM), queries.weight.view(4, 2, DIM)[::2])  # type: ignore[union-attr, operator]


def test_training_reaches_every_weight() -> None:
    made = create(TARGET, **(OPTIONS | {"matching_layer": True, "token_shift": True}))
    x: Tensor = torch.randn(2, 3 * LENGTH, DIM)
    y, _ = unroll(made, x)
    (y * torch.randn_like(y)).sum().backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing
