"""The step of the nBRC cell in few passes over memory, with its way back written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memxl.products import gradients_again, linear_gradients, product

__all__ = ["nbrc", "nbrc_of_sums", "nbrc_plainly"]


def nbrc(candidate: Tensor, state: Tensor, of_candidate: Tensor, bias: Tensor, of_state: Tensor) -> Tensor:
    """The next state c * h + (1 - c) * n of a candidate x and a state h (Vecoven et al. 2021, §3).

    With a = 1 + tanh(U_a x + W_a h), c = σ(U_c x + W_c h), n = tanh(U x + a * h); biases belong to U.

    Args:
        candidate: `[..., dim]`.
        state: `[..., dim]`.
        of_candidate: `[3 dim, dim]`, U_a, U_c and U.
        bias: `[3 dim]`.
        of_state: `[2 dim, dim]`, W_a and W_c.
    """
    parts = (candidate, state, of_candidate, bias, of_state)
    # In half precision the short cuts below would cost digits; compilers fuse by themselves.
    exact = all(part.dtype == state.dtype for part in parts) and state.dtype in (torch.float32, torch.float64)
    device = state.device.type
    if not exact or device != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return nbrc_plainly(*parts)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return _NBRC.apply(*parts)
    return _step(*parts)[0]


def nbrc_plainly(
    candidate: Tensor, state: Tensor, of_candidate: Tensor, bias: Tensor, of_state: Tensor
) -> Tensor:
    """`nbrc` as a formula: any dtype, any device, differentiable any number of times."""
    feedback, keep, new = F.linear(candidate, of_candidate, bias).chunk(3, -1)
    feedback_of_state, keep_of_state = F.linear(state, of_state).chunk(2, -1)
    return nbrc_of_sums(feedback + feedback_of_state, keep + keep_of_state, new, state)


def nbrc_of_sums(feedback: Tensor, keep: Tensor, new: Tensor, state: Tensor) -> Tensor:
    """The next state from U_a x + W_a h, U_c x + W_c h, U x and h, each `[..., dim]`."""
    feedback, keep = torch.tanh(feedback), torch.sigmoid(keep)
    # a * h, with a = 1 + feedback, in two terms: nothing but the feedback is kept for the way back.
    new = torch.tanh(new + state + feedback * state)
    # lerp does not promote, and under autocast the projections are narrower than the state.
    return torch.lerp(new.to(state.dtype), state, keep.to(state.dtype))


def _step(
    candidate: Tensor, state: Tensor, of_candidate: Tensor, bias: Tensor, of_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The next state, and a, c and n side by side, `[..., 3 dim]`."""
    width = state.shape[-1]
    parts = product(candidate, of_candidate, bias)
    parts[..., : 2 * width] += product(state, of_state)
    a, keep, new = parts.chunk(3, -1)
    # 1 + tanh(u) = 2 σ(2 u): on the CPU a sigmoid takes a fifth of the time of a tanh.
    a.mul_(2).sigmoid_().mul_(2)
    keep.sigmoid_()
    new.addcmul_(a, state).mul_(2).sigmoid_().mul_(2).sub_(1)
    return torch.lerp(new, state, keep), parts


class _NBRC(torch.autograd.Function):
    """Keeps a, c and n besides the inputs."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        candidate: Tensor,
        state: Tensor,
        of_candidate: Tensor,
        bias: Tensor,
        of_state: Tensor,
    ) -> Tensor:
        after, parts = _step(candidate, state, of_candidate, bias, of_state)
        ctx.save_for_backward(candidate, state, of_candidate, bias, of_state, parts)
        return after

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        candidate, state, of_candidate, bias, of_state, parts = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = [candidate, state, of_candidate, bias, of_state]
            return gradients_again(nbrc_plainly, inputs, needed, gradient)
        width = state.shape[-1]
        a, keep, new = parts.chunk(3, -1)
        before = torch.empty_like(parts)
        of_a, of_keep, of_new = before.chunk(3, -1)
        kept = gradient * keep
        # (1 - c) (1 - n²) g, then a (2 - a) h times that, and c (1 - c) (h - n) g
        torch.sub(gradient, kept, out=of_new).addcmul_(of_new.clone(), new.square(), value=-1)
        torch.mul(of_new, state, out=of_a).mul_(a).mul_(2 - a)
        torch.sub(state, new, out=of_keep).mul_(kept).addcmul_(of_keep.clone(), keep, value=-1)
        of_candidate_in, of_candidate_weight, of_bias = linear_gradients(
            before, candidate, of_candidate, (needed[0], needed[2], needed[3])
        )
        of_state_in, of_state_weight, _ = linear_gradients(
            before[..., : 2 * width], state, of_state, (needed[1], needed[4], False)
        )
        if of_state_in is not None:
            of_state_in += kept.addcmul_(of_new, a)
        return of_candidate_in, of_state_in, of_candidate_weight, of_bias, of_state_weight
