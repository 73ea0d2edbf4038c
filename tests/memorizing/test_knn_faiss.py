"""The Faiss engines: what they find, when they change, how they get along with torch."""

import builtins
import subprocess
import sys

import faiss
import pytest
import torch
import torch.nn.functional as F

from memorizing import FaissOptions, KNNMemory


def clustered(rows, n, dim=16, clusters=40, seed=0):
    """Unit keys around a few directions, as real ones are."""
    generator = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randn(clusters, dim, generator=torch.Generator().manual_seed(7))
    which = torch.randint(0, clusters, (rows, n), generator=generator)
    return F.normalize(centres[which] + 0.4 * torch.randn(rows, n, dim, generator=generator), dim=-1)


def pairs(rows, n, seed=0):
    keys = clustered(rows, n, seed=seed)
    return torch.stack((keys, -keys), 2)


def filled(index, n=6000, rows=1, capacity=4000, **options):
    memory = KNNMemory(16, capacity, rows, index=index, **options)
    for start in range(0, n, 500):
        memory.add(pairs(rows, 500, seed=start))
    return memory


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("index", ["ivf", "IVF32,SQ8", "PCA12,IVF32,Flat", "SQ8", "IDMap,Flat"])
def test_recall_and_scores(index, metric):
    memory = filled(index, metric=metric, faiss_options=FaissOptions(train_from=1000))
    queries = clustered(1, 100, seed=5)
    assert memory.recall(queries, 16).item() > 0.95
    scores, ids = memory.lookup(queries, 16)
    keys, values, mask = memory.gather(ids)
    assert mask.all()
    assert torch.equal(keys, -values)
    asked = queries.unsqueeze(-2)
    exact = -(asked - keys).square().sum(-1) if metric == "l2" else (asked * keys).sum(-1)
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-4)
    assert (scores.diff(dim=-1) <= 0).all()


def test_an_index_that_is_asked_for_answers():
    memory = filled("ivf", faiss_options=FaissOptions(train_from=1000))
    (row,) = memory.stats()
    assert row.engine == "ivf"
    assert (row.held, row.given, row.probes) == (4000, 6000, 16)
    assert row.lists == 128
    assert memory._search.engines[0].index.ntotal == 4000


def test_small_rows_are_searched_exactly():
    memory = filled("ivf", n=3000)
    assert memory.stats()[0].engine == "exact"
    assert memory.recall(clustered(1, 50)).item() == 1.0


def test_more_probes_in_one_call():
    memory = filled("ivf", faiss_options=FaissOptions(train_from=1000, probes=1))
    queries = torch.randn(1, 200, 16)
    truth = memory._search.find([0], queries, 16, exact=True).scores
    few, all_lists = (memory.lookup(queries, 16, nprobe=n).scores for n in (1, 128))
    torch.testing.assert_close(all_lists, truth)
    assert (few < truth - 1e-4).any()
    assert memory.stats()[0].probes == 1


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize(
    ("index", "k", "probes"), [("ivf", 16, None), ("IVF64,Flat", 16, 3), ("ivf", 500, None)]
)
def test_the_order_in_which_queries_are_asked_changes_nothing(monkeypatch, metric, index, k, probes):
    from memorizing.knn import faiss_engine

    memory = filled(index, metric=metric, faiss_options=FaissOptions(train_from=1000, probes=2))
    queries = clustered(1, 600, seed=5)
    usual = memory.lookup(queries, k, nprobe=probes)
    asked = []
    nearest = faiss_engine.FaissRow.nearest
    monkeypatch.setattr(faiss_engine, "_ORDER_FROM_BYTES", 0)
    monkeypatch.setattr(
        faiss_engine.FaissRow, "nearest", lambda *words: asked.append(nearest(*words)) or asked[-1]
    )
    found = memory.lookup(queries, k, nprobe=probes)
    # Not the order they came in, or nothing has been shown.
    assert (asked[-1].order != torch.arange(600)).any()
    assert asked[-1].lists.shape == (600, probes or 2)
    assert torch.equal(found.ids, usual.ids)
    torch.testing.assert_close(found.scores, usual.scores)
    assert memory.stats()[0].probes == 2


def test_lists_too_short_for_k_are_made_up_for():
    memory = filled("ivf", faiss_options=FaissOptions(train_from=1000, probes=1, lists=512))
    _, mask = memory.search(torch.randn(1, 50, 16), 200)
    assert mask.all()


