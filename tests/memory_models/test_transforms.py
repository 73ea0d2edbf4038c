"""Transforms of `torch.func` over members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from tests.members import MEMBERS, small

SEGMENTS = 3


@pytest.mark.parametrize("name", MEMBERS)
def test_grad_is_what_backward_gives(name: str) -> None:
    module = small(name).double()
    x = torch.randn(2, SEGMENTS, module.segment_length, module.dim, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        memory, total = None, torch.zeros((), dtype=torch.float64)
        for segment in x.unbind(1):
            y, memory = functional_call(module, parameters, (segment, memory))
            total = total + y.square().sum()
        return total

    parameters = dict(module.named_parameters())
    wanted = torch.autograd.grad(loss(parameters, x), list(parameters.values()), allow_unused=True)
    seen = grad(loss)({key: value.detach() for key, value in parameters.items()}, x)
    assert any(gradient is not None and gradient.any() for gradient in wanted)
    for key, gradient in zip(parameters, wanted, strict=True):
        expected = torch.zeros_like(parameters[key]) if gradient is None else gradient
        torch.testing.assert_close(seen[key], expected, atol=1e-9, rtol=1e-9, msg=key)
