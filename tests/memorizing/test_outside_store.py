"""The outside store: equal to exact rings in the state, written by `commit` alone, right for old states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing import KNNMemory, Memorizing, MemoryFileError
from memorizing.layers import retrieve
from memorizing.memory import MemorizingMemory, OutsidePairs
from memorizing.store import OutsideStore, OutsideView, StoreError
from memory_models import check_model, create, create_lm, load_memory, save_memory, unroll
from memory_models.state import cat

DIM, LENGTH = 8, 5
OPTIONS: dict[str, Any] = {
    "dim": DIM,
    "depth": 2,
    "heads": 2,
    "segment_length": LENGTH,
    "memories": 23,
    "topk": 3,
}
OUTSIDE: dict[str, Any] = {"store": "outside", "pending_segments": 2}
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}


def model(**options: Any) -> Memorizing:
    torch.manual_seed(1)
    made = create("memorizing", **(OPTIONS | options)).double().eval()
    assert isinstance(made, Memorizing)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def both(**options: Any) -> tuple[Memorizing, Memorizing, OutsideStore]:
    """The same model with its pairs in the state and outside, and the store."""
    outside = model(**(OUTSIDE | options))
    assert outside.store is not None
    inside = {name: value for name, value in options.items() if name != "pending_segments"}
    return model(**inside), outside, outside.store


def stream(segments: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, segments * LENGTH, DIM, dtype=torch.float64)


def rows(*indices: int) -> Tensor:
    return torch.tensor(indices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pending_segments": 1, "memories": 6},
        {"combine": "softmax", "xl_cache": 3, "memory_layers": (0, 1), "topk": 50},
        {"heads": 4, "kv_heads": 2, "matching_layer": True, "token_shift": True},
        {"age_bias": True, "gate_network": True, "xl_cache": 4, "xl_shift": True},
        {"memories": 9, "pending_segments": 2},  # all of it fits in the state
    ],
    ids=str,
)
def test_it_equals_rings_in_the_state_in_values_and_gradients(options: dict[str, Any]) -> None:
    inside, outside, _ = both(**options)
    x = torch.cat([stream(12, rows=3), stream(1, rows=3)[:, :2]], 1).requires_grad_()
    # Ragged rows, padding and resets inside segments; full rings long before the end.
    mask, reset = torch.rand(x.shape[:2]) < 0.8, torch.rand(x.shape[:2]) < 0.02
    seen, wanted = (unroll(made, x, mask=mask, reset=reset)[0] for made in (outside, inside))
    torch.testing.assert_close(seen, wanted, **EXACT)
    push = torch.randn_like(seen)
    ours, theirs = (
        torch.autograd.grad((y * push).sum(), [x, *made.parameters()])
        for y, made in ((seen, outside), (wanted, inside))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_it_keeps_the_contract() -> None:
    # The rule on pieces ends more segments than usual before one commit.
    options = {"pending_segments": 4, "memories": 400, "topk": 2}
    check_model(model(store="outside", **options).float(), skip=("compile",))


@pytest.mark.slow
def test_compiled_it_gives_the_same() -> None:
    check_model(model(**(OUTSIDE | {"pending_segments": 4, "depth": 1})).float(), only=("compile",))


def test_when_it_is_committed_makes_no_difference_but_to_what_the_memory_knows_of_it() -> None:
    made, x = model(**(OUTSIDE | {"pending_segments": 4})), stream(9, rows=2)
    wanted, memory = unroll(made, x)
    late, outputs = None, []
    for index, part in enumerate(x.split(LENGTH, 1)):
        y, late = made(part, late)
        outputs.append(y)
        if index % 3 == 2:
            late = made.commit(late)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, atol=0, rtol=0)
    assert late is not None
    for path, leaf in memory.tensors().items():
        if not path.endswith("stream"):
            assert torch.equal(late.tensors()[path], leaf), path


def contents(store: OutsideStore) -> list[Tensor]:
    return [
        part
        for stream in store._streams.values()
        for memory in stream.memories
        for row in range(memory.num_indices)
        for part in memory.contents(row)[:3]
    ]


def test_reading_never_writes_and_a_second_commit_neither() -> None:
    _, made, store = both()
    _, memory = unroll(made, stream(8, rows=2))
    before = [part.clone() for part in contents(store)]
    _, after = made(stream(1, rows=2), memory)
    made(stream(1, rows=2), memory, close=False)
    assert all(map(torch.equal, contents(store), before))
    first = made.commit(after)
    written = [part.clone() for part in contents(store)]
    assert not all(map(torch.equal, written, before))
    second, third = made.commit(after), made.commit(first)
    assert len(store) == 2
    assert all(map(torch.equal, contents(store), written))
    for other in (second, third):
        assert all(torch.equal(leaf, first.tensors()[path]) for path, leaf in other.tensors().items())


def test_pairs_that_were_never_committed_are_asked_for() -> None:
    made = model(**OUTSIDE)
    memory = None
    for _ in range(2):
        _, memory = made(stream(1), memory)
    made(stream(1), memory)
    _, memory = made(stream(1), memory)
    for call in (lambda: made(stream(1), memory), lambda: made.commit(memory)):
        with pytest.raises(StoreError, match=r"model\.commit\(memory\) between segments"):
            call()


def test_rows_that_go_apart_get_streams_of_their_own() -> None:
    inside, outside, store = both()
    x, more, last = stream(7), stream(3, rows=3), stream(2, rows=3)
    (_, ours), (_, theirs) = unroll(outside, x), unroll(inside, x)
    assert len(store) == 1
    ours, theirs = ours.select(rows(0, 0, 0)), theirs.select(rows(0, 0, 0))
    more[2] = more[1]  # two of them go on alike
    for part in (*more.split(LENGTH, 1), *last.split(LENGTH, 1)):
        (y, ours), (wanted, theirs) = outside(part, ours), inside(part, theirs)
        torch.testing.assert_close(y, wanted, **EXACT)
        ours = outside.commit(ours)
    assert len(store) == 3


def test_an_old_state_is_read_as_it_was_and_may_go_on_by_itself() -> None:
    inside, outside, store = both(pending_segments=4)
    x, other = stream(9), stream(6)
    (_, ours), (_, theirs) = unroll(outside, x), unroll(inside, x)
    between = stream(3)
    later, first = unroll(outside, between, ours)[1], unroll(inside, between, theirs)[1]
    again = outside(other[:, :LENGTH], ours)[0]
    torch.testing.assert_close(again, inside(other[:, :LENGTH], theirs)[0], **EXACT)
    y, _ = unroll(outside, other, ours)
    torch.testing.assert_close(y, unroll(inside, other, theirs)[0], **EXACT)
    assert len(store) == 2
    # And the one that went on first has noticed nothing.
    end = stream(2)
    torch.testing.assert_close(unroll(outside, end, later)[0], unroll(inside, end, first)[0], **EXACT)


def test_a_state_whose_pairs_have_given_way_is_refused() -> None:
    _, outside, _ = both()
    _, old = unroll(outside, stream(6))
    _, memory = unroll(outside, stream(2), old)
    outside(stream(1), old)
    unroll(outside, stream(1), memory)
    with pytest.raises(StoreError, match="old state that needs pairs from number 7 on"):
        outside(stream(1), old)
    # So is one that would have to be copied.
    _, memory = unroll(outside, stream(4))
    _, other = outside(stream(1), memory)
    unroll(outside, stream(4), memory)
    with pytest.raises(StoreError, match="old state that needs pairs from number 2 on"):
        outside.commit(other)


def test_rows_travel_between_batches() -> None:
    inside, outside, _ = both()
    parts = [stream(6, rows=2), stream(8, rows=1)]
    order, next_ = rows(2, 0, 1), stream(2, rows=3)
    results = []
    for made in (outside, inside):
        memory = cat([unroll(made, part)[1] for part in parts]).select(order)
        fresh = unroll(made, stream(6, rows=3) * 0 + 1)[1]
        memory = memory.where(torch.tensor([True, False, True]), fresh)
        results.append(unroll(made, next_, memory)[0])
    torch.testing.assert_close(*results, **EXACT)


def test_streams_give_way_and_those_of_training_not_to_those_of_evaluation() -> None:
    _, made, store = both(memories=30)
    made.train()
    _, trained = unroll(made, stream(4, rows=2))
    made.eval()
    kept = [unroll(made, stream(4))[1] for _ in range(5)]
    assert len(store) == 2 + 2
    made(stream(1, rows=2), trained)
    made(stream(1), kept[-1])
    with pytest.raises(StoreError, match="store_streams above 4 for training, 2 for evaluation"):
        made(stream(1), kept[0])
    roomy = model(**OUTSIDE, store_streams=5)
    kept = [unroll(roomy, stream(4))[1] for _ in range(5)]
    roomy(stream(1), kept[0])


def test_the_bytes_of_a_memory_are_those_of_its_own_streams() -> None:
    _, made, store = both()
    each = 2 * 2 * (23 + 10) * (DIM // 2) * 8
    memory = made(stream(1, rows=3))[1]
    assert made.outside_bytes(memory) == 0
    memory = made.commit(memory)
    assert made.outside_bytes(memory) == store.nbytes == 3 * each
    # Rows that share a stream share its bytes, and a reset row has none.
    assert made.outside_bytes(memory.select(rows(0, 0, 2))) == 2 * each
    assert made.outside_bytes(made.reset_memory(memory, torch.tensor([True, False, False]))) == 2 * each
    inside = model()
    assert inside.outside_bytes(inside(stream(1))[1]) == 0


def test_a_reset_row_does_not_leak_and_its_old_stream_is_given_up_in_the_end() -> None:
    _, made, store = both()
    memory: MemorizingMemory | None = None
    for _ in range(20):
        x, reset = stream(1, rows=3), torch.rand(3) < 0.5
        y, memory = made(x, memory, reset=reset)
        fresh, _ = made(x)
        torch.testing.assert_close(y[reset], fresh[reset], **EXACT)
        memory = made.commit(memory)
    assert len(store) == 6
    assert store.nbytes == 6 * 2 * 2 * (23 + 10) * (DIM // 2) * 8


def test_the_store_is_saved_beside_the_memory(tmp_path: Path) -> None:
    _, made, store = both()
    _, memory = unroll(made, stream(7, rows=2))
    save_memory(memory, tmp_path / "memory.safetensors")
    store.save(tmp_path / "store.safetensors")
    twin = model(**OUTSIDE)
    loaded = load_memory(tmp_path / "memory.safetensors", like=twin.init_memory(1))
    x = stream(3, rows=2)
    with pytest.raises(StoreError, match="not in the store"):
        twin(x[:, :LENGTH], loaded)
    assert twin.store is not None
    twin.store.load(tmp_path / "store.safetensors")
    torch.testing.assert_close(unroll(twin, x, loaded)[0], unroll(made, x, memory)[0], atol=0, rtol=0)
    # New streams get numbers that no saved memory has.
    _, new = unroll(twin, stream(7))
    assert int(new.layers[0].stream) not in memory.layers[0].stream.tolist()
    larger = model(**OUTSIDE, kv_heads=1)
    assert larger.store is not None
    with pytest.raises(MemoryFileError, match="memories of"):
        larger.store.load(tmp_path / "store.safetensors")
    KNNMemory(3).save(tmp_path / "other.safetensors")
    with pytest.raises(MemoryFileError, match="one KNNMemory"):
        larger.store.load(tmp_path / "other.safetensors")


def test_a_copy_of_the_model_has_a_store_of_its_own() -> None:
    _, made, store = both()
    _, memory = unroll(made, stream(7))
    twin = copy.deepcopy(made)
    assert twin.store is not None
    assert twin.store.number != store.number
    x = stream(2)
    wanted, _ = unroll(made, x, memory)
    before = contents(twin.store)
    torch.testing.assert_close(unroll(twin, x, memory)[0], wanted, atol=0, rtol=0)
    assert len(before) == len(contents(twin.store))


def test_a_memory_of_another_model_is_refused() -> None:
    # Copied before either had a stream: both would count their streams alike.
    first, second = model(**OUTSIDE), model(**OUTSIDE)
    _, memory = unroll(first, stream(7))
    unroll(second, stream(7))
    with pytest.raises(StoreError, match="not in the store"):
        second(stream(1), memory)


def test_a_memory_of_a_copy_whose_stream_went_another_way_is_refused() -> None:
    made = model(**OUTSIDE)
    _, memory = unroll(made, stream(7))
    twin, ahead = copy.deepcopy(made), stream(3)
    _, ours = unroll(made, ahead, memory)
    unroll(twin, stream(3), memory)
    with pytest.raises(StoreError, match="holds other pairs"):
        twin(stream(1), ours)
    with pytest.raises(StoreError, match="holds other pairs"):
        # Not even written to.
        twin.commit(made(stream(1), ours)[1])
    # As far as both went the same way the copy may go on.
    again = copy.deepcopy(made)
    x = stream(1)
    torch.testing.assert_close(again(x, ours)[0], made(x, ours)[0], atol=0, rtol=0)


def test_numbers_of_streams_leave_the_random_numbers_of_torch_alone() -> None:
    made, x = model(**OUTSIDE), stream(7)
    torch.manual_seed(3)
    unroll(made, x)
    seen = torch.rand(1)
    torch.manual_seed(3)
    assert seen == torch.rand(1)


def test_a_converted_memory_still_finds_its_stream() -> None:
    made = model(**OUTSIDE)
    _, memory = unroll(made, stream(7))
    y, _ = made.float()(stream(1).float(), memory.to(dtype=torch.float32))
    assert y.isfinite().all()


def filled(made: Memorizing, pairs: int, *, batch: int = 1) -> MemorizingMemory:
    """A memory with so many pairs of clustered unit keys, written a pendingful at a time."""
    memory = made.init_memory(batch)
    kept, heads, width = made.config.kept_pairs, made.config.heads, made.config.head_width
    weight = made.trunk.norm.weight
    centres = torch.randn(64, width, dtype=weight.dtype)
    for _ in range(pairs // kept):
        near = centres[torch.randint(64, (batch, kept, heads))]
        keys = F.normalize(near + 0.3 * torch.randn_like(near), dim=-1)
        layers = tuple(layer.append(keys, torch.randn_like(keys)) for layer in memory.layers)
        memory = made.commit(
            MemorizingMemory(
                segment=memory.segment, layers=layers, caches=memory.caches, outputs=memory.outputs
            )
        )
    return memory


def read(made: Memorizing, memory: MemorizingMemory, queries: Tensor, topk: int) -> Tensor:
    pairs = memory.layers[0]
    assert isinstance(pairs, OutsidePairs)
    assert made.store is not None
    return retrieve(queries, OutsideView(pairs, made.store, 0), topk=topk).output


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_in_the_store_costs_what_its_rounding_says(dtype: str, error: float) -> None:
    fine, coarse = model(**OUTSIDE), model(**OUTSIDE, store_dtype=dtype)
    memories = []
    for made in (fine, coarse):
        torch.manual_seed(5)
        memories.append(filled(made, 20, batch=2))
    queries = 4 * F.normalize(torch.randn(2, 6, 2, DIM // 2, dtype=torch.float64), dim=-1)
    wanted, seen = (read(m, memory, queries, 23) for m, memory in zip((fine, coarse), memories, strict=True))
    assert coarse.store is not None
    assert {m.dtype for s in coarse.store._streams.values() for m in s.memories} == {getattr(torch, dtype)}
    # Each number is off by that share of itself at most: a logit of at most 4 by 4 such shares, hence a
    # weight by twice that, and a value by one.
    largest = max(float(part.abs().max()) for part in contents(fine.store)[1::3])  # type: ignore[arg-type]
    assert 0 < float((seen - wanted).abs().max()) < (1 + 2 * 4) * error * largest


def test_an_index_of_inverted_lists_finds_nearly_all() -> None:
    pytest.importorskip("faiss")
    sizes: dict[str, Any] = {"memories": 6000, "pending_segments": 200, "store": "outside", "dim": 32}
    shares = []
    exact, lists = (model(**sizes, store_index=index).float() for index in ("exact", "ivf"))
    results = []
    for made in (exact, lists):
        torch.manual_seed(7)
        memory = filled(made, 7000)
        queries = 10 * F.normalize(torch.randn(1, 40, 2, 16), dim=-1)
        pairs = memory.layers[0]
        assert isinstance(pairs, OutsidePairs)
        assert made.store is not None
        results.append(retrieve(queries, OutsideView(pairs, made.store, 0), topk=8))
        shares.append(next(iter(made.store._streams.values())).memories[0].stats()[0].engine)
    assert shares == ["exact", "ivf"]
    found = [
        len(set(a) & set(b)) / 8
        for a, b in zip(*(r.ages.flatten(0, 2).tolist() for r in results), strict=True)
    ]
    assert sum(found) / len(found) > 0.9
    assert int(results[0].ages.max()) < 6000


def test_a_language_model_trains_on_streams() -> None:
    torch.manual_seed(0)
    made = create_lm("memorizing", vocab_size=7, **(OPTIONS | OUTSIDE | {"topk": 4}))
    optimizer = torch.optim.AdamW(made.parameters(), 1e-2)
    tokens = torch.randint(7, (2, 3 * LENGTH)).repeat(1, 12)
    memory, losses = None, []
    for part in tokens.split(2 * LENGTH, 1):
        logits, memory = unroll(made, part, memory)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory = memory.detach()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def train_once(memories: int, pairs: int) -> tuple[Memorizing, Tensor]:
    made = create(
        "memorizing",
        dim=32,
        depth=1,
        heads=2,
        segment_length=64,
        memories=memories,
        topk=32,
        store="outside",
        pending_segments=64,
    )
    assert isinstance(made, Memorizing)
    torch.manual_seed(3)
    memory = filled(made, pairs)
    x = torch.randn(1, 64, 32)
    made.train()
    y, memory = made(x, memory)
    y.square().mean().backward()
    made.commit(memory)
    return made, y


@pytest.mark.parametrize(
    "pairs", [8_192, pytest.param(262_144 + 4_096, marks=pytest.mark.slow)], ids=["few", "full"]
)
def test_training_with_262144_memories_a_row_works(pairs: int) -> None:
    made, y = train_once(262_144, pairs)
    assert made.store is not None
    (held,) = {int(n) for s in made.store._streams.values() for m in s.memories for n in m.counts}
    assert held == min(262_144 + 64 * 64, pairs + 64)
    assert bool(y.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
    # The state does not grow with the memory: pairs of 64 segments, and the open one.
    assert made.init_memory(1).nbytes == 2 * 2 * 64 * 64 * 16 * 4 + 3 * 8 + 2 * 2 * 64 * 16 * 4 + 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": "disk"}, "state"),
        ({"store_dtype": "int8"}, "float16"),
        ({"pending_segments": 0}, "pending_segments"),
        ({"store_streams": 0}, "store_streams"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create("memorizing", **(OPTIONS | options))


def test_where_the_store_keeps_a_row_is_told_apart_from_what_the_row_holds() -> None:
    made = model(**OUTSIDE)
    memory = made.init_memory(2)
    assert memory.addresses() == {
        f"layers.{layer}.{name}" for layer in range(len(memory.layers)) for name in ("committed", "stream")
    }
    assert not model().init_memory(2).addresses()
