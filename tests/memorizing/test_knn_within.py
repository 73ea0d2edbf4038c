"""Searching only some of a row's pairs by id, and copies that go on by themselves."""

from __future__ import annotations

import pytest
import torch

from memorizing import FaissOptions, KNNMemory

OPTIONS = FaissOptions(train_from=64, lists=8, probes=8)


def filled(index: str, *, metric: str = "ip", capacity: int = 300, pairs: int = 500) -> KNNMemory:
    memory = KNNMemory(8, capacity, 2, index=index, metric=metric, faiss_options=OPTIONS, track_hits=True)
    memory.add(torch.randn(2, pairs, 2, 8))
    return memory


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("index", ["exact", "ivf", "IVF8,Flat", "Flat"])
def test_what_lies_outside_might_as_well_not_be_there(index: str, metric: str) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    memory, queries = filled(index, metric=metric), torch.randn(2, 5, 8)
    # All but one of these go around the end of the ring, or past what is held (200 to 499).
    for within in (range(250, 350), range(290, 310), range(220), range(480, 600), range(100), range(0)):
        seen = memory.lookup(queries, 7, within=within)
        wanted = KNNMemory(8, 300, 2, metric=metric)
        ids = torch.tensor([n for n in range(200, 500) if n in within], dtype=torch.int64)
        kept = memory.gather(ids.expand(2, -1))
        wanted.add(kept.keys, kept.values)
        best = wanted.lookup(queries, 7)
        # All lists are read; what is left is the rounding of what the lists hold.
        torch.testing.assert_close(seen.scores, best.scores, atol=1e-5, rtol=1e-5)
        found = torch.where(best.ids < 0, -1, ids[best.ids.clamp(min=0)] if len(ids) else -1)
        assert torch.equal(seen.ids, found)


def test_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="without steps"):
        filled("exact").lookup(torch.randn(2, 5, 8), 3, within=range(0, 9, 2))


@pytest.mark.parametrize("index", ["exact", "ivf"])
@pytest.mark.parametrize(("before", "held"), [(None, 300), (350, 150), (201, 1), (100, 0)])
def test_a_fork_has_the_older_pairs_and_goes_on_by_itself(index: str, before: int | None, held: int) -> None:
    if index != "exact":
        pytest.importorskip("faiss")
    memory, queries = filled(index), torch.randn(2, 5, 8)
    memory.search(queries, 4)
    counts, hits = memory.counts.tolist(), memory.contents(0).hits
    other = memory.fork(before=before)
    assert other.counts.tolist() == [held, held]
    for row in range(2):
        ours, theirs = other.contents(row), memory.contents(row)
        for name in ("keys", "values", "ids", "hits"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)[:held]), name
    within = None if before is None else range(before)
    wanted = memory.lookup(queries, 6, within=within)
    seen = other.lookup(queries, 6)
    assert torch.equal(seen.ids, wanted.ids)
    assert other.next_ids.tolist() == [200 + held] * 2
    other.add(torch.randn(2, 400, 2, 8))
    assert other.counts.tolist() == [300, 300]
    assert memory.counts.tolist() == counts
    assert hits is not None
    assert memory.next_ids.tolist() == [500, 500]
