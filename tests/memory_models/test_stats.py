"""Diagnostics reach whoever listens, and nobody else."""

import math
from typing import Any

import pytest
import torch

from memory_models import collect_stats, record
from memory_models.stats import AGE_BUCKETS, collecting, effective_number, weight_by_age
from tests.members import small_lm


def test_what_is_recorded_is_heard_inside_the_block_only() -> None:
    record("before", torch.ones(1))
    with collect_stats() as heard:
        record("gate", torch.tensor(2.0))
    record("after", torch.ones(1))
    assert {name: float(value) for name, value in heard.items()} == {"gate": 2.0}


def test_values_are_detached_and_the_last_one_counts() -> None:
    weight = torch.ones(1, requires_grad=True)
    with collect_stats() as heard:
        record("norm", weight * 2)
        record("norm", weight * 3)
    assert heard["norm"].item() == 3.0
    assert not heard["norm"].requires_grad


def test_the_inner_listener_hears_first() -> None:
    with collect_stats() as outer:
        with collect_stats() as inner:
            record("a", torch.ones(1))
        record("b", torch.ones(1))
    assert list(inner) == ["a"]
    assert list(outer) == ["b"]


def test_an_error_ends_the_listening() -> None:
    assert not collecting()
    try:
        with collect_stats():
            assert collecting()
            raise RuntimeError
    except RuntimeError:
        pass
    assert not collecting()


def test_recording_costs_a_compiled_module_no_graph_break() -> None:
    def recorded(x: torch.Tensor) -> torch.Tensor:
        record("x", x)
        return x + 1

    compiled = torch.compile(recorded, backend="eager", fullgraph=True)
    with collect_stats() as heard:
        assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert heard == {}


def test_htm_says_which_chunks_it_reads() -> None:
    lm = small_lm("htm")
    tokens = torch.randint(11, (2, lm.segment_length), generator=torch.Generator().manual_seed(0))
    memory, held = None, 0
    for _ in range(4):
        out = lm(tokens, memory, stats=True)
        for layer in range(2):
            ages, largest, used = (
                out.stats[f"htm/layer {layer}/{name}"]
                for name in ("hit age", "largest hit weight", "chunks used")
            )
            assert ages.shape[:2] == largest.shape
            assert ages.max() < max(held, 1)
            read = (ages >= 0).sum(-1)
            assert torch.equal(largest > 0, read > 0)
            assert (largest >= 1 / read.clamp(min=1) - 1e-6)[read > 0].all()
            chunks = [len(row[row >= 0].unique()) for row in ages]
            assert ((used >= min(held, 1) - 1e-6) & (used <= torch.tensor(chunks) + 1e-4)).all()
            # three chunks of four tokens, the newest of them open
            assert (out.stats[f"htm/layer {layer}/tokens held"] <= min(held, 12)).all()
        memory, held = out.memory, held + lm.segment_length
    assert torch.equal(lm(tokens, memory).logits, lm(tokens, memory, stats=True).logits)
    assert lm(tokens, memory).stats == {}


def test_the_effective_number_counts_what_is_used() -> None:
    weights = torch.tensor(
        [[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [2.0, 2.0, 2.0], [1.0, 1.0, 0.0], [2.0, 1.0, 1.0]]
    )
    # of shares 1/2, 1/4, 1/4 the entropy is 3/2 ln 2
    assert torch.allclose(effective_number(weights), torch.tensor([0.0, 1.0, 3.0, 2.0, 2**1.5]))


@pytest.mark.parametrize("combine", ["gate", "softmax"])
def test_memorizing_says_how_much_comes_from_memory(combine: str) -> None:
    lm = small_lm("memorizing", combine=combine, memory_layers=(1,))
    tokens = torch.randint(11, (2, lm.segment_length), generator=torch.Generator().manual_seed(0))
    first = lm(tokens, stats=True)
    assert (first.stats["memorizing/layer 1/memory share"] == 0).all()
    share = lm(tokens, first.memory, stats=True).stats["memorizing/layer 1/memory share"]
    assert share.shape == (2, lm.segment_length, 2, 1)
    assert ((share > 0) & (share < 1)).all()
    if combine == "gate":
        # the sigmoid of the initial 0 (section 3.1)
        assert (share == 0.5).all()


def test_weight_is_summed_by_segments_back() -> None:
    # Tokens of segments of 4: the newest, the oldest of the segment before; then 2, 3, 4, 5, 9 segments back.
    ages = torch.tensor([[0, 3, 4, 11, 12, 16, 35, -1, 10**6]])
    weights = 2.0 ** torch.arange(9)[None]
    [found] = weight_by_age(weights, ages, 4)
    wanted = {"1": 3, "2": 4, "3-4": 24, "5-8": 32, "9-16": 64, "16385+": 256}
    assert {name: float(value) for name, value in zip(AGE_BUCKETS, found, strict=True) if value} == wanted
    both = weight_by_age(weights[0, :, None].expand(2, 9, 1), ages[0, :, None].expand(2, 9, 1), 4,
                         lengths=torch.tensor([2, 0]))  # fmt: skip
    assert both.sum(-1).tolist() == [3, 0]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("htm", {"chunks": 8, "chunk_size": 4, "topk": 8}),
    ("htm", {"chunks": 8, "chunk_size": 4, "topk": 3, "matching_layer": True, "token_shift": True}),
    ("memorizing", {"memories": 40, "topk": 40}),
    ("memorizing", {"memories": 40, "topk": 5, "combine": "softmax"}),
    ("memorizing", {"memories": 40, "topk": 5, "store": "outside", "pending_segments": 1}),
    ("memorizing", {"memories": 40, "topk": 40, "xl_cache": 6}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_what_is_read_is_as_old_as_what_was_written(name: str, options: dict[str, Any]) -> None:
    lm = small_lm(name, **options)
    tokens = torch.randint(11, (2, lm.segment_length), generator=torch.Generator().manual_seed(0))
    memory = None
    for segment in range(5):
        out = lm(tokens, memory, stats=True)
        assert torch.equal(out.logits, lm(tokens, memory).logits)
        for layer, found in ((n, v) for n, v in out.stats.items() if n.endswith("weight by age")):
            # nothing from before the stream began; with a cache of a segment nothing from the segment before
            there = (found > 0).any(0).nonzero().flatten().tolist()
            oldest = math.ceil(math.log2(segment)) if segment else -1
            first = 1 if "xl_cache" in options else 0
            every = list(range(first, oldest + 1))
            assert there == every if options["topk"] > 5 else set(there) <= set(every)
            if name == "htm":
                # each query gives away a weight of 1
                assert torch.allclose(found.sum(-1), torch.tensor(float(min(segment, 1) * 6)).double())
            else:
                held = max(0, segment - first) > 0
                share = out.stats[layer.replace("weight by age", "memory share")]
                assert torch.allclose(found.sum(-1), share.sum((1, 2, 3)).double() * held)
        memory = lm.commit(out.memory)


def test_padding_reads_nothing_that_counts() -> None:
    for name, options in OPTIONS[:4]:
        lm = small_lm(name, **options)
        tokens = torch.randint(11, (2, lm.segment_length), generator=torch.Generator().manual_seed(0))
        memory = lm(tokens).memory
        mask = torch.arange(lm.segment_length) < torch.tensor([[4], [0]])
        padded, short = lm(tokens, memory, mask=mask, stats=True), lm(tokens[:, :4], memory, stats=True)
        for key in (key for key in short.stats if key.endswith("weight by age")):
            assert torch.allclose(padded.stats[key][0], short.stats[key][0])
            assert not padded.stats[key][1].any()
