"""Faster ways to the same numbers: products by oneDNN, the nBRC step, one lookup for many segments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memxl import AutoregressiveWrapper, MemoryTransformerXL, NBRCGate, products
from memxl.nbrc import nbrc, nbrc_plainly
from memxl.products import apply_map, linear

# Just as many multiplications as make oneDNN worth it.
ROWS, WIDTH, OUT = 64, 256, 1024


def gradients(result: Tensor, inputs: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * direction).sum(), inputs)


@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS // 2), (1, ROWS)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_large_products_are_those_of_float64(shape: tuple[int, ...], biased: bool) -> None:
    exact = [torch.randn(*shape, WIDTH).double(), torch.randn(OUT, WIDTH).double(), torch.randn(OUT).double()]
    inputs = [part.float().requires_grad_() for part in exact[: 3 if biased else 2]]
    exact = [part.requires_grad_() for part in exact[: 3 if biased else 2]]
    found, wanted, direction = linear(*inputs), F.linear(*exact), torch.randn(*shape, OUT)
    assert found.grad_fn is not None
    assert wanted.numel() * WIDTH == 1 << 24, "it is to be the fast way"
    # Of 256 summands of the size of one, rounded in float32.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(*inputs), found, rtol=0, atol=0)
    pairs = zip(
        gradients(found, inputs, direction), gradients(wanted, exact, direction.double()), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-4)


def test_large_products_of_parts_and_of_one_value_everywhere() -> None:
    wide, weight = torch.randn(ROWS, 2 * WIDTH), torch.randn(OUT, WIDTH, requires_grad=True)
    x = wide[:, :WIDTH].requires_grad_()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=1e-4)
    # The gradient of a sum is one value that is laid over all places.
    of_x, of_weight = torch.autograd.grad(linear(x, weight).sum(), [x, weight])
    torch.testing.assert_close(of_x, weight.sum(0).expand_as(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(of_weight, x.sum(0).expand_as(weight), rtol=0, atol=1e-3)


def test_large_products_have_a_second_gradient() -> None:
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(OUT, WIDTH, requires_grad=True)
    second = []
    for product in (linear, F.linear):
        (first,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.sum(), weight)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=0.05)


def losses_and_gradients(wrapper: AutoregressiveWrapper, tokens: Tensor) -> list[Tensor]:
    losses = torch.stack([found.loss for found in wrapper(tokens, return_loss=True)])
    weights = list(wrapper.parameters())
    return [losses, *torch.autograd.grad(losses.sum(), weights, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("way", ["by oneDNN", "without its operator", "switched off"])
def test_a_model_is_the_same_with_onednn_and_without(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if way == "by oneDNN" and not (operator and torch.backends.mkldnn.enabled):
        pytest.skip("this torch has no oneDNN")
    called = 0

    def watched(*inputs: Any) -> Tensor:
        nonlocal called
        called += 1
        return operator(*inputs)

    torch.manual_seed(2)
    wrapper, tokens = wrapped(), torch.randint(11, (3, 18))
    # Float64 never goes by oneDNN.
    expected = losses_and_gradients(wrapper, tokens)
    monkeypatch.setattr(products, "_WORTH_IT", 1)
    # The operator is private, and may be gone from another torch.
    known = {} if way == "without its operator" else {"_linear_pointwise": watched}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**known))
    if way == "switched off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    found = losses_and_gradients(wrapper.float(), tokens)
    assert (called > 0) == (way == "by oneDNN")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-6)


def test_hooks_and_other_maps_are_obeyed() -> None:
    plain, x = nn.Linear(4, 4), torch.randn(2, 4)
    plain.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(apply_map(plain, x), F.linear(x, plain.weight, plain.bias) + 1)
    torch.testing.assert_close(apply_map(nn.Tanh(), x), x.tanh())

    gate, state = NBRCGate(4), torch.randn(2, 4)
    before = gate(x, state)
    gate.from_candidate.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    gate.from_state.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    # With nothing to add, both σ are a half and the candidate is the state.
    torch.testing.assert_close(gate(x, state), state / 2 + state.tanh() / 2)
    assert not torch.allclose(before, gate(x, state))


@pytest.mark.parametrize("needed", [(0, 1, 2, 3, 4), (0, 3), (1,), (4,)], ids=str)
@pytest.mark.parametrize("before", [(2, 3), ()], ids=str)
def test_the_nbrc_step_is_the_formula(before: tuple[int, ...], needed: tuple[int, ...]) -> None:
    shapes = [(*before, 4), (*before, 4), (12, 4), (12,), (8, 4)]
    parts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs = [parts[index].requires_grad_() for index in needed]
    found, wanted, direction = nbrc(*parts), nbrc_plainly(*parts), torch.randn(*before, 4).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(nbrc(*parts), wanted, rtol=0, atol=1e-14)
    pairs = zip(gradients(found, inputs, direction), gradients(wanted, inputs, direction), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    if len(needed) == len(parts):
        torch.autograd.gradgradcheck(nbrc, parts)


def test_the_nbrc_step_writes_into_nothing_it_was_given() -> None:
    parts = [torch.randn(shape) for shape in [(3, 4), (3, 4), (12, 4), (12,), (8, 4)]]
    copies = [part.clone() for part in parts]
    nbrc(*(part.requires_grad_() for part in parts)).sum().backward()
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def wrapped() -> AutoregressiveWrapper:
    model = MemoryTransformerXL(11, 8, 5, 2, heads=2, mem_len=4, lmem_len=3, memory_layers=[2]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return AutoregressiveWrapper(model)


def one_after_the_other(wrapper: AutoregressiveWrapper, tokens: Tensor, step: Any) -> list[Tensor]:
    """Losses by the model's own call, each learnt from before the next segment is read."""
    memory, found = None, []
    for begin in range(0, tokens.shape[1] - 1, 5):
        segment = tokens[:, begin : begin + 6]
        logits, memory = wrapper.net(segment[:, :-1], memory)
        found.append(F.cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten()))
        step(found[-1])
    return found


