"""The htm member: equal to loops over tokens, and what its memory does and does not carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htm import HTM, HTMConfig
from memory_models import unroll
from tests.members import small
from tests.reference import htm as reference
from tests.reference.attention import rms_norm
from tests.reference.chunks import Chunks
from tests.reference.transformer import transformer

DIM, LENGTH = 8, 5
OPTIONS: dict[str, Any] = {
    "dim": DIM,
    "depth": 2,
    "heads": 2,
    "segment_length": LENGTH,
    "chunk_size": 4,
    "chunks": 3,
    "topk": 2,
}


def model(**options: Any) -> HTM:
    made = HTM(HTMConfig(**(OPTIONS | options))).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def by_loops(made: HTM, x: Tensor) -> Tensor:
    """One row `[time, dim]` through the whole model."""
    config = made.config

    def side(layer: int, stream: Tensor) -> Tensor:
        if layer not in config.layers_with_memory:
            return torch.zeros_like(stream)
        index = config.layers_with_memory.index(layer)
        read: Any = made.reads[index]
        norm: Any = made.read_norms[index]
        queries = rms_norm(stream, norm.weight)
        weights = dict(read.named_parameters())
        stored = rms_norm(stream, torch.ones(DIM, dtype=stream.dtype))
        if not config.write_gradient:
            stored = stored.detach()
        chunks, outputs = Chunks(config.chunks, config.chunk_size), []
        for begin in range(0, len(stream), LENGTH):
            end = min(begin + LENGTH, len(stream))
            asked = queries[None, begin:end]
            if read.matching:
                pairs = [torch.stack(chunk) for chunk in chunks.chunks]
                out = reference.read_matching(weights, asked, [pairs], heads=read.heads, topk=config.topk)
            elif not chunks.chunks:
                out = torch.zeros_like(asked)
            else:
                held = torch.stack([token for chunk in chunks.chunks for token in chunk])[None]
                out = reference.read(
                    weights,
                    asked,
                    held,
                    heads=read.heads,
                    topk=config.topk,
                    chunk_size=config.chunk_size,
                    add_positions=config.positions,
                    detach=not config.write_gradient,
                )
            outputs.append(out[0])
            for time in range(begin, end):
                before = stored[time - 1] if time > begin else torch.zeros_like(stored[time])
                chunks.write(torch.stack([stored[time], before]) if read.matching else stored[time])
        return torch.cat(outputs)

    return transformer(made.trunk, x, segment=LENGTH, first=lambda time: time // LENGTH * LENGTH, side=side)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_shift": True, "matching_layer": True},
        {"write_gradient": True},
        {"write_gradient": True, "matching_layer": True, "chunk_size": 3},
        {"memory_layers": (1,), "positions": False},
        {"chunk_size": 9, "chunks": 1, "memory_heads": 1, "memory_dim_head": 3},
        {"topk": 9},
    ],
    ids=str,
)
def test_the_model_equals_loops_in_values_and_gradients(options: dict[str, Any]) -> None:
    made = model(**options)
    x = torch.randn(2, 4 * LENGTH + 2, DIM, dtype=torch.float64, requires_grad=True)
    seen, wanted = unroll(made, x)[0], torch.stack([by_loops(made, row) for row in x])
    torch.testing.assert_close(seen, wanted, atol=1e-9, rtol=1e-9)
    inputs = [x, *made.parameters()]
    weights = torch.randn_like(seen)
    ours, theirs = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, retain_graph=True)
        for y in (seen, wanted)
    )
    names = ["x", *(name for name, _ in made.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name, check_dtype=False)


def test_before_anything_is_written_it_is_the_transformer_without_memory() -> None:
    made, window = (
        model(),
        small("window", **{k: OPTIONS[k] for k in ("dim", "depth", "heads", "segment_length")}),
    )
    window.double().load_state_dict(
        {name: value for name, value in made.state_dict().items() if name.startswith("trunk.")}
    )
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0], window(x)[0], atol=1e-12, rtol=0)


def test_the_read_never_sees_its_own_segment_except_through_attention() -> None:
    # Whatever the open segment holds, what is read comes from what was written.
    made = model()
    _, memory = unroll(made, torch.randn(1, LENGTH, DIM, dtype=torch.float64))
    _, opened = made(torch.randn(1, 3, DIM, dtype=torch.float64), memory, close=False)
    for before, after in zip(memory.layers, opened.layers, strict=True):
        assert all(torch.equal(after.tensors()[path], leaf) for path, leaf in before.tensors().items())


def test_all_that_was_written_and_kept_is_in_the_newest_chunks() -> None:
    made = model(depth=1)
    stored: list[Tensor] = []
    handle = made.read_norms[0].register_forward_pre_hook(lambda _, args: stored.append(args[0].detach()))
    _, memory = unroll(made, torch.randn(1, 17, DIM, dtype=torch.float64))
    handle.remove()
    normed = F.rms_norm(torch.cat(stored, 1), (DIM,))[0]
    # 17 tokens in chunks of 4: the last is chunk 4 with one token; chunks 2, 3 and 4 are kept.
    chunks = memory.layers[0]
    assert chunks.total.tolist() == [17]
    assert chunks.lengths().tolist() == [[4, 1, 4]]
    torch.testing.assert_close(chunks.contents[0, 2], normed[8:12])
    torch.testing.assert_close(chunks.contents[0, 0], normed[12:16])
    torch.testing.assert_close(chunks.contents[0, 1, 0], normed[16])


def test_what_left_the_memory_has_no_more_influence() -> None:
    made = model(depth=1, chunk_size=LENGTH, chunks=2)
    x = torch.randn(1, 4 * LENGTH, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, :LENGTH] += 1
    one, two = unroll(made, x)[0], unroll(made, other)[0]
    # With one layer the first segment is seen for two segments more, and then not at all.
    assert not torch.allclose(one[:, LENGTH : 3 * LENGTH], two[:, LENGTH : 3 * LENGTH])
    torch.testing.assert_close(one[:, 3 * LENGTH :], two[:, 3 * LENGTH :], atol=0, rtol=0)


@pytest.mark.parametrize("write_gradient", [False, True])
def test_gradient_through_what_is_stored_is_an_option(write_gradient: bool) -> None:
    made = model(write_gradient=write_gradient, matching_layer=True)
    assert made.differentiable_memory == write_gradient
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    _, memory = made(x)
    assert (
        any(leaf.requires_grad for layer in memory.layers for leaf in layer.tensors().values())
        == write_gradient
    )
    y, _ = made(torch.randn(1, LENGTH, DIM, dtype=torch.float64), memory)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x, allow_unused=True)
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == write_gradient


def test_the_bytes_of_the_memory_by_hand() -> None:
    memory = HTM(HTMConfig(**OPTIONS)).init_memory(3)
    window = 4 * 2 * (LENGTH * DIM)  # keys and values, float32
    hiddens = 4 * LENGTH * DIM
    chunks = 4 * (3 * 4 * DIM + 3 * DIM) + 8
    assert memory.nbytes == 3 * (2 * (window + hiddens + chunks) + 8)
