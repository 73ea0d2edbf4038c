"""Memory replay in several processes: one reduction, and the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from memory_models import memory_replay
from tests.memory_models.toys import Mean
from tests.reference.replay import full_graph

SEGMENTS = 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
]


class Headed(nn.Module):
    """A memory with a head, of which the memory alone is used where no loss is asked, and one idle layer."""

    def __init__(self, *, idle: bool) -> None:
        super().__init__()
        self.memory, self.head = Mean(), nn.Linear(4, 2)
        self.idle = nn.Linear(1, 1) if idle else None

    def forward(self, x: Tensor, memory: Any = None) -> Any:
        y, memory = self.memory(x, memory)
        return self.head(y), memory


def made(*, idle: bool = False) -> Headed:
    torch.manual_seed(0)
    return Headed(idle=idle).double()


def data() -> Tensor:
    return torch.randn(SEGMENTS, 4, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def last(y: Tensor, index: int) -> Tensor | None:
    # The head has no part in the backward pass that reduces, which is the first segment's.
    return y.square().mean() if index == SEGMENTS - 1 else None


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def assert_close(seen: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for one, two in zip(seen, wanted, strict=True):
        if two is None:
            assert one is None or not one.any()
        else:
            assert one is not None
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def expected(rounds: int = 1) -> list[Tensor | None]:
    """Of one process with the whole batch, by one graph."""
    model = made()
    for _ in range(rounds):
        full_graph(model, list(data()), last)
    return gradients(model)


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mine = list(data()[:, 2 * rank : 2 * rank + 2])
    for options in OPTIONS:
        model = made(idle=bool(options.get("find_unused_parameters")))
        ddp = DDP(model, **options)
        for _ in range(3):
            ddp.zero_grad()
            memory_replay(ddp, mine, last)
            assert_close(gradients(model)[:4], expected())
        with ddp.no_sync():
            memory_replay(ddp, mine, last)
        memory_replay(ddp, mine, last)
        assert_close(gradients(model)[:4], expected(3))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_reduced_once(options: dict[str, Any]) -> None:
    model = made(idle=bool(options.get("find_unused_parameters")))
    ddp = DDP(model, **options)
    reduced: list[int] = []

    def count(_: Any, bucket: Any) -> Any:
        reduced.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    # DDP looks at the annotations themselves, which are strings in this file.
    count.__annotations__.clear()
    ddp.register_comm_hook(None, count)
    for _ in range(2):
        ddp.zero_grad()
        memory_replay(ddp, list(data()), last)
        assert_close(gradients(model), [*expected(), *[None] * (len(gradients(model)) - 4)])
        # Each number of the parameters once, however they are bucketed.
        assert sum(reduced) == sum(parameter.numel() for parameter in model.parameters())
        reduced.clear()
    with ddp.no_sync():
        memory_replay(ddp, list(data()), last)
    assert reduced == []


@pytest.mark.usefixtures("group")
def test_a_memory_made_outside_the_wrapper_and_inputs_with_a_graph() -> None:
    class Started(Headed):
        def __init__(self) -> None:
            super().__init__(idle=False)
            self.start = nn.Linear(4, 4)

    torch.manual_seed(0)
    model = Started().double()
    ddp = DDP(model)
    found = []
    for run, called in ((full_graph, model), (memory_replay, ddp)):
        model.zero_grad()
        x = model.start(data())
        run(called, list(x), last)
        found.append([gradient for gradient in gradients(model) if gradient is not None])
    assert len(found[0]) == len(found[1]) == 6
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("group")
def test_a_static_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="build it without static_graph"):
        memory_replay(DDP(made(), static_graph=True), list(data()), last)
