"""Rules of the contract in use: saved memories, dtypes, long runs, odd input, compilation."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_models.checkpoints import load_memory, save_memory
from memory_models.contract.subject import BATCH, Broken, Subject, rule, same, same_memory

MANY_SEGMENTS = 50


@rule("save-load", "a saved memory and a saved state_dict give the same results")
def _save_load(subject: Subject) -> None:
    memory, x = subject.warm(), subject.input(subject.length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        save_memory(memory, path)
        loaded = load_memory(path, like=subject.model.init_memory(1))
    same_memory("the loaded memory", loaded, memory, exact=True)
    twin = copy.deepcopy(subject.model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(subject.model.state_dict())
    same("the output after load_state_dict", twin(x, loaded)[0], subject.model(x, memory)[0])


@rule("dtype", "float32 and bfloat16 stay what they are")
def _dtype(subject: Subject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(subject.original).to(dtype).eval()
        fresh = memory = model.init_memory(BATCH)
        for size in (subject.length, max(1, subject.length // 2)):
            y, memory = model(subject.input(size).to(dtype), memory)
            if y.dtype != dtype:
                raise Broken(f"the output of a {dtype} module is {y.dtype}")
            if not bool(y.isfinite().all()):
                raise Broken(f"the output of a {dtype} module is not finite")
        for path, leaf in fresh.tensors().items():
            if memory.tensors()[path].dtype != leaf.dtype:
                raise Broken(f"{path} is {memory.tensors()[path].dtype} after a segment, {leaf.dtype} before")


@rule("finite", "outputs and memory stay finite and the memory's bytes constant over many segments")
def _finite(subject: Subject) -> None:
    model = copy.deepcopy(subject.original).float().eval()
    memory: Any = model.init_memory(BATCH)
    size = memory.nbytes
    with torch.no_grad():
        for segment in range(MANY_SEGMENTS):
            y, memory = model(10 * subject.input(subject.length).float(), memory)
            memory = model.commit(memory)
            leaves = [y, *(leaf for leaf in memory.tensors().values() if leaf.is_floating_point())]
            if not all(bool(leaf.isfinite().all()) for leaf in leaves):
                raise Broken(f"not finite after segment {segment}")
            if memory.nbytes != size:
                raise Broken(f"the memory grew from {size} to {memory.nbytes} bytes")


@rule("empty", "no tokens and no rows are fine")
def _empty(subject: Subject) -> None:
    memory = subject.warm()
    y, after = subject.model(subject.input(0), memory, close=False)
    same("the output of no tokens", y, subject.input(0))
    same_memory("the memory after no tokens", after, memory, exact=True)
    x = subject.input(max(1, subject.length // 2))
    _, opened = subject.model(x, memory, close=False)
    late = subject.model(subject.input(0), opened)[1]
    same_memory("the memory of a segment ended by a call without tokens", late, subject.model(x, memory)[1])
    y, after = subject.model(subject.input(subject.length, batch=0))
    if y.shape != (0, subject.length, subject.model.dim) or after.batch_size != 0:
        raise Broken(f"no rows give an output of {list(y.shape)} and a memory of {after.batch_size} rows")


@rule("rejects", "bad input raises ValueError or TypeError")
def _rejects(subject: Subject) -> None:
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
        raise Broken(f"{case} raised nothing")


def _opened(subject: Subject, tokens: int) -> Any:
    return subject.model(subject.input(tokens), close=False)[1]


@rule(
    "compile", "torch.compile gives the same without graph breaks, in at most two graphs over many segments"
)
def _compile(subject: Subject) -> None:
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
            same(f"the output of segment {segment}", y, eager)
            same_memory(f"the memory of segment {segment}", memory, wanted)
    torch.compiler.reset()
    if graphs > 2:
        raise Broken(f"four segments of one shape took {graphs} graphs")


RULES = (
    _save_load,
    _dtype,
    _finite,
    _empty,
    _rejects,
    _compile,
)
