"""A model in what torch puts around it is saved, read and continued like the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memory_models import from_pretrained, generate, load_model, save_model, save_pretrained, unroll
from tests.members import small_lm
from tests.memory_models.saved import assert_same

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed": DistributedDataParallel,
    "both": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_without_its_wrapper(wrapper: str, tmp_path: Path) -> None:
    model = small_lm("window")
    wrapped = WRAPPERS[wrapper](model)
    save_model(wrapped, tmp_path / "one")
    memory = model.init_memory(2)
    save_pretrained(wrapped, tmp_path / "two", memory=memory)
    other, found = from_pretrained(tmp_path / "two", with_memory=True)
    assert_same(found, memory)
    for loaded in (load_model(tmp_path / "one"), other):
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_generates_the_same(wrapper: str) -> None:
    model = small_lm("memxl")
    prompt = torch.tensor([[1, 2, 3, 4, 0, 1, 2]])
    wanted = [step.token.tolist() for step in generate(model, prompt, max_new_tokens=4)]
    seen = [step.token.tolist() for step in generate(WRAPPERS[wrapper](model), prompt, max_new_tokens=4)]
    assert seen == wanted


@pytest.mark.parametrize("wrapper", [pytest.param("compiled", marks=pytest.mark.slow), "distributed"])
def test_a_wrapped_model_is_unrolled_through_its_wrapper(wrapper: str) -> None:
    model = small_lm("memxl")
    wrapped, calls = WRAPPERS[wrapper](model), []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.arange(20).view(1, 20) % 5
    wanted, last = unroll(model, tokens)
    wanted.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    seen, memory = unroll(wrapped, tokens)
    seen.square().mean().backward()
    assert len(calls) == 4
    torch.testing.assert_close(seen, wanted)
    torch.testing.assert_close(memory.tensors(), last.tensors())
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


def test_a_module_without_segments_is_named() -> None:
    with pytest.raises(TypeError, match="unroll takes a MemoryModule or a MemoryLM, got Linear"):
        unroll(DistributedDataParallel(nn.Linear(2, 2)), torch.zeros(1, 2, 2))