@pytest.mark.parametrize("steps", [False, True])
def test_one_lookup_for_all_segments_changes_nothing(steps: bool) -> None:
    tokens = torch.randint(11, (3, 18))
    kept: list[list[Any]] = []
    for own in (True, False):
        torch.manual_seed(1)
        wrapper = wrapped()
        optimiser = torch.optim.SGD(wrapper.parameters(), lr=0.1)

        def step(loss: Tensor, optimiser: torch.optim.Optimizer = optimiser) -> None:
            loss.backward(retain_graph=True)
            # After a step the tokens still to come have other embeddings.
            if steps:
                optimiser.step()

        if own:
            losses = []
            for found in wrapper(tokens, return_loss=True):
                losses.append(found.loss)
                step(found.loss)
        else:
            losses = one_after_the_other(wrapper, tokens, step)
        kept.append([torch.stack(losses), wrapper.net.embed.weight.grad, wrapper.net.embed.weight.detach()])
    assert len(kept[0][0]) == 4
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_backward_pass_makes_one_gradient_of_the_table() -> None:
    wrapper, tokens = wrapped(), torch.randint(11, (2, 21))
    losses = [found.loss for found in wrapper(tokens, return_loss=True)]
    nodes, seen = [torch.stack(losses).sum().grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    table = wrapper.net.embed.weight
    into = [
        node
        for node in seen
        for parent, _ in node.next_functions
        if parent is not None and getattr(parent, "variable", None) is table
    ]
    assert len(losses) == 4
    assert len(into) == 1


def test_tables_that_do_more_than_look_up_are_called() -> None:
    wrapper, tokens = wrapped(), torch.randint(11, (2, 11))
    wrapper.net.embed.register_forward_hook(lambda module, args, out: 2 * out)
    expected = one_after_the_other(wrapper, tokens, lambda loss: None)
    found = [part.loss for part in wrapper(tokens, return_loss=True)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-12)
