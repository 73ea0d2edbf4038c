"""bfloat16 and float16, as weights or by autocast: finite, near float32, forward and backward.

The float32 twin has the rounded weights and inputs, so that only the arithmetic differs.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_models import MemoryModule
from memory_models.models import config_fields
from memory_models.transformer import unit
from tests.members import MEMBERS, small

BATCH, SEGMENTS = 3, 4
HALVES = [torch.bfloat16, torch.float16]
# Rounding errors of tens of operations in a row are independent, and normalisations keep them from growing:
# they add up to about one rounding of the result, 1.6 of a gradient. One value that came to nothing, or one
# sum kept in half precision over all segments, is many times as much.
OUTPUT_EPS, GRADIENT_EPS = 2.0, 4.0
# What a member keeps in float32 whatever its weights are: it adds up what many segments bring.
ACCUMULATORS = {"memxl": {"long"}}


def run(
    module: MemoryModule[Any], x: Tensor, context: AbstractContextManager[Any]
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Outputs in float64, gradients of a loss over all segments, and the last memory.

    Args:
        module: whose weights get the gradients.
        x: `[batch, segments, time, dim]`.
        context: what the forward passes run in.
    """
    x = x.clone().requires_grad_()
    memory, outputs = module.init_memory(x.shape[0]), []
    with context:
        for segment in range(x.shape[1]):
            y, memory = module(x[:, segment], memory)
            outputs.append(y)
    out = torch.stack(outputs, 1).double()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weight).mean().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach(), {"x": x.grad, **gradients}, memory


def distance(seen: Tensor, wanted: Tensor) -> float:
    """How far apart, relative to the size of `wanted`, both as root mean squares."""
    return float((seen.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def end_to_end(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


def data(dtype: torch.dtype, module: MemoryModule[Any]) -> Tensor:
    return torch.randn(BATCH, SEGMENTS, module.segment_length, module.dim).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_half_precision_is_finite_and_near_float32(name: str, dtype: torch.dtype) -> None:
    half = small(name).to(dtype)
    exact = copy.deepcopy(half).float()
    x = data(dtype, half)
    seen, wanted = run(half, x, nullcontext()), run(exact, x.float(), nullcontext())
    gradients = end_to_end(seen[1])
    assert seen[0].isfinite().all()
    assert gradients.isfinite().all()
    assert seen[1].keys() == wanted[1].keys()
    eps = torch.finfo(dtype).eps
    assert distance(seen[0], wanted[0]) < OUTPUT_EPS * eps
    assert distance(gradients, end_to_end(wanted[1])) < GRADIENT_EPS * eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_matching_layers_and_zero_embeddings_stay_finite(name: str, zeros: bool, dtype: torch.dtype) -> None:
    matching = {"matching_layer": True} if "matching_layer" in config_fields(name) else {}
    for options in ({}, matching) if zeros and matching else (matching,):
        module = small(name, **options).to(dtype)
        x = data(dtype, module)
        if zeros:
            # All of the first segment, and every other token of the second.
            x[:, 0], x[:, 1, ::2] = 0, 0
        out, gradients, memory = run(module, x, nullcontext())
        assert out.isfinite().all()
        if zeros:
            # Norms one behind the other make it larger than float16 can hold: in float32 1e7 and more.
            del gradients["x"]
        assert end_to_end(gradients).isfinite().all()
        for path, leaf in memory.tensors().items():
            assert leaf.isfinite().all(), path


def test_unit_vectors_of_half_precision_neither_overflow_nor_vanish() -> None:
    x = torch.tensor([[6e4, 6e4], [3e-7, 0], [0, 0]], dtype=torch.float16, requires_grad=True)
    wanted = torch.tensor([[0.5**0.5, 0.5**0.5], [1, 0], [0, 0]])
    torch.testing.assert_close(unit(x).float(), wanted, atol=5e-4, rtol=0)
    (gradient,) = torch.autograd.grad(unit(x)[2].sum(), x)
    assert not gradient.any()
    wide = torch.randn(3, 5)
    assert torch.equal(unit(wide), torch.nn.functional.normalize(wide, dim=-1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_autocast_is_finite_and_near_float32(name: str, dtype: torch.dtype) -> None:
    module = small(name)
    twin = copy.deepcopy(module)
    x = data(dtype, module).float()
    seen = run(module, x, torch.autocast("cpu", dtype=dtype))
    wanted = run(twin, x, nullcontext())
    gradients = end_to_end(seen[1])
    assert seen[0].isfinite().all()
    assert gradients.isfinite().all()
    assert all(gradient.dtype == torch.float32 for gradient in seen[1].values())
    for path, leaf in wanted[2].tensors().items():
        assert seen[2].tensors()[path].dtype == leaf.dtype, path
    eps = torch.finfo(dtype).eps
    assert distance(seen[0], wanted[0]) < OUTPUT_EPS * eps
    assert distance(gradients, end_to_end(wanted[1])) < GRADIENT_EPS * eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_memory_is_kept_in_the_dtype_of_the_weights_and_accumulators_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    module = small(name).to(dtype)
    memory: Any = module.init_memory(BATCH)
    with torch.no_grad():
        for _ in range(2):
            for path, leaf in memory.tensors().items():
                if not leaf.is_floating_point():
                    assert leaf.dtype == torch.int64, path
                else:
                    kept = torch.float32 if path in ACCUMULATORS.get(name, ()) else dtype
                    assert leaf.dtype == kept, path
            _, memory = module(torch.randn(BATCH, module.segment_length, module.dim, dtype=dtype), memory)
