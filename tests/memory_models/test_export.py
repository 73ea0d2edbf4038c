"""Every member as a graph that runs elsewhere: `torch.export`, and ONNX run by onnxruntime.

A graph takes and returns tensors, so that a memory goes in and comes out as its leaves.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from htm.attend import attend as attend_to_chunks
from htm.attend import attend_portably as attend_to_chunks_portably
from memorizing.attend import attend as attend_to_pairs
from memorizing.attend import attend_portably as attend_to_pairs_portably
from memory_models import MemoryModule
from tests.members import MEMBERS, small

ROWS, SEGMENTS = 3, 6
# Options that change what is read or written; the rest of the graph is the same.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MEMBERS),
    ("htm", {"token_shift": True, "matching_layer": True}),
    ("htm", {"positions": False, "write_gradient": True}),
    ("memformer", {"write": "gru"}),
    ("memorizing", {"combine": "softmax", "kv_heads": 1, "xl_cache": 5}),
    ("memorizing", {"xl_cache": 4, "xl_shift": True, "age_bias": True, "gate_network": True}),
    ("memorizing", {"memories": 0}),
    ("memxl", {"token_shift": True, "matching_layer": True, "persistent": 2, "gate": "nbrc"}),
]


class Flat(nn.Module):
    """A member as a function of tensors: input, resets and the memory's leaves to output and leaves."""

    def __init__(self, module: MemoryModule[Any]) -> None:
        super().__init__()
        self.module = module
        self.structure = pytree.tree_structure(module.init_memory(1))

    def forward(self, x: Tensor, reset: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        memory = pytree.tree_unflatten(list(leaves), self.structure)
        y, memory = self.module(x, memory, reset=reset)
        return (y, *pytree.tree_leaves(memory))


def example(module: MemoryModule[Any], rows: int = ROWS) -> tuple[Tensor, ...]:
    """What `Flat` takes: a segment, a reset and a fresh memory."""
    weight = next(module.parameters())
    x = torch.randn(rows, module.segment_length, module.dim, dtype=weight.dtype)
    memory = module.init_memory(rows).detach()
    return (x, torch.arange(rows) == 1, *pytree.tree_leaves(memory))


def export(flat: Flat, *, strict: bool = False) -> ExportedProgram:
    """A graph for any number of rows from 2 on."""
    args, rows = example(flat.module), Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}, tuple({0: rows} for _ in args[2:]))
    return torch.export.export(flat, args, strict=strict, dynamic_shapes=shapes)


def check_segments(
    flat: Flat, other: Callable[..., Sequence[Tensor]], *, rows: int = ROWS, tolerance: float = 1e-9
) -> None:
    """Run `other` beside the member through several segments, each with its own memory."""
    args = example(flat.module, rows)
    seen: Sequence[Tensor] = args[2:]
    wanted: Sequence[Tensor] = args[2:]
    for _ in range(SEGMENTS):
        x, reset = torch.randn_like(args[0]), torch.rand(rows) < 0.3
        ours, theirs = flat(x, reset, *wanted), other(x, reset, *seen)
        for index, (one, two) in enumerate(zip(theirs, ours, strict=True)):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, msg=f"result {index}")
        seen, wanted = theirs[1:], ours[1:]


