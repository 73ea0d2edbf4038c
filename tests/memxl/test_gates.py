"""Gates of the residual stream and of the memory's write."""

import math

import pytest
import torch

from memxl import GRUGate, MogrifiedGate, Mogrifier, NBRCGate, make_gate
from tests.reference.memxl_classic import nbrc

DIM = 6


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape, DIM, dtype=torch.float64), torch.randn(*shape, DIM, dtype=torch.float64)


def test_gru_gate_is_the_papers_formula() -> None:
    gate = GRUGate(DIM).double()
    y, x = pair(2, 3)
    w_r, w_z, w_h = gate.from_candidate.weight.chunk(3)
    u_r, u_z = gate.from_state.weight.chunk(2)
    r = torch.sigmoid(y @ w_r.T + x @ u_r.T)
    z = torch.sigmoid(y @ w_z.T + x @ u_z.T - gate.bias)
    h = torch.tanh(y @ w_h.T + (r * x) @ gate.from_reset_state.weight.T)
    torch.testing.assert_close(gate(y, x), (1 - z) * x + z * h, rtol=0, atol=1e-14)


def test_nbrc_gate_is_the_papers_formula() -> None:
    gate = NBRCGate(DIM, bias=0.3).double()
    x, h = pair(2, 3)
    torch.testing.assert_close(gate(x, h), nbrc(gate, x, h), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["gru", "nbrc"])
def test_a_closed_gate_is_the_identity(kind: str) -> None:
    gate = make_gate(kind, DIM, bias=math.inf).double()
    candidate, state = pair(2, 3)
    assert torch.equal(gate(candidate, state), state)


@pytest.mark.parametrize("kind", ["gru", "nbrc"])
def test_an_open_gate_replaces_the_state_by_a_tanh(kind: str) -> None:
    gate = make_gate(kind, DIM, bias=-math.inf).double()
    candidate, state = pair(2, 3)
    assert bool((gate(candidate, state).abs() <= 1).all())
    assert bool((gate(candidate, 100 * state).abs() <= 1).all())


@pytest.mark.parametrize("kind", ["gru", "nbrc"])
def test_the_bias_says_how_much_is_kept(kind: str) -> None:
    gate = make_gate(kind, DIM, bias=2.0).double()
    for name, weight in gate.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.zeros_(weight)
    candidate, state = pair(4)
    new = torch.tanh(state) if kind == "nbrc" else torch.zeros_like(state)
    keep = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(gate(candidate, state), keep * state + (1 - keep) * new, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mogrify", [False, True])
@pytest.mark.parametrize("kind", ["gru", "nbrc"])
def test_gradients_are_right(kind: str, mogrify: bool) -> None:
    gate = make_gate(kind, DIM, mogrify=mogrify).double()
    candidate, state = pair(2)
    assert torch.autograd.gradcheck(gate, (candidate.requires_grad_(), state.requires_grad_()))


@pytest.mark.parametrize("rank", [None, 2])
def test_mogrifier_modulates_in_turns(rank: int | None) -> None:
    mogrifier = Mogrifier(DIM, rounds=3, rank=rank).double()
    x, h = pair(2, 3)
    first = 2 * torch.sigmoid(mogrifier.of_state(h)) * x
    second = 2 * torch.sigmoid(mogrifier.of_candidate(first)) * h
    third = 2 * torch.sigmoid(mogrifier.of_state(second)) * first
    found = mogrifier(x, h)
    assert torch.equal(found[0], third)
    assert torch.equal(found[1], second)


def test_no_rounds_change_nothing() -> None:
    x, h = pair(2)
    found = Mogrifier(DIM, rounds=0).double()(x, h)
    assert found[0] is x
    assert found[1] is h


@pytest.mark.parametrize("kind", ["gru", "nbrc"])
def test_half_precision_and_autocast_keep_the_states_dtype(kind: str) -> None:
    candidate, state = torch.randn(2, DIM), torch.randn(2, DIM)
    exact = make_gate(kind, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact(candidate, state)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact(candidate, state), rtol=0, atol=3e-2)
    assert exact.bfloat16()(candidate.bfloat16(), state.bfloat16()).dtype == torch.bfloat16


def test_make_gate_chooses_by_name() -> None:
    assert type(make_gate("gru", DIM)) is GRUGate
    assert type(make_gate("nbrc", DIM)) is NBRCGate
    mogrified = make_gate("gru", DIM, mogrify=True)
    assert type(mogrified) is MogrifiedGate
    assert type(mogrified.gate) is GRUGate


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_gate("lstm", DIM), r"unknown gate 'lstm'; known: gru, nbrc"),
        (lambda: make_gate("gru", 0), r"dim \(0\) must be at least 1"),
        (lambda: Mogrifier(DIM, rounds=-1), r"rounds \(-1\)"),
        (lambda: Mogrifier(DIM, rank=7), r"rank \(7\) must lie between 1 and dim \(6\)"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
