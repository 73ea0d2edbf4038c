"""Rules of the contract along time: cuts, padding and resets; causality, and where gradients go."""

from __future__ import annotations

import torch

from memory_models.contract.subject import BATCH, Broken, Subject, poison, row_of, rule, same, same_memory
from memory_models.unroll import unroll


@rule("pieces", "cutting a segment into pieces changes nothing")
def _pieces(subject: Subject) -> None:
    length, memory = subject.length, subject.warm()
    for total in {length, max(1, length - 1)}:
        x = subject.input(total)
        wanted = subject.model(x, memory)
        for size in {1, 2, max(1, length // 2)}:
            parts, now = [], memory
            for begin in range(0, total, size):
                end = min(begin + size, total)
                y, now = subject.model(x[:, begin:end], now, close=end == total)
                parts.append(y)
            same(f"the output of {total} tokens in pieces of {size}", torch.cat(parts, 1), wanted[0])
            same_memory(f"the memory of {total} tokens in pieces of {size}", now, wanted[1])


@rule("close-rows", "ending the segment row by row equals ending it for each row alone")
def _close_rows(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(max(1, subject.length - 1))
    close = torch.tensor([True, False, True], device=subject.device)
    _, after = subject.model(x, memory, close=close)
    for row in range(BATCH):
        _, wanted = subject.model(x[row : row + 1], row_of(memory, row), close=bool(close[row]))
        same_memory(f"the memory of row {row}", row_of(after, row), wanted)


@rule("segments", "cutting the input at segment boundaries changes nothing")
def _segments(subject: Subject) -> None:
    x, length = subject.input(3 * subject.length), subject.length
    wanted = unroll(subject.model, x)
    memory, parts = None, []
    for begin in range(0, 3 * length, length):
        y, memory = subject.model(x[:, begin : begin + length], memory)
        memory = subject.model.commit(memory)
        parts.append(y)
    same("the output of single segments", torch.cat(parts, 1), wanted[0])
    assert memory is not None
    same_memory("the memory of single segments", memory, wanted[1])


@rule("padding", "padding, NaN too, changes nothing and gives zero")
def _padding(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    mask = subject.flags(BATCH, subject.length, share=0.6)
    mask[:, 0] = torch.tensor([True, False, True], device=subject.device)
    mask[0] = torch.arange(subject.length, device=subject.device) < max(1, subject.length - 1)
    y, after = subject.model(torch.where(mask[..., None], x, torch.nan), memory, mask=mask)
    same("the output at padding", y[~mask], torch.zeros_like(y[~mask]), exact=True)
    for row in range(BATCH):
        wanted = subject.model(x[row : row + 1, mask[row]], row_of(memory, row))
        same(f"the output of row {row}", y[row : row + 1, mask[row]], wanted[0])
        same_memory(f"the memory of row {row}", row_of(after, row), wanted[1])


@rule("padding-row", "a row that is all padding keeps its memory")
def _padding_row(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    mask = torch.ones(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    mask[1] = False
    _, after = subject.model(x, memory, mask=mask)
    same_memory("the memory of the row", row_of(after, 1), row_of(memory, 1))


@rule("reset-inside", "a reset inside a call equals two separate streams")
def _reset_inside(subject: Subject) -> None:
    if subject.length < 2:
        return
    memory, x, cut = subject.warm(), subject.input(subject.length), subject.length // 2
    reset = torch.zeros(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    reset[1, cut] = True
    y, after = subject.model(x, memory, reset=reset)
    before, late = subject.model(x[1:2, :cut], row_of(memory, 1)), subject.model(x[1:2, cut:])
    same("the output before the reset", y[1:2, :cut], before[0])
    same("the output after the reset", y[1:2, cut:], late[0])
    same_memory("the memory of the row", row_of(after, 1), late[1])
    plain = subject.model(x, memory)
    same("the output of another row", y[2], plain[0][2])
    same_memory("the memory of another row", row_of(after, 2), row_of(plain[1], 2))
    # Nothing of the old document may survive, not even NaN.
    bad = x.clone()
    bad[1, :cut] = torch.nan
    y, after = subject.model(bad, poison(memory, reset.any(1)), reset=reset)
    same("the output after NaN and a reset", y[1:2, cut:], late[0])
    same_memory("the memory after NaN and a reset", row_of(after, 1), late[1])


@rule("causal", "no output depends on a later token, across segments too")
def _causal(subject: Subject) -> None:
    length = subject.length
    x = subject.input(2 * length).requires_grad_()
    y, _ = unroll(subject.model, x)
    for time in sorted({0, length // 2, length - 1, length, 2 * length - 1}):
        (gradient,) = torch.autograd.grad(y[:, time].sum(), x, retain_graph=True)
        if gradient[:, time + 1 :].abs().sum() > 0:
            raise Broken(f"the output at token {time} has a gradient to a later token")
    # By value too: what is detached shows in no gradient.
    changed = x.detach().clone()
    changed[:, length + length // 2 :] += 1.0
    moved, _ = unroll(subject.model, changed)
    same("the output before a changed token", moved[:, : length + length // 2], y[:, : length + length // 2])


def _gradient_across(subject: Subject, *, detach: bool) -> float:
    x = subject.input(subject.length).requires_grad_()
    _, memory = subject.model(x)
    # Two segments: a memory may reach back no further than one, or show what it holds only in the second.
    near, memory = subject.model(subject.input(subject.length), memory.detach() if detach else memory)
    far, _ = subject.model(subject.input(subject.length), memory)
    y = torch.cat([near, far], 1)
    if not y.requires_grad:
        return 0.0
    # Not the plain sum: a final norm can make that independent of everything.
    weight = torch.randn(y.shape, generator=subject.generator, dtype=y.dtype).to(y.device)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x, allow_unused=True)
    return 0.0 if gradient is None else float(gradient.abs().sum())


@rule("gradient", "a later loss reaches what was written exactly where differentiable_memory says so")
def _gradient(subject: Subject) -> None:
    seen = _gradient_across(subject, detach=False)
    if subject.model.differentiable_memory and seen == 0:
        raise Broken("differentiable_memory is True, but no gradient comes through the memory")
    if not subject.model.differentiable_memory and seen > 0:
        raise Broken("differentiable_memory is False, but a gradient comes through the memory")


@rule("detach", "detach stops the gradient")
def _detach(subject: Subject) -> None:
    if _gradient_across(subject, detach=True) > 0:
        raise Broken("a gradient comes through a detached memory: the module keeps state of its own")
    if any(leaf.requires_grad for leaf in subject.warm().detach().tensors().values()):
        raise Broken("a leaf of a detached memory requires a gradient")


RULES = (
    _pieces,
    _close_rows,
    _segments,
    _padding,
    _padding_row,
    _reset_inside,
    _causal,
    _gradient,
    _detach,
)
