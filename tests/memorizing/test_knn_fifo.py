"""First in, first out, whatever happens: every engine against plain lists, through many wrap-arounds."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from memorizing import FaissOptions, KNNMemory
from tests.reference.knn import ListMemory

ROWS, CAPACITY, DIM = 3, 13, 4

# Trained early and reading every list, the Faiss engines are exact, and must agree with the lists.
EARLY = FaissOptions(train_from=5, crossover=5, lists=3, probes=64, oversample=64)
ENGINES = {
    "exact ip": {},
    "exact cosine": {"metric": "cosine"},
    "exact l2": {"metric": "l2"},
    "exact bf16": {"dtype": torch.bfloat16},
    "exact fp16 cosine": {"dtype": torch.float16, "metric": "cosine"},
    "values of another length": {"value_dim": 2},
    "ivf ip": {"index": "ivf"},
    "ivf cosine": {"index": "ivf", "metric": "cosine"},
    "ivf l2": {"index": "ivf", "metric": "l2"},
    "ivf with a table": {"index": "ivf", "table": True},
    "auto": {"index": "auto"},
    "flat": {"index": "Flat", "metric": "l2"},
    "flat codes": {"index": "SQ8"},
    "lists of codes": {"index": "IVF3,SQ8", "metric": "cosine"},
}


class Fifo(RuleBasedStateMachine):
    """Random histories of one memory and of its model."""

    options: dict = {}  # noqa: RUF012

    @initialize(seed=st.integers(0, 2**31))
    def start(self, seed: int) -> None:
        options = self.options
        self.generator = torch.Generator().manual_seed(seed)
        self.memory = KNNMemory(DIM, CAPACITY, ROWS, faiss_options=EARLY, **options)
        self.model = ListMemory(CAPACITY, ROWS, options.get("metric", "ip"))

    def random(self, *shape: int) -> torch.Tensor:
        # Rounded to the storage dtype: what is read back must be exactly what was given.
        return torch.randn(shape, generator=self.generator).to(self.memory.dtype).float()

    @rule(n=st.integers(0, 7))
    def add_to_all(self, n: int) -> None:
        self.add(list(range(ROWS)), n)

    @rule(n=st.sampled_from([CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * CAPACITY, 41]))
    def add_many(self, n: int) -> None:
        self.add(list(range(ROWS)), n)

    @rule(rows=st.permutations(range(ROWS)), some=st.integers(0, ROWS), n=st.integers(0, 20))
    def add_to_some(self, rows: list[int], some: int, n: int) -> None:
        with self.memory.at_batch_indices(rows[:some]):
            self.add(rows[:some], n)

    def add(self, rows: list[int], n: int) -> None:
        keys = self.random(len(rows), n, DIM)
        values = self.random(len(rows), n, self.memory.value_dim)
        if self.memory.value_dim == DIM:
            self.memory.add(torch.stack((keys, values), 2))
        else:
            self.memory.add(keys, values)
        for index, row in enumerate(rows):
            self.model.add(row, keys[index], values[index])

    @rule(row=st.integers(0, ROWS - 1))
    def clear_one(self, row: int) -> None:
        self.memory.clear(row)
        self.model.clear(row)

    @rule()
    def clear_all(self) -> None:
        self.memory.clear()
        for row in range(ROWS):
            self.model.clear(row)

    @rule()
    def copy(self) -> None:
        self.memory = pickle.loads(pickle.dumps(self.memory))

    @rule(rows=st.permutations(range(ROWS)), some=st.integers(1, ROWS), k=st.sampled_from([1, 3, 13, 15]))
    def find(self, rows: list[int], some: int, k: int) -> None:
        rows = rows[:some]
        queries = self.random(some, 2, DIM)
        with self.memory.at_batch_indices(rows):
            scores, ids = self.memory.lookup(queries, k)
            keys, values, mask = self.memory.gather(ids)
            if self.memory.value_dim == DIM:
                pairs, found = self.memory.search(queries, k)
                assert torch.equal(found, mask)
                assert torch.equal(pairs[..., 0, :], keys.float())
                assert torch.equal(pairs[..., 1, :], values.float())
        for index, row in enumerate(rows):
            held = {pair.id: pair for pair in self.model.rows[row]}
            for number in range(2):
                expected = self.model.nearest(row, queries[index, number].tolist(), k)
                n = len(expected)
                assert mask[index, number].tolist() == [True] * n + [False] * (k - n)
                got = ids[index, number, :n].tolist()
                assert len(set(got)) == n
                assert scores[index, number, :n].tolist() == pytest.approx(
                    [score for score, _ in expected], rel=1e-4, abs=1e-4
                )
                for place, id_ in enumerate(got):
                    assert keys[index, number, place].tolist() == held[id_].key
                    assert values[index, number, place].tolist() == held[id_].value

    @invariant()
    def holds_the_newest(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert len(self.memory) == sum(map(len, self.model.rows))
        for row, pairs in enumerate(self.model.rows):
            held = self.memory.contents(row)
            assert held.ids.tolist() == [pair.id for pair in pairs]
            assert held.ages.tolist() == list(range(len(pairs) - 1, -1, -1))
            assert held.keys.tolist() == [pair.key for pair in pairs]
            assert held.values.tolist() == [pair.value for pair in pairs]


@pytest.mark.parametrize("engine", ENGINES)
def test_any_history(engine, monkeypatch):
    options = dict(ENGINES[engine])
    if options.pop("table", False):
        monkeypatch.setattr("memorizing.knn.faiss_engine._TABLE_FROM", 6)
    machine = type("Fifo", (Fifo,), {"options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )


@pytest.mark.parametrize(("capacity", "batch"), [(1000, 300), (1024, 512), (2000, 300), (7, 1), (5, 12)])
@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_the_pairs_just_added_find_themselves_for_ever(capacity, batch, index):
    # The published package loses them for good once the capacity is passed.
    memory = KNNMemory(
        16, capacity, 2, metric="cosine", index=index, faiss_options=FaissOptions(train_from=256)
    )
    for _ in range(12):
        pairs = torch.randn(2, batch, 2, 16)
        memory.add(pairs)
        newest = pairs[:, -capacity:]
        found, mask = memory.search(newest[:, :, 0], 1)
        assert mask.all()
        assert torch.equal(found[:, :, 0], newest)
