"""Rules of the contract for a memory: a value, whose rows are streams that do not see each other."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from memory_models.contract.subject import BATCH, Broken, Subject, poison, row_of, rule, same, same_memory
from memory_models.state import cat


@rule("batch-first", "every leaf of the memory has the batch as its first axis")
def _batch_first(subject: Subject) -> None:
    for batch in (2, 3):
        for memory in (subject.model.init_memory(batch), subject.warm(batch)):
            for path, leaf in memory.tensors().items():
                if leaf.dim() < 1 or leaf.shape[0] != batch:
                    raise Broken(f"{path} is {list(leaf.shape)} for a batch of {batch}")


@rule("structure", "the memory comes out with the structure, shapes and dtypes that it went in with")
def _structure(subject: Subject) -> None:
    memory = fresh = subject.model.init_memory(BATCH)
    half = subject.length // 2
    for size, close in ((subject.length, True), (half, False), (subject.length - half, True)):
        memory = subject.model(subject.input(size), memory, close=close)[1]
        if type(memory) is not type(fresh) or pytree.tree_structure(memory) != pytree.tree_structure(fresh):
            raise Broken(f"{memory} after close={close}, {fresh} at first")
        for path, leaf in fresh.tensors().items():
            now = memory.tensors()[path]
            if now.shape != leaf.shape or now.dtype != leaf.dtype:
                raise Broken(
                    f"{path} is {now.dtype}{list(now.shape)} after close={close}, "
                    f"was {leaf.dtype}{list(leaf.shape)}"
                )


@rule("pure", "the memory and the input given are bit-identical after the call")
def _pure(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    before, x_before = memory.map(torch.clone), x.clone()
    mask, reset = subject.flags(BATCH, subject.length, share=0.8), subject.flags(BATCH)
    for close in (True, False):
        subject.model(x, memory, close=close)
        subject.model(x, memory, mask=mask, reset=reset, close=close)
        same_memory("the memory given", memory, before, exact=True)
        same("the input given", x, x_before, exact=True)


@rule("deterministic", "the same call in evaluation mode gives the same result")
def _deterministic(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    one, two = subject.model(x, memory), subject.model(x, memory)
    same("the output of a second call", two[0], one[0], exact=True)
    same_memory("the memory of a second call", two[1], one[1], exact=True)


@rule("fresh", "no memory means a fresh memory")
def _fresh(subject: Subject) -> None:
    x = subject.input(subject.length)
    one, two = subject.model(x), subject.model(x, subject.model.init_memory(BATCH))
    same("the output", one[0], two[0])
    same_memory("the memory", one[1], two[1])


@rule("reset-fresh", "a reset row equals a fresh row, even if the old memory holds NaN")
def _reset_fresh(subject: Subject) -> None:
    rows = torch.tensor([False, True, False], device=subject.device)
    x = subject.input(subject.length)
    memory = poison(subject.warm(), rows)
    wanted = subject.model(x[1:2])
    starts = torch.zeros(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    starts[:, 0] = rows
    for form, reset in (("[batch]", rows), ("[batch, time]", starts)):
        y, after = subject.model(x, memory, reset=reset)
        same(f"the output of a row with reset {form}", y[1:2], wanted[0])
        same_memory(f"the memory of a row with reset {form}", row_of(after, 1), wanted[1])
    same_memory(
        "reset_memory's row",
        row_of(subject.model.reset_memory(memory, rows), 1),
        subject.model.init_memory(1),
    )


@rule("reset-others", "a reset leaves the other rows as they are")
def _reset_others(subject: Subject) -> None:
    rows = torch.tensor([False, True, False], device=subject.device)
    x, memory = subject.input(subject.length), subject.warm()
    plain, reset = subject.model(x, memory), subject.model(x, memory, reset=rows)
    for row in (0, 2):
        same(f"the output of row {row}", reset[0][row], plain[0][row])
        same_memory(f"the memory of row {row}", row_of(reset[1], row), row_of(plain[1], row))


@rule("rows", "rows do not see each other: permuted rows give permuted results, alone as in a batch")
def _rows(subject: Subject) -> None:
    order = torch.tensor([2, 0, 1], device=subject.device)
    x, memory = subject.input(subject.length), subject.warm()
    y, after = subject.model(x, memory)
    permuted = subject.model(x[order], memory.select(order))
    same("the output of permuted rows", permuted[0], y[order])
    same_memory("the memory of permuted rows", permuted[1], after.select(order))
    alone = [subject.model(x[row : row + 1], row_of(memory, row)) for row in range(BATCH)]
    same("the output of rows one by one", torch.cat([out for out, _ in alone]), y)
    same_memory("the memory of rows one by one", cat([m for _, m in alone]), after)


RULES = (
    _batch_first,
    _structure,
    _pure,
    _deterministic,
    _fresh,
    _reset_fresh,
    _reset_others,
    _rows,
)
