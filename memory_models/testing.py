"""The contract as checks that anybody's module can be put to: `check_model(module)`.

Each rule is a law, tested on a float64 copy of the module in evaluation mode with random inputs. A module
that passes may be used wherever this library's own members are used.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memory_models.checkpoints import load_memory, save_memory
from memory_models.module import MemoryModule
from memory_models.state import Memory, cat
from memory_models.unroll import unroll

BATCH = 3
MANY_SEGMENTS = 50
# Float64 rounding over a few hundred operations, relative to the size of what is compared.
TOLERANCE = 1e-9


class ContractError(AssertionError):
    """A module breaks rules of the contract.

    Attributes:
        failures: what was seen, by the name of the rule.
    """

    def __init__(self, name: str, failures: dict[str, str]) -> None:
        self.failures = failures
        lines = "\n".join(f"  {rule} ({RULES[rule].law}): {seen}" for rule, seen in failures.items())
        super().__init__(f"{name} breaks {len(failures)} of {len(RULES)} rules:\n{lines}")


@dataclass(frozen=True)
class Rule:
    """One law: its name, what it says, and the check, which raises `_Broken`."""

    name: str
    law: str
    check: Callable[[_Subject], None]


RULES: dict[str, Rule] = {}


class _Broken(Exception):
    pass


def check_model(model: MemoryModule[Any], *, only: Collection[str] = (), skip: Collection[str] = ()) -> None:
    """Put a module to every rule of the contract.

    Args:
        model: the module, which is copied and not changed. Small ones are checked fastest.
        only: names of rules to check; empty means all (see `RULES`).
        skip: names of rules to leave out, such as `compile`, the slowest.

    Raises:
        ContractError: with every rule that is broken, by name, and what was seen.
        ValueError: for an unknown rule.
    """
    for name in (*only, *skip):
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}; known: {', '.join(RULES)}")
    failures = {}
    for rule in RULES.values():
        if (only and rule.name not in only) or rule.name in skip:
            continue
        try:
            rule.check(_Subject(model))
        except _Broken as error:
            failures[rule.name] = str(error)
        except Exception as error:
            failures[rule.name] = f"{type(error).__name__}: {error}"
    if failures:
        raise ContractError(type(model).__name__, failures)


class _Subject:
    # A float64 copy of the module with reproducible inputs.
    def __init__(self, model: MemoryModule[Any]) -> None:
        self.original = model
        self.model = copy.deepcopy(model).double().eval()
        self.length = model.segment_length
        self.generator = torch.Generator().manual_seed(0)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def input(self, time: int, batch: int = BATCH) -> Tensor:
        x = torch.randn(batch, time, self.model.dim, generator=self.generator, dtype=torch.float64)
        return x.to(self.device)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        return (torch.rand(*shape, generator=self.generator) < share).to(self.device)

    def warm(self, batch: int = BATCH, segments: int = 2) -> Any:
        with torch.no_grad():
            return unroll(self.model, self.input(segments * self.length, batch))[1]


def _rule(name: str, law: str) -> Callable[[Callable[[_Subject], None]], Callable[[_Subject], None]]:
    def add(check: Callable[[_Subject], None]) -> Callable[[_Subject], None]:
        RULES[name] = Rule(name, law, check)
        return check

    return add


def _same(what: str, seen: Tensor, wanted: Tensor, *, exact: bool = False) -> None:
    if seen.shape != wanted.shape or seen.dtype != wanted.dtype:
        raise _Broken(
            f"{what} is {seen.dtype}{list(seen.shape)}, should be {wanted.dtype}{list(wanted.shape)}"
        )
    if seen.numel() == 0:
        return
    if exact or not seen.is_floating_point():
        # NaN equals NaN here, and nothing else.
        if not torch.equal(seen.isnan(), wanted.isnan()) or not bool(((seen == wanted) | seen.isnan()).all()):
            raise _Broken(f"{what} differs")
        return
    difference = (seen - wanted).detach().abs().max()
    # Not "difference > tolerance", which is false for NaN.
    if not bool(difference <= TOLERANCE * (1 + wanted.abs().max())):
        raise _Broken(f"{what} differs by {float(difference):.3g}")


def _same_memory(what: str, seen: Memory, wanted: Memory, *, exact: bool = False) -> None:
    if pytree.tree_structure(seen) != pytree.tree_structure(wanted):
        raise _Broken(f"{what} has another structure: {seen} instead of {wanted}")
    ours, theirs = seen.tensors(), wanted.tensors()
    addresses = wanted.addresses()
    for path, leaf in theirs.items():
        if path not in addresses:
            _same(f"{what}'s {path}", ours[path], leaf, exact=exact)


def _row(memory: Any, row: int) -> Any:
    return memory.select(torch.tensor([row], device=next(iter(memory.tensors().values())).device))


def _poison(memory: Any, rows: Tensor) -> Any:
    def fill(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return torch.where(rows.view(-1, *[1] * (leaf.dim() - 1)), torch.nan, leaf)

    return memory.map(fill)


@_rule("batch-first", "every leaf of the memory has the batch as its first axis")
def _batch_first(subject: _Subject) -> None:
    for batch in (2, 3):
        for memory in (subject.model.init_memory(batch), subject.warm(batch)):
            for path, leaf in memory.tensors().items():
                if leaf.dim() < 1 or leaf.shape[0] != batch:
                    raise _Broken(f"{path} is {list(leaf.shape)} for a batch of {batch}")


@_rule("structure", "the memory comes out with the structure, shapes and dtypes that it went in with")
def _structure(subject: _Subject) -> None:
    memory = fresh = subject.model.init_memory(BATCH)
    half = subject.length // 2
    for size, close in ((subject.length, True), (half, False), (subject.length - half, True)):
        memory = subject.model(subject.input(size), memory, close=close)[1]
        if type(memory) is not type(fresh) or pytree.tree_structure(memory) != pytree.tree_structure(fresh):
            raise _Broken(f"{memory} after close={close}, {fresh} at first")
        for path, leaf in fresh.tensors().items():
            now = memory.tensors()[path]
            if now.shape != leaf.shape or now.dtype != leaf.dtype:
                raise _Broken(
                    f"{path} is {now.dtype}{list(now.shape)} after close={close}, "
                    f"was {leaf.dtype}{list(leaf.shape)}"
                )


@_rule("pure", "the memory and the input given are bit-identical after the call")
def _pure(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    before, x_before = memory.map(torch.clone), x.clone()
    mask, reset = subject.flags(BATCH, subject.length, share=0.8), subject.flags(BATCH)
    for close in (True, False):
        subject.model(x, memory, close=close)
        subject.model(x, memory, mask=mask, reset=reset, close=close)
        _same_memory("the memory given", memory, before, exact=True)
        _same("the input given", x, x_before, exact=True)


@_rule("deterministic", "the same call in evaluation mode gives the same result")
def _deterministic(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    one, two = subject.model(x, memory), subject.model(x, memory)
    _same("the output of a second call", two[0], one[0], exact=True)
    _same_memory("the memory of a second call", two[1], one[1], exact=True)


@_rule("fresh", "no memory means a fresh memory")
def _fresh(subject: _Subject) -> None:
    x = subject.input(subject.length)
    one, two = subject.model(x), subject.model(x, subject.model.init_memory(BATCH))
    _same("the output", one[0], two[0])
    _same_memory("the memory", one[1], two[1])


@_rule("reset-fresh", "a reset row equals a fresh row, even if the old memory holds NaN")
def _reset_fresh(subject: _Subject) -> None:
    rows = torch.tensor([False, True, False], device=subject.device)
    x = subject.input(subject.length)
    memory = _poison(subject.warm(), rows)
    wanted = subject.model(x[1:2])
    starts = torch.zeros(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    starts[:, 0] = rows
    for form, reset in (("[batch]", rows), ("[batch, time]", starts)):
        y, after = subject.model(x, memory, reset=reset)
        _same(f"the output of a row with reset {form}", y[1:2], wanted[0])
        _same_memory(f"the memory of a row with reset {form}", _row(after, 1), wanted[1])
    _same_memory(
        "reset_memory's row", _row(subject.model.reset_memory(memory, rows), 1), subject.model.init_memory(1)
    )


@_rule("reset-others", "a reset leaves the other rows as they are")
def _reset_others(subject: _Subject) -> None:
    rows = torch.tensor([False, True, False], device=subject.device)
    x, memory = subject.input(subject.length), subject.warm()
    plain, reset = subject.model(x, memory), subject.model(x, memory, reset=rows)
    for row in (0, 2):
        _same(f"the output of row {row}", reset[0][row], plain[0][row])
        _same_memory(f"the memory of row {row}", _row(reset[1], row), _row(plain[1], row))


@_rule("rows", "rows do not see each other: permuted rows give permuted results, alone as in a batch")
def _rows(subject: _Subject) -> None:
    order = torch.tensor([2, 0, 1], device=subject.device)
    x, memory = subject.input(subject.length), subject.warm()
    y, after = subject.model(x, memory)
    permuted = subject.model(x[order], memory.select(order))
    _same("the output of permuted rows", permuted[0], y[order])
    _same_memory("the memory of permuted rows", permuted[1], after.select(order))
    alone = [subject.model(x[row : row + 1], _row(memory, row)) for row in range(BATCH)]
    _same("the output of rows one by one", torch.cat([out for out, _ in alone]), y)
    _same_memory("the memory of rows one by one", cat([m for _, m in alone]), after)


@_rule("pieces", "cutting a segment into pieces changes nothing")
def _pieces(subject: _Subject) -> None:
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
            _same(f"the output of {total} tokens in pieces of {size}", torch.cat(parts, 1), wanted[0])
            _same_memory(f"the memory of {total} tokens in pieces of {size}", now, wanted[1])


@_rule("close-rows", "ending the segment row by row equals ending it for each row alone")
def _close_rows(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(max(1, subject.length - 1))
    close = torch.tensor([True, False, True], device=subject.device)
    _, after = subject.model(x, memory, close=close)
    for row in range(BATCH):
        _, wanted = subject.model(x[row : row + 1], _row(memory, row), close=bool(close[row]))
        _same_memory(f"the memory of row {row}", _row(after, row), wanted)


@_rule("segments", "cutting the input at segment boundaries changes nothing")
def _segments(subject: _Subject) -> None:
    x, length = subject.input(3 * subject.length), subject.length
    wanted = unroll(subject.model, x)
    memory, parts = None, []
    for begin in range(0, 3 * length, length):
        y, memory = subject.model(x[:, begin : begin + length], memory)
        memory = subject.model.commit(memory)
        parts.append(y)
    _same("the output of single segments", torch.cat(parts, 1), wanted[0])
    assert memory is not None
    _same_memory("the memory of single segments", memory, wanted[1])


@_rule("padding", "padding, NaN too, changes nothing and gives zero")
def _padding(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    mask = subject.flags(BATCH, subject.length, share=0.6)
    mask[:, 0] = torch.tensor([True, False, True], device=subject.device)
    mask[0] = torch.arange(subject.length, device=subject.device) < max(1, subject.length - 1)
    y, after = subject.model(torch.where(mask[..., None], x, torch.nan), memory, mask=mask)
    _same("the output at padding", y[~mask], torch.zeros_like(y[~mask]), exact=True)
    for row in range(BATCH):
        wanted = subject.model(x[row : row + 1, mask[row]], _row(memory, row))
        _same(f"the output of row {row}", y[row : row + 1, mask[row]], wanted[0])
        _same_memory(f"the memory of row {row}", _row(after, row), wanted[1])


@_rule("padding-row", "a row that is all padding keeps its memory")
def _padding_row(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    mask = torch.ones(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    mask[1] = False
    _, after = subject.model(x, memory, mask=mask)
    _same_memory("the memory of the row", _row(after, 1), _row(memory, 1))


@_rule("reset-inside", "a reset inside a call equals two separate streams")
def _reset_inside(subject: _Subject) -> None:
    if subject.length < 2:
        return
    memory, x, cut = subject.warm(), subject.input(subject.length), subject.length // 2
    reset = torch.zeros(BATCH, subject.length, dtype=torch.bool, device=subject.device)
    reset[1, cut] = True
    y, after = subject.model(x, memory, reset=reset)
    before, late = subject.model(x[1:2, :cut], _row(memory, 1)), subject.model(x[1:2, cut:])
    _same("the output before the reset", y[1:2, :cut], before[0])
    _same("the output after the reset", y[1:2, cut:], late[0])
    _same_memory("the memory of the row", _row(after, 1), late[1])
    plain = subject.model(x, memory)
    _same("the output of another row", y[2], plain[0][2])
    _same_memory("the memory of another row", _row(after, 2), _row(plain[1], 2))
    # Nothing of the old document may survive, not even NaN.
    bad = x.clone()
    bad[1, :cut] = torch.nan
    y, after = subject.model(bad, _poison(memory, reset.any(1)), reset=reset)
    _same("the output after NaN and a reset", y[1:2, cut:], late[0])
    _same_memory("the memory after NaN and a reset", _row(after, 1), late[1])


@_rule("causal", "no output depends on a later token, across segments too")
def _causal(subject: _Subject) -> None:
    length = subject.length
    x = subject.input(2 * length).requires_grad_()
    y, _ = unroll(subject.model, x)
    for time in sorted({0, length // 2, length - 1, length, 2 * length - 1}):
        (gradient,) = torch.autograd.grad(y[:, time].sum(), x, retain_graph=True)
        if gradient[:, time + 1 :].abs().sum() > 0:
            raise _Broken(f"the output at token {time} has a gradient to a later token")
    # By value too: what is detached shows in no gradient.
    changed = x.detach().clone()
    changed[:, length + length // 2 :] += 1.0
    moved, _ = unroll(subject.model, changed)
    _same("the output before a changed token", moved[:, : length + length // 2], y[:, : length + length // 2])


def _gradient_across(subject: _Subject, *, detach: bool) -> float:
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


@_rule("gradient", "a later loss reaches what was written exactly where differentiable_memory says so")
def _gradient(subject: _Subject) -> None:
    seen = _gradient_across(subject, detach=False)
    if subject.model.differentiable_memory and seen == 0:
        raise _Broken("differentiable_memory is True, but no gradient comes through the memory")
    if not subject.model.differentiable_memory and seen > 0:
        raise _Broken("differentiable_memory is False, but a gradient comes through the memory")


@_rule("detach", "detach stops the gradient")
def _detach(subject: _Subject) -> None:
    if _gradient_across(subject, detach=True) > 0:
        raise _Broken("a gradient comes through a detached memory: the module keeps state of its own")
    if any(leaf.requires_grad for leaf in subject.warm().detach().tensors().values()):
        raise _Broken("a leaf of a detached memory requires a gradient")


@_rule("save-load", "a saved memory and a saved state_dict give the same results")
def _save_load(subject: _Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        save_memory(memory, path)
        loaded = load_memory(path, like=subject.model.init_memory(1))
    _same_memory("the loaded memory", loaded, memory, exact=True)
    twin = copy.deepcopy(subject.model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(subject.model.state_dict())
    _same("the output after load_state_dict", twin(x, loaded)[0], subject.model(x, memory)[0])


@_rule("dtype", "float32 and bfloat16 stay what they are")
def _dtype(subject: _Subject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(subject.original).to(dtype).eval()
        fresh = memory = model.init_memory(BATCH)
        for size in (subject.length, max(1, subject.length // 2)):
            y, memory = model(subject.input(size).to(dtype), memory)
            if y.dtype != dtype:
                raise _Broken(f"the output of a {dtype} module is {y.dtype}")
            if not bool(y.isfinite().all()):
                raise _Broken(f"the output of a {dtype} module is not finite")
        for path, leaf in fresh.tensors().items():
            if memory.tensors()[path].dtype != leaf.dtype:
                raise _Broken(
                    f"{path} is {memory.tensors()[path].dtype} after a segment, {leaf.dtype} before"
                )


@_rule("finite", "outputs and memory stay finite and the memory's bytes constant over many segments")
def _finite(subject: _Subject) -> None:
    model = copy.deepcopy(subject.original).float().eval()
    memory: Any = model.init_memory(BATCH)
    size = memory.nbytes
    with torch.no_grad():
        for segment in range(MANY_SEGMENTS):
            y, memory = model(10 * subject.input(subject.length).float(), memory)
            memory = model.commit(memory)
            leaves = [y, *(leaf for leaf in memory.tensors().values() if leaf.is_floating_point())]
            if not all(bool(leaf.isfinite().all()) for leaf in leaves):
                raise _Broken(f"not finite after segment {segment}")
            if memory.nbytes != size:
                raise _Broken(f"the memory grew from {size} to {memory.nbytes} bytes")


@_rule("empty", "no tokens and no rows are fine")
def _empty(subject: _Subject) -> None:
    memory = subject.warm()
    y, after = subject.model(subject.input(0), memory, close=False)
    _same("the output of no tokens", y, subject.input(0))
    _same_memory("the memory after no tokens", after, memory, exact=True)
    x = subject.input(max(1, subject.length // 2))
    _, opened = subject.model(x, memory, close=False)
    late = subject.model(subject.input(0), opened)[1]
    _same_memory("the memory of a segment ended by a call without tokens", late, subject.model(x, memory)[1])
    y, after = subject.model(subject.input(subject.length, batch=0))
    if y.shape != (0, subject.length, subject.model.dim) or after.batch_size != 0:
        raise _Broken(f"no rows give an output of {list(y.shape)} and a memory of {after.batch_size} rows")


@_rule("rejects", "bad input raises ValueError or TypeError")
def _rejects(subject: _Subject) -> None:
    model, x, memory = subject.model, subject.input(subject.length), subject.warm()
    half = max(1, subject.length // 2)
    cases: dict[str, Callable[[], Any]] = {
        "a segment that is too long": lambda: model(subject.input(subject.length + 1)),
        "the wrong width": lambda: model(torch.cat([x, x], -1)),
        "an input of the wrong rank": lambda: model(x[0]),
        "integer embeddings": lambda: model(x.long()),
        "a memory with other rows": lambda: model(x[:2], memory),
        "a memory that is none": lambda: model(x, x),
        "a mask of the wrong shape": lambda: model(x, mask=subject.flags(BATCH, subject.length + 1)),
        "a mask that is not boolean": lambda: model(x, mask=torch.ones(BATCH, subject.length)),
        "a reset of the wrong shape": lambda: model(x, reset=subject.flags(BATCH + 1)),
        "an open segment that gets too long": lambda: model(
            subject.input(subject.length), _opened(subject, half)
        ),
    }
    if not bool((_opened(subject, half).open_length > 0).all()):
        # A member that writes at every token has no open segment to overflow.
        del cases["an open segment that gets too long"]
    for case, call in cases.items():
        try:
            call()
        except (ValueError, TypeError):
            continue
        raise _Broken(f"{case} raised nothing")


def _opened(subject: _Subject, tokens: int) -> Any:
    return subject.model(subject.input(tokens), close=False)[1]


@_rule(
    "compile", "torch.compile gives the same without graph breaks, in at most two graphs over many segments"
)
def _compile(subject: _Subject) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(subject.model, backend=backend, fullgraph=True, dynamic=False)
    wanted = memory = subject.model.init_memory(BATCH)
    reset = torch.tensor([False, True, False], device=subject.device)
    with torch.no_grad():
        for segment in range(4):
            x = subject.input(subject.length)
            y, memory = compiled(x, memory, reset=reset)
            eager, wanted = subject.model(x, wanted, reset=reset)
            _same(f"the output of segment {segment}", y, eager)
            _same_memory(f"the memory of segment {segment}", memory, wanted)
    torch.compiler.reset()
    if graphs > 2:
        raise _Broken(f"four segments of one shape took {graphs} graphs")
