"""Gates that blend a candidate into a state: on the residual stream, and at the write of the long memory.

A gate is called `gate(candidate, state)` on `[..., dim]` each and returns the next state. `bias` says how
far it is closed at the start: as it goes to infinity the gate becomes the identity on the state.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from memxl.nbrc import nbrc, nbrc_of_sums
from memxl.products import are_plain

GateKind = Literal["gru", "nbrc"]


class GRUGate(nn.Module):
    """The gate of GTrXL, near identity at the start (Parisotto et al. 2019, arXiv 1910.06764, §3.2).

    With candidate y and state x: r = σ(W_r y + U_r x), z = σ(W_z y + U_z x - b),
    h = tanh(W_h y + U_h (r * x)), and the next state is (1 - z) * x + z * h.

    Args:
        dim: width of candidate and state.
        bias: start of the learned b `[dim]`; the paper's 2 keeps σ(2) = 88 % of the state.
    """

    def __init__(self, dim: int, *, bias: float = 2.0) -> None:
        super().__init__()
        self.from_candidate = nn.Linear(dim, 3 * dim, bias=False)
        self.from_state = nn.Linear(dim, 2 * dim, bias=False)
        self.from_reset_state = nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.full((dim,), float(bias)))

    def forward(self, candidate: Tensor, state: Tensor) -> Tensor:
        """Blend `candidate` `[..., dim]` into `state` `[..., dim]`."""
        reset, update, new = self.from_candidate(candidate).chunk(3, -1)
        reset_of_state, update_of_state = self.from_state(state).chunk(2, -1)
        reset = torch.sigmoid(reset + reset_of_state)
        update = torch.sigmoid(update + update_of_state - self.bias)
        new = torch.tanh(new + self.from_reset_state(reset * state))
        # lerp does not promote, and under autocast the projections are narrower than the state.
        return torch.lerp(state, new.to(state.dtype), update.to(state.dtype))


class NBRCGate(nn.Module):
    """Neuromodulated bistable recurrent cell (Vecoven et al. 2021, arXiv 2006.05252, §3).

    With candidate x and state h: a = 1 + tanh(U_a x + W_a h), c = σ(U_c x + W_c h + b), and the next
    state is c * h + (1 - c) * tanh(U x + a * h + b_h); where a > 1 a state can hold itself forever.

    Args:
        dim: width of candidate and state.
        bias: start of the learned b of c, that is how far the gate is closed; the paper has 0.
    """

    def __init__(self, dim: int, *, bias: float = 2.0) -> None:
        super().__init__()
        self.from_candidate = nn.Linear(dim, 3 * dim)
        self.from_state = nn.Linear(dim, 2 * dim, bias=False)
        with torch.no_grad():
            self.from_candidate.bias.zero_()[dim : 2 * dim] = bias

    def forward(self, candidate: Tensor, state: Tensor) -> Tensor:
        """Blend `candidate` `[..., dim]` into `state` `[..., dim]`."""
        if are_plain(self.from_candidate, self.from_state):
            first, second = self.from_candidate, self.from_state
            return nbrc(candidate, state, first.weight, first.bias, second.weight)
        feedback, keep, new = self.from_candidate(candidate).chunk(3, -1)
        feedback_of_state, keep_of_state = self.from_state(state).chunk(2, -1)
        return nbrc_of_sums(feedback + feedback_of_state, keep + keep_of_state, new, state)


class Mogrifier(nn.Module):
    """Two vectors modulate each other in turns (Melis et al. 2020, arXiv 1909.01792, §2).

    Turn by turn x = 2σ(Q h) * x, then h = 2σ(R x) * h, and so on. The paper has a Q and an R for each turn;
    here one pair serves all.

    Args:
        dim: width of both.
        rounds: turns in all, the first of the candidate.
        rank: rank of Q and R; None means full.
    """

    def __init__(self, dim: int, *, rounds: int = 5, rank: int | None = None) -> None:
        super().__init__()
        if rounds < 0:
            raise ValueError(f"rounds ({rounds}) must not be negative")
        if rank is not None and not 1 <= rank <= dim:
            raise ValueError(f"rank ({rank}) must lie between 1 and dim ({dim}), or be None for full rank")
        self.rounds = rounds
        self.of_state = _projection(dim, rank)
        self.of_candidate = _projection(dim, rank)

    def forward(self, candidate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The modulated candidate and state, each `[..., dim]`."""
        for turn in range(self.rounds):
            if turn % 2 == 0:
                candidate = 2 * torch.sigmoid(self.of_state(state)) * candidate
            else:
                state = 2 * torch.sigmoid(self.of_candidate(candidate)) * state
        return candidate, state


class MogrifiedGate(nn.Module):
    """A gate whose candidate and state modulate each other first.

    The modulated state is what the gate carries on, so that with `gate` closed this is the modulation
    alone, which starts near identity, and not the identity.
    """

    def __init__(self, gate: GRUGate | NBRCGate, mogrifier: Mogrifier) -> None:
        super().__init__()
        self.mogrifier = mogrifier
        self.gate = gate

    def forward(self, candidate: Tensor, state: Tensor) -> Tensor:
        """Blend `candidate` `[..., dim]` into `state` `[..., dim]`."""
        return self.gate(*self.mogrifier(candidate, state))


def make_gate(
    kind: GateKind, dim: int, *, bias: float = 2.0, mogrify: bool = False
) -> GRUGate | NBRCGate | MogrifiedGate:
    """A gate by name.

    Args:
        kind: "gru" (GTrXL's) or "nbrc".
        dim: width of candidate and state.
        bias: how far the gate is closed at the start; infinity makes it the identity.
        mogrify: let candidate and state modulate each other first, five rounds with a quarter of the rank.

    Raises:
        ValueError: if there is no gate of this kind, or `dim` is below 1.
    """
    gates: dict[str, type[GRUGate] | type[NBRCGate]] = {"gru": GRUGate, "nbrc": NBRCGate}
    if kind not in gates:
        raise ValueError(f"unknown gate {kind!r}; known: {', '.join(gates)}")
    if dim < 1:
        raise ValueError(f"dim ({dim}) must be at least 1")
    gate = gates[kind](dim, bias=bias)
    return MogrifiedGate(gate, Mogrifier(dim, rank=max(1, dim // 4))) if mogrify else gate


def _projection(dim: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(dim, dim)
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))
