"""Every member under `torch.compile`: values and gradients of eager mode, whole graphs, few of them.

`check_model`'s rule "compile" asks for equal values without gradient over four segments. Here it is training:
gradients through several segments, and more calls than any memory holds segments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from memory_models import MemoryModule
from tests.members import MEMBERS, small
from tests.memory_models.toys import Mean

BATCH = 3
# The rule "compile" runs for all members in the ordinary suite; what is here takes too long for it.
ALL_SLOW = [pytest.param(name, marks=[pytest.mark.slow]) for name in MEMBERS]


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tracing(name: str) -> AbstractContextManager[Any]:
    """What `name` needs to be traced as one graph: torch breaks the graph at its own `nn.GRU` by default."""
    return torch._dynamo.config.patch(allow_rnn=True) if name == "gru" else nullcontext()


def member(name: str, **options: Any) -> MemoryModule[Any]:
    """In float64, so that equalities can be asked for."""
    return small(name, **options).double()


def train(
    module: MemoryModule[Any], call: Callable[..., Any], x: Tensor, resets: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Outputs, gradients of a loss over all segments, and the last memory's leaves end to end.

    Args:
        module: whose weights get the gradients.
        call: the module, or the module compiled.
        x: `[batch, segments, time, dim]`.
        resets: bool `[batch, segments]`.
    """
    x = x.clone().requires_grad_()
    memory, outputs = module.init_memory(x.shape[0]), []
    for segment in range(x.shape[1]):
        y, memory = call(x[:, segment], memory, reset=resets[:, segment])
        outputs.append(y)
    out = torch.stack(outputs, 1)
    # Not the plain sum: a final norm makes that nearly independent of everything.
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weight).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    leaves = torch.cat([leaf.detach().double().flatten() for leaf in memory.tensors().values()])
    return out.detach(), {"x": x.grad, **gradients}, leaves


def check_training(name: str, backend: Any, *, segments: int, tolerance: float = 1e-9) -> None:
    module = member(name, depth=1)
    twin = copy.deepcopy(module)
    x = torch.randn(BATCH, segments, module.segment_length, module.dim, dtype=torch.float64)
    resets = torch.rand(BATCH, segments) < 0.2
    with tracing(name):
        compiled = torch.compile(twin, backend=backend, fullgraph=True, dynamic=False)
        seen = train(twin, compiled, x, resets)
    wanted = train(module, module, x, resets)
    torch.testing.assert_close(seen[0], wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(seen[2], wanted[2], rtol=tolerance, atol=tolerance)
    assert seen[1].keys() == wanted[1].keys()
    for path, gradient in wanted[1].items():
        torch.testing.assert_close(
            seen[1][path], gradient, rtol=tolerance, atol=tolerance, msg=lambda said, at=path: f"{at}: {said}"
        )


@pytest.mark.parametrize("name", ALL_SLOW)
def test_values_and_gradients_are_those_of_eager_mode(name: str) -> None:
    # Five segments: the small members forget within four. The first memory needs no gradient, those that
    # follow may, so that there are two graphs at most.
    counter = CompileCounterWithBackend("aot_eager")
    check_training(name, counter, segments=5)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_two_graphs_serve_all_segments(name: str) -> None:
    module, counter = member(name, depth=1), CompileCounterWithBackend("eager")
    wanted = memory = module.init_memory(BATCH)
    length = module.segment_length
    with torch.no_grad(), tracing(name):
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=False)
        for _ in range(12):
            x = torch.randn(BATCH, length, module.dim, dtype=torch.float64)
            mask, close = torch.rand(BATCH, length) < 0.9, torch.rand(BATCH) < 0.7
            # A row whose segment was left open has no room: it begins anew.
            reset = (torch.rand(BATCH) < 0.2) | (memory.open_length > 0)
            y, memory = compiled(x, memory, mask=mask, reset=reset, close=close)
            eager, wanted = module(x, wanted, mask=mask, reset=reset, close=close)
            torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-9)
            for path, leaf in wanted.tensors().items():
                torch.testing.assert_close(memory.tensors()[path], leaf, rtol=1e-9, atol=1e-9)
    # A fresh memory may be a learned state spread over the rows, in strides of its own.
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_a_reset_inside_the_segment_breaks_the_graph_and_changes_nothing(name: str) -> None:
    # How many documents there are is data, so that no whole graph can be had.
    module = member(name, depth=1)
    x = torch.randn(BATCH, module.segment_length, module.dim, dtype=torch.float64)
    reset = torch.zeros(BATCH, module.segment_length, dtype=torch.bool)
    reset[1, 2] = reset[2, 0] = True
    compiled = torch.compile(module, backend="eager", dynamic=False)
    with torch.no_grad():
        _, memory = module(x)
        y, after = compiled(x, memory, reset=reset)
        eager, wanted = module(x, memory, reset=reset)
    torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-9)
    for path, leaf in wanted.tensors().items():
        torch.testing.assert_close(after.tensors()[path], leaf, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_inductor_gives_the_values_and_gradients_of_eager_mode(name: str) -> None:
    check_training(name, "inductor", segments=3, tolerance=1e-7)


def test_each_class_has_graphs_of_its_own() -> None:
    class One(Mean):
        pass

    class Other(Mean):
        pass

    graphs = CompileCounterWithBackend("eager")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for module in (One(), Other(), Mean()):
            # Beyond the limit torch goes on without a compiler, and says so in its log only.
            torch.compile(module, backend=graphs, dynamic=False)(torch.randn(1, 2, 4))
    assert graphs.frame_count == 3
