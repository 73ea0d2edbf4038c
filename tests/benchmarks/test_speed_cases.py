"""The speed cases of all families: their bars, their least work, and a search judged by its recall."""

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import (
    OURS,
    Case,
    Work,
    cases_knn,
    cases_memformer,
    cases_memorizing,
    cases_memxl,
    command,
    find_cases,
    limits,
    measure,
    peer,
)

PEERS = peer.ROOT / ".peers"
SMALL: dict[str, Any] = {"rows": 2, "held": 600, "queries": 32, "data": "clustered", "seed": 0}


def found_by_name() -> dict[str, Case]:
    return {case.name: case for case in find_cases()}


def test_the_grid_of_the_memory_carries_its_bars() -> None:
    found = found_by_name()
    shares = {"2k": 0.25, "16k": 0.45, "65k": 0.58, "262k": 0.65}
    for size, share in shares.items():
        for rows in (2, 8):
            exact, lists = (found[f"knn/lookup {index}/r{rows}/m{size}"] for index in ("exact", "ivf"))
            assert exact.near_limit == share
            assert exact.recall == 1
            assert lists.faster == 3
            assert lists.recall == (1 if size == "2k" else 0.96), "a small row is searched exactly"
            assert exact.settings["queries"] == lists.settings["queries"] == 4096
        flat = found[f"knn/lookup exact or Faiss flat/r2/m{size}"]
        assert flat.faster == (2 if size in ("65k", "262k") else None)
        added = found[f"knn/add exact/r2/m{size}"]
        assert (added.faster, added.pause) == (50, 1e-3)
        assert added.singly > 1
    assert found["knn/layer exact/r2/m8k"].faster == 1.6
    assert found["knn/layer ivf/r2/m8k"].faster == 3.5


def test_the_models_carry_their_bars() -> None:
    found = found_by_name()
    replay = found["memformer/replay/s8x1024"]
    assert replay.faster == 1.2
    assert replay.leaner == pytest.approx(1 / 0.6)
    beside = found["memformer/replay or back-propagation/s8x1024"]
    assert beside.package == OURS
    assert beside.faster == pytest.approx(1 / 1.35)
    assert beside.leaner == 2
    for kind in ("forward", "loss", "forward+backward"):
        case = found[f"memxl/{kind}/s4x256"]
        assert case.faster == 1.5
        assert case.leaner == pytest.approx(1 / 0.6)
    assert {"memorizing/forward exact/s1x1024", "memorizing/training exact/s4x512"} <= found.keys()
    assert all(json.dumps(dict(case.settings)) for case in found.values())


def test_quick_cases_are_a_few_of_several_families() -> None:
    quick = find_cases(quick=True)
    assert len(quick) < 5
    assert {case.name.partition("/")[0] for case in quick} >= {"htm", "knn"}


