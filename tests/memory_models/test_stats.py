"""Diagnostics reach whoever listens, and nobody else."""

import torch

from memory_models import collect_stats, record
from memory_models.stats import collecting


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
