"""Diagnostics reach whoever listens, and nobody else."""

import pytest
import torch

from memory_models import collect_stats, record
from memory_models.stats import collecting, effective_number
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