def test_a_function_of_a_case_file_imports_only_one_side() -> None:
    ours = {"htm", "memorizing", "memxl", "memory_models"}  # memformer is the name of both
    for module in (cases_knn, cases_memformer, cases_memorizing, cases_memxl):
        tree = ast.parse(inspect.getsource(module))
        (theirs,) = (
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "theirs"
        )
        imported = {
            name.partition(".")[0]
            for node in ast.walk(theirs)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not imported & ours, module.__name__


def test_recall_counts_scores_not_places() -> None:
    best = torch.tensor([[9.0, 8.0, 7.0], [5.0, 4.0, 4.0]])

    def recall(*rows: list[float]) -> float:
        return measure.recall({"best": best, "found": torch.tensor(rows)})

    assert recall([9.0, 8.0, 7.0], [5.0, 4.0, 4.0]) == 1
    assert recall([7.0, 9.0, 8.0], [4.0, 4.0, 5.0]) == 1, "in any order"
    assert recall([9.0, 8.0, 6.9], [5.0, 3.9, 4.0]) == pytest.approx(4 / 6)
    assert recall([9.0, 8.0, 7.0 - 1e-6], [5.0, 4.0, 4.0]) == 1, "rounding is no miss"
    missing, broken = float("-inf"), float("nan")
    assert recall([9.0, missing, broken], [float("inf"), 4.0, 4.0]) == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        measure.recall({"best": best, "found": best[:, :2]})
    with pytest.raises(ValueError, match="'found' and 'best'"):
        measure.recall({"best": best})


def test_only_our_recall_has_a_floor() -> None:
    best = torch.arange(8.0, 0.0, -1).view(1, 8)
    full, half = {"best": best, "found": best}, {"best": best, "found": best - 4}
    found = measure.compare_recall(full, half, floor=0.96)
    assert found.agrees
    assert found.recall == (1, 0.5)
    assert not measure.compare_recall(half, full, floor=0.96).agrees
    assert measure.compare_recall(half, full, floor=0.5).agrees


class Tampered(cases_knn.OurStore):
    """A memory that returns the right keys with the values of their neighbours."""

    def search(self, queries: Tensor) -> Tensor:
        pairs = super().search(queries)
        return torch.stack([pairs[..., 0, :], pairs[..., 1, :].roll(1, dims=2)], -2)


@pytest.mark.parametrize("step", ["lookup", "search", "add", "layer"])
@pytest.mark.parametrize("data", ["clustered", "random"])
def test_every_step_of_ours_finds_what_is_held(step: str, data: str) -> None:
    side = cases_knn.Stepping(cases_knn.OurStore, SMALL | {"step": step, "index": "exact", "data": data})
    side.warm_up()
    for index in range(3):
        side.step(index)
    assert measure.recall(side.results()) == 1
    assert side.results()["found"].shape == (64, cases_knn.K)
    assert len(side.given) == (3 if step in ("add", "layer") else 0)


def test_values_of_other_keys_are_not_found() -> None:
    side = cases_knn.Stepping(Tampered, SMALL | {"step": "search", "index": "exact"})
    assert measure.recall(side.results()) == 0


def test_faiss_flat_finds_the_same() -> None:
    side = cases_knn.theirs(SMALL | {"step": "lookup", "against": cases_knn.FLAT}, "unused")
    side.warm_up()
    side.step(0)
    assert measure.recall(side.results()) == 1


def test_keys_are_alike_in_both_processes_and_cluster_if_asked_to() -> None:
    def make(data: str) -> tuple[Tensor, Tensor, Tensor]:
        return cases_knn.keys_and_queries(rows=2, held=2048, more=8, queries=64, data=data, seed=3)

    for one, again in zip(make("clustered"), make("clustered"), strict=True):
        assert torch.equal(one, again)
    keys, more, queries = make("clustered")
    assert keys.shape == (2, 2048, 64)
    assert more.shape == (2, 8, 64)
    # Unit vectors; a query lies far nearer to some key than independent directions would (about 0.5 of 2048).
    assert torch.allclose(keys.norm(dim=-1), torch.ones(2, 2048), atol=1e-5)
    assert (queries @ keys.mT).amax(-1).min() > 0.8
    assert not torch.equal(keys[0], keys[1])
    with pytest.raises(ValueError, match="'other'"):
        make("other")


def test_least_work_of_a_search_counted_by_hand() -> None:
    def work(step: str, index: str = "exact", held: int = 16_384) -> Work:
        return cases_knn.least_work(step=step, index=index, rows=2, held=held, queries=4096)

    assert work("lookup").operations == 2 * 2 * 4096 * 16_384 * 64
    assert work("lookup", "ivf").operations == 2 * 2 * 4096 * (128 + 128) * 64, "128 centres, a list of 128"
    # Keys, queries, and 32 scores of 4 and ids of 8 bytes.
    assert work("lookup").bytes == 2 * (16_384 * 256 + 4096 * 256 + 4096 * 32 * 12)
    assert work("search").bytes == 2 * (16_384 * 256 + 4096 * 256 + 4096 * 32 * 512)
    # 512 keys and values in two rows are read and written.
    assert work("add").bytes == 2 * 2 * 512 * 512
    assert work("layer").operations - work("lookup").operations == 3 * 2 * 2 * 4096 * 32 * 64
    assert work("lookup", held=65_536).operations == 4 * work("lookup").operations


def test_least_work_of_the_models_counted_by_hand() -> None:
    # One more Memformer segment of replay: four passes over two layers and a write.
    def replayed(segments: int, *, replay: bool = True) -> float:
        return cases_memformer.least_work(segments=segments, target=512, replay=replay).operations

    square, time, slots = 512**2, 1024, 128
    own = 4 * time * square + 2 * time * time * 512
    cross = 2 * (time + slots) * square + 2 * time * slots * 512
    write = 2 * (2 * slots + time) * square + 2 * slots * (slots + time) * 512 + 14 * slots * square
    segment = 2 * (2 * (own + cross + 8 * time * square) + write)
    assert replayed(3) - replayed(2) == pytest.approx(4 * segment)
    assert replayed(3, replay=False) - replayed(2, replay=False) == pytest.approx(3 * segment)

    # Of a token of MemorizingTransformer's 8 layers: queries, one head of keys and values, output, and the
    # feed-forward; half the segment; 32 pairs in two layers; the vocabulary.
    found = cases_memorizing.least_work(segments=1, length=1024, backward=False).operations
    layer = 512 * (512 + 2 * 64 + 512 + 8 * 512) + 2 * 512 * 512
    assert found == pytest.approx(2 * 2048 * (8 * layer + 2 * 2 * 512 * 32 + 512 * 20_000))

    # The first segment of MemoryTransformerXL has no memory, and nobody reads what the last one writes.
    first = cases_memxl.least_work(segments=1, backward=False).operations
    maps = 256 * 20 * square + 2 * (128 + 256) * square
    scores = 2 * 256 * (128 + 128) * 512 + 256 * 128 * 512
    assert first == pytest.approx(2 * (4 * (maps + scores) + 256 * 512 * 20_000))
    for backward in (False, True):
        one, two = (cases_memxl.least_work(segments=n, backward=backward) for n in (1, 2))
        assert two.operations > 2 * one.operations
    assert cases_memxl.least_work(segments=1, backward=True).operations == pytest.approx(3 * first)


class Clock:
    """A side whose step takes what it is told."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, do: str, **arguments: Any) -> dict[str, float]:
        return {"wall": self.seconds, "cpu": self.seconds}


def test_the_limit_takes_its_turn() -> None:
    sides = Clock(1.0), Clock(2.0), Clock(3.0)
    found = measure.alternate(*sides, rounds=4, seconds=60)
    assert [times.wall for times in found] == [(seconds,) * 4 for seconds in (1.0, 2.0, 3.0)]
    product = limits.MatrixProduct(threads=1)
    times = product.ask("run", calls=2)
    assert product.operations == 2 * 1024**3
    assert 1e9 < product.operations / times["wall"] < 1e14
    with pytest.raises(ValueError, match="sing"):
        product.ask("sing", calls=1)


def row_of(case: Case, *, product: float = 0.02, **fields: Any) -> command.Row:
    """A row of a step of a second and 1e11 operations, with matrix products of `product` seconds."""
    second, other, product_times = (
        measure.Times(wall=(seconds,) * 3, cpu=(seconds,) * 3, calls=1) for seconds in (1.0, 3.0, product)
    )
    agreement = measure.Agreement(
        largest=0.0, stray_rows=0.0, compared=("best", "found"), agrees=True, recall=(1.0, 0.62)
    )
    outcome = measure.Outcome(
        case=case,
        times={1: (second, other), 2: (second, other)},
        extra_bytes=(1, 2),
        memory_method="sampled",
        agreement=agreement,
        others={1: None, 2: None},
        products={1: product_times, 2: product_times},
        longest=({"wall": 9.0, "cpu": 0.0009}, {"wall": 9.0, "cpu": 0.05}),
    )
    machine = limits.Limits(threads=1, operations_per_second=1.0, copy_bytes_per_second=1.0)
    machine._read.update({1 << power: 1e12 for power in range(16, 29)})
    return command.make_row(replace(outcome, **fields), machine)


def test_a_row_is_held_against_the_product_of_its_own_run(tmp_path: Path) -> None:
    work = Work(operations=1e11, bytes=1.0)
    case = Case(
        name="toy", settings={}, package="torch", work=work, near_limit=0.9, pause=1e-3, singly=5, recall=1.0
    )
    row = row_of(case)
    # 2 * 1024^3 operations in 0.02 s: 1e11 take 0.93 s.
    assert row.of_limit == pytest.approx(1e11 * 0.02 / 2**31)
    assert row.reached() == [("≥ 90% of limit", True), ("longest ≤ 1 ms", True)]
    assert [done for _, done in row_of(case, product=0.01).reached()] == [False, True]
    slow = ({"wall": 0.0, "cpu": 0.002}, {"wall": 0.0, "cpu": 0.0})
    assert [done for _, done in row_of(case, longest=slow).reached()] == [True, False]
    cells = " | ".join(row.cells())
    assert "recall 1.000 / 0.620" in cells
    assert "0.9 / 50" in cells
    assert json.loads(json.dumps(row.record()))["recall"] == [1.0, 0.62]


TOY = """
import torch

class Toy:
    def __init__(self, weights):
        self.steps = 0
    def warm_up(self): ...
    def step(self, index):
        self.steps += 1
    def results(self):
        return {"output": torch.ones(1)}

def theirs(settings, weights):
    import benchmarks  # ours: the other environment does not have it
    torch.save({}, weights)
    return Toy(weights)

def ours(settings, weights):
    return Toy(weights)
"""


@pytest.mark.slow
def test_the_other_side_may_be_ours(tmp_path: Path) -> None:
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    work = Work(operations=1.0, bytes=1.0)
    case = Case(name="toy", settings={}, package=OURS, work=work, file=file, near_limit=0.1, singly=3)
    found = measure.measure(case, peers_python=tmp_path / "none", threads=(1,), rounds=3, seconds=1)
    assert found.agreement.agrees
    assert len(found.products[1].cpu) == len(found.times[1][0].cpu)
    assert found.longest is not None
    assert all(side[clock] >= 0 for side in found.longest for clock in ("wall", "cpu"))


def test_ours_against_ours_needs_no_other_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def refuse(case: Case, *, peers_python: Path, **options: Any) -> measure.Outcome:
        asked.append(peers_python)
        raise ValueError("measured elsewhere")

    monkeypatch.setattr(command, "measure", refuse)
    where: dict[str, Any] = {"peers": tmp_path / "none", "out": tmp_path, "threads": (1,), "quick": False}
    assert command.speed(cases="memformer/replay or*", **where) == 1, (
        "the measurement was refused, not the call"
    )
    assert len(asked) == 1
    assert command.speed(cases="memformer/replay/*", **where) == 2, "this one needs it"


def smaller(case: Case, settings: Mapping[str, Any]) -> Case:
    return replace(case, settings={**case.settings, **settings})


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="needs the published packages: make peers")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("knn/layer exact/r2/m2k", {"held": 600, "queries": 64}),
        ("knn/lookup exact or Faiss flat/r2/m2k", {"held": 600, "queries": 64}),
        ("memformer/replay/s8x1024", {"segments": 2, "length": 32, "target": 8}),
        ("memformer/replay or back-propagation/s8x1024", {"segments": 2, "length": 32, "target": 8}),
        ("memxl/forward+backward/s4x256", {"segments": 1}),
        ("memorizing/training exact/s4x512", {"segments": 1, "length": 32}),
    ],
)
def test_both_sides_of_a_case_agree(name: str, settings: Mapping[str, Any]) -> None:
    case = smaller(found_by_name()[name], settings)
    python = peer.find_python(PEERS)
    found = measure.measure(case, peers_python=python, threads=(1,), rounds=1, seconds=0)
    assert found.agreement.agrees, found.agreement