def test_the_index_is_trained_again_as_the_row_grows_and_not_in_between(monkeypatch):
    from memorizing.knn.faiss_engine import FaissRow

    sizes = []
    build = FaissRow.build
    monkeypatch.setattr(FaissRow, "build", lambda row, n, read: (sizes.append(n), build(row, n, read)))
    filled("ivf", n=12_000, capacity=5000, faiss_options=FaissOptions(train_from=500))
    assert sizes == [500, 2000]


def test_rebuild_trains_at_once():
    memory = filled("ivf", faiss_options=FaissOptions(train_from=1000))
    memory.rebuild()
    assert memory._search.engines[0].trained_on == 4000
    assert memory.recall(clustered(1, 50)).item() > 0.95


def test_auto_is_exact_below_the_crossover_then_uses_lists():
    options = FaissOptions(crossover=3000, target_recall=0.9)
    memory = filled("auto", n=2500, faiss_options=options)
    queries = clustered(1, 300, seed=5)
    memory.search(queries, 8)
    assert memory.stats()[0].engine == "exact"
    memory.add(pairs(1, 1500))
    memory.search(queries, 8)
    (row,) = memory.stats()
    assert row.engine == "ivf"
    assert row.recall >= 0.9


def test_auto_reads_more_lists_until_the_recall_holds():
    options = FaissOptions(crossover=3000, probes=1, lists=64, target_recall=0.9)
    memory = filled("auto", faiss_options=options)
    memory.search(clustered(1, 300, seed=5), 8)
    (row,) = memory.stats()
    assert row.engine == "ivf"
    assert row.probes in (2, 4, 8)
    assert row.recall >= 0.9


def test_auto_returns_to_exact_when_lists_do_not_help_and_tries_again_later():
    options = FaissOptions(crossover=3000, probes=1, target_recall=0.999)
    memory = KNNMemory(16, 4000, 1, index="auto", faiss_options=options)
    memory.add(torch.randn(1, 4000, 2, 16))
    queries = torch.randn(1, 200, 16)
    found = memory.lookup(queries, 8).scores
    assert memory.stats()[0].engine == "exact"
    torch.testing.assert_close(found, memory._search.find([0], queries, 8, exact=True).scores)
    memory.add(torch.randn(1, 3999, 2, 16))
    assert memory._search.engines[0].index is None
    memory.add(torch.randn(1, 1, 2, 16))
    assert memory._search.engines[0].index is not None
    memory.search(queries, 8)
    memory.add(torch.randn(1, 4000, 2, 16))
    assert memory._search.engines[0].index is None


def test_graphs_are_refused_for_they_cannot_forget():
    with pytest.raises(ValueError, match="cannot remove"):
        KNNMemory(16, 100, 1, index="HNSW16")


@pytest.mark.parametrize(
    ("index", "message"), [("IVFnonsense", "cannot make"), ("IVF8192,Flat", "raise train_from")]
)
def test_factory_strings_that_cannot_work(index, message):
    with pytest.raises(ValueError, match=message):
        KNNMemory(16, 100, 1, index=index)


@pytest.mark.parametrize("bad", [{"probes": 0}, {"grow": 1.0}, {"target_recall": 1.5}, {"lists": 0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FaissOptions(**bad)


def test_without_faiss_the_error_names_the_way_out(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    KNNMemory(16, 100, 1)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        KNNMemory(16, 100, 1, index="ivf")


def test_the_callers_thread_count_is_left_alone():
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        memory = filled("ivf", faiss_options=FaissOptions(train_from=1000))
        memory.search(clustered(1, 50), 8)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_torch_and_faiss_with_threads_in_one_process(first):
    code = f"""
import {first}
import faiss, torch
from memorizing import FaissOptions, KNNMemory
torch.set_num_threads(4)
memory = KNNMemory(16, 6000, 2, index="ivf", faiss_options=FaissOptions(train_from=500))
weight = torch.randn(256, 256, requires_grad=True)
for _ in range(6):
    memory.add(torch.randn(2, 2000, 2, 16))
    (torch.randn(512, 256) @ weight).square().mean().backward()
    memory.search(torch.randn(2, 1000, 16), 8)
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "alive", result.stderr
