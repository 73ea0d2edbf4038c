"""Products with weights in float32 on the CPU, by whichever of torch's libraries is the faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

# Multiplications of a product from which on oneDNN takes less time than the library behind `F.linear`; below,
# looking up its kernel weighs more (measured on an EPYC of the fourth generation: 8 million are a draw).
_WORTH_IT = 1 << 24
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def are_plain(*modules: nn.Module) -> bool:
    """Whether all are nothing but their weights: no adapter, no quantised map in their place, no hooks."""
    return all(type(module) is nn.Linear and without_hooks(module) for module in modules)


def without_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs its `forward` and nothing else."""
    return not any(getattr(module, name) for name in _HOOKS)


def apply_map(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by `linear` where `module` is plain."""
    if not isinstance(module, nn.Linear) or not are_plain(module):
        return module(x)
    return linear(x, module.weight, module.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` of `x` `[..., width]`, to rounding."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not _fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias)):
        # As rows: what a function of our own returns must not be a view of something else.
        return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` that leaves no trace for a way back."""
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear` for x, weight and bias; None where not `needed`."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    # Where a gradient of the gradient is asked for, expressions that have one.
    back = F.linear if torch.is_grad_enabled() else product
    of_x = back(gradient, weight.mT) if needed[0] else None
    of_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if needed[1] else None
    of_bias = rows.sum(0) if needed[2] else None
    return of_x, of_weight, of_bias


def gradients_again(
    function: Callable[..., Tensor], inputs: list[Tensor], needed: tuple[bool, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)`, which is computed once more; None where not `needed`."""
    twice = torch.is_grad_enabled()
    if not twice:
        inputs = [part.detach().requires_grad_(need) for part, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        result = function(*inputs)
    wanted = [part for part, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=twice))
    return tuple(next(found) if need else None for need in needed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(gradient, x, weight, ctx.needs_input_grad)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dim() > 1
        and x.numel() * weight.shape[0] >= _WORTH_IT
        and _onednn()
    )


_PLAIN = (Tensor, nn.Parameter)


def _onednn() -> bool:
    # Read at each call, so that `torch.backends.mkldnn.flags` are obeyed.
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
