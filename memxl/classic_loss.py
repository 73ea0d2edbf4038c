"""Cross-entropy of a linear map's logits, without a second tensor of their size on the way there or back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memxl.products import gradients_again, product

# Rows of logits that stay in the cache while they become probabilities.
_ROWS = 32
# Logits that are there at once without a way back, and tokens a row of them has at the least.
_LOGITS, _TOKENS = 1 << 20, 256


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    """Mean of `F.cross_entropy(F.linear(x, weight, bias), targets)`; zero if there is no target.

    Args:
        x: `[n, dim]`.
        weight: `[tokens, dim]`.
        bias: `[tokens]`.
        targets: int64 `[n]`.
        ignore_index: target that takes no part.
    """
    narrow = x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type)
    if narrow or torch.compiler.is_compiling():
        return _plain(x, weight, bias, targets, ignore_index)
    if not torch.is_grad_enabled():
        return _by_tokens(x, weight, bias, targets, ignore_index)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, ignore_index)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(x, weight, bias)
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    # A part without targets has no loss, rather than zero divided by zero.
    return total / (targets != ignore_index).sum().clamp(min=1)


def _by_tokens(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`_plain`, with the logits of some of the tokens at a time."""
    width = max(_TOKENS, _LOGITS // max(1, len(x)))
    right, sums = x.new_zeros(len(x)), []
    for begin, (rows, offsets) in zip(
        range(0, len(weight), width), zip(weight.split(width), bias.split(width), strict=True), strict=True
    ):
        logits = product(x, rows, offsets)
        places = targets - begin
        here = (places >= 0) & (places < len(rows))
        chosen = logits.gather(1, torch.where(here, places, 0)[:, None]).squeeze(1)
        right = torch.where(here, chosen, right)
        largest = logits.amax(1, keepdim=True)
        sums.append(logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1)))
    counted = targets != ignore_index
    losses = torch.stack(sums).logsumexp(0) - right
    # where, not multiply: the loss at padding may be anything.
    return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Turns the logits into their gradient where they lie; row weights are left to the narrow factors."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        logits = product(x, weight, bias)
        counted = targets != ignore_index
        places = torch.where(counted, targets, 0)[:, None]
        right = logits.gather(1, places)
        sums = []
        for rows in logits.split(_ROWS):
            largest = rows.amax(1, keepdim=True)
            rows.sub_(largest).exp_()
            sums.append(rows.sum(1, keepdim=True))
            rows.div_(sums[-1])
            sums[-1] = sums[-1].log_().add_(largest)
        share = counted.to(x.dtype) / counted.sum().clamp(min=1)
        losses = torch.cat(sums) - right if sums else right
        logits.scatter_add_(1, places, torch.full_like(right, -1.0))
        ctx.save_for_backward(x, weight, bias, targets, share, logits)
        ctx.ignore_index = ignore_index  # type: ignore[attr-defined]
        # where, not multiply: the loss at padding may be anything.
        return torch.where(counted[:, None], losses, 0).mul_(share[:, None]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, share, of_logits = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(*parts: Tensor) -> Tensor:
                return _plain(parts[0], parts[1], parts[2], targets, ctx.ignore_index)

            return *gradients_again(again, [x, weight, bias], ctx.needs_input_grad[:3], gradient), None, None
        share = (gradient * share)[:, None]
        needed = ctx.needs_input_grad
        of_x = None
        if needed[0]:
            of_x = torch.where(share != 0, product(of_logits, weight.mT), 0).mul_(share)
        of_weight = of_logits.mT @ (x * share) if needed[1] else None
        of_bias = of_logits.mT @ share[:, 0] if needed[2] else None
        return of_x, of_weight, of_bias, None, None