def operators(program: ExportedProgram) -> set[str]:
    """The namespaces of the operators in a graph."""
    return {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def check_export(name: str, options: dict[str, Any], *, strict: bool = False) -> None:
    """One graph for any number of rows, of torch's operators alone, equal to the member."""
    flat = Flat(small(name, **options).double())
    with torch.no_grad():
        program = export(flat, strict=strict)
        graph = program.module()
        for rows in (2, 5):
            check_segments(flat, graph, rows=rows)
    assert operators(program) == {"aten"}


# Each option of every member in the slow tests; the rings of one and the slots of another here.
@pytest.mark.parametrize("name", ["memorizing", "memxl"])
def test_an_exported_member_gives_the_same_and_needs_nothing_of_ours(name: str) -> None:
    check_export(name, {"depth": 1})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_every_option_can_be_exported(name: str, options: dict[str, Any]) -> None:
    check_export(name, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_strict_export_too(name: str) -> None:
    check_export(name, {}, strict=True)


@pytest.mark.slow
def test_an_exported_member_can_be_saved_and_loaded() -> None:
    flat, file = Flat(small("memformer", depth=1).double()), io.BytesIO()
    with torch.no_grad():
        torch.export.save(export(flat), file)
        file.seek(0)
        check_segments(flat, torch.export.load(file).module())


def test_an_outside_store_cannot_be_exported() -> None:
    # Its pairs are a resource of this process: the graph keeps the operator that asks it, and says so.
    program = export(Flat(small("memorizing", store="outside", depth=1).double()))
    assert "memory_models" in operators(program)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporter's notes about packages that it does not find."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def onnx_session(flat: Flat) -> Callable[..., Sequence[Tensor]]:
    """`flat` as a function that onnxruntime evaluates."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    with quietly():
        made = torch.onnx.export(export(flat), dynamo=True, verbose=False)
    assert made is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), options)
    used = {given.name for given in session.get_inputs()}
    names = [value.name for value in made.model.graph.inputs]

    def call(*args: Tensor) -> Sequence[Tensor]:
        given = {name: arg.numpy() for name, arg in zip(names, args, strict=True) if name in used}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return call


def check_onnx(name: str, options: dict[str, Any]) -> None:
    flat = Flat(small(name, **options))
    with torch.no_grad():
        graph = onnx_session(flat)
        for rows in (2, 5):
            # Float32 with other kernels: a few roundings apart, carried through the segments.
            check_segments(flat, graph, rows=rows, tolerance=2e-5)


@pytest.mark.slow
def test_onnxruntime_gives_the_same() -> None:
    check_onnx("memformer", {"depth": 1})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_onnxruntime_gives_the_same_for_every_option(name: str, options: dict[str, Any]) -> None:
    check_onnx(name, options)


def check_twins(
    one: Callable[..., Sequence[Tensor]], other: Callable[..., Sequence[Tensor]], inputs: list[Tensor]
) -> None:
    """Two functions give the same values and the same gradients for `inputs`."""
    results = []
    for function in (one, other):
        given = [each.clone().requires_grad_() for each in inputs]
        outputs = function(*given)
        weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
        loss = torch.stack([(w * o).sum() for w, o in zip(weights, outputs, strict=True)]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, given)])
    for seen, wanted in zip(*results, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_portable_read_of_chunks_is_the_operators(joint: bool, hidden: bool) -> None:
    rows, queries, heads, chunks, size, width, dim = 2, 5, 3, 4, 3, 8, 6
    chosen = torch.stack([torch.randperm(chunks)[:2] for _ in range(rows * queries)]).view(rows, queries, 2)
    places = None
    tokens = torch.randn(rows, chunks * size, width).double()
    if hidden:
        # The first place stays, so that each chunk has something to read.
        places = torch.rand(rows, queries, 2, size) < 0.6
        places[..., 0] = True
    positions = torch.randn(size, width).double()

    def read(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def call(asked: Tensor, weights: Tensor, tokens: Tensor) -> Sequence[Tensor]:
            weights = weights if joint else weights.softmax(-1)
            return form(asked, weights, chosen, tokens, positions, places, size, dim, joint, True)[:1]

        return call

    inputs = [
        torch.randn(rows, queries, heads, width).double(),
        torch.randn(rows, queries, 2).double(),
        tokens,
    ]
    check_twins(read(attend_to_chunks_portably), read(attend_to_chunks), inputs)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("topk", [2, 9])
def test_the_portable_read_of_pairs_is_the_operators(biased: bool, topk: int) -> None:
    stores, shared, memories, width = 2, 2, 5, 4
    # A row that holds nothing, one that is not full, one whose ring has come round.
    total = torch.tensor([0, 3, 12])
    keys, values = torch.randn(2, 3, stores, memories, width).double()
    queries = torch.randn(3, stores, 6, width).double()
    inputs = [queries, torch.randn(stores, shared, memories).double()] if biased else [queries]

    def read(form: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def call(asked: Tensor, bias: Tensor | None = None) -> Sequence[Tensor]:
            out, log, _, _ = form(asked, keys, values, total, topk, bias)
            return out, log[1:]

        return call

    check_twins(read(attend_to_pairs_portably), read(attend_to_pairs), inputs)
    bias = inputs[1] if biased else None
    seen = attend_to_pairs_portably(queries, keys, values, total, topk, bias)
    wanted = attend_to_pairs(queries, keys, values, total, topk, bias)
    assert torch.equal(seen[1] == -torch.inf, wanted[1] == -torch.inf)
    # The same pairs with the same weights, in any order.
    empty = torch.zeros(3, stores, 6, memories).double()
    spread = [empty.scatter_add(-1, result[2], result[3]) for result in (seen, wanted)]
    torch.testing.assert_close(*spread, rtol=1e-10, atol=1e-10)
