"""An actor-critic around any memory module."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memory_models.module import MemoryModule
from memory_models.state import Memory
from memory_models.unroll import unroll


class Step(NamedTuple):
    """What an agent makes of its inputs.

    Attributes:
        logits: `[rows, time, actions]`.
        values: `[rows, time]`, expected discounted return.
        memory: after these steps.
    """

    logits: Tensor
    values: Tensor
    memory: Any


class Agent(nn.Module):
    """Embedding of the inputs, a memory module, a policy and a value.

    Nothing is kept on the agent: whoever acts carries the memory from step to step.

    Args:
        module: any member, or any other module that keeps the contract.
        inputs: numbers of an input row.
        actions: number of actions.

    Raises:
        ValueError: if the module uses dropout, with which the probabilities at learning would not be those
            of acting, or keeps what it wrote in a store outside the memory.
    """

    def __init__(self, module: MemoryModule[Any], *, inputs: int, actions: int) -> None:
        super().__init__()
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
            raise ValueError(
                "the module drops out at random, so that learning would see other probabilities than acting "
                "did; build it with dropout=0"
            )
        if getattr(module, "store", None) is not None:
            raise ValueError(
                "the module writes to a store outside the memory, which cannot be set back to the start of "
                "a stored segment; build it with store='state'"
            )
        self.module = module
        self.embed = nn.Linear(inputs, module.dim)
        self.policy = nn.Linear(module.dim, actions)
        self.value = nn.Linear(module.dim, 1)
        # Almost even at first, so that the first steps explore (Andrychowicz et al. 2021, §3.2).
        for layer, gain in ((self.embed, math.sqrt(2)), (self.policy, 0.01), (self.value, 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(
        self, inputs: Tensor, memory: Memory | None = None, *, reset: Tensor | None = None, close: bool = True
    ) -> Step:
        """Read a piece of one segment: a single step while acting.

        Args:
            inputs: `[rows, time, inputs]`, `time` at most what is left of the segment.
            memory: what the last call returned; None starts afresh.
            reset: bool `[rows]` or `[rows, time]`, true at an episode's first step.
            close: whether the segment ends with this call.
        """
        return self._heads(*self.module(self.embed(inputs), memory, reset=reset, close=close))

    def read(self, inputs: Tensor, memory: Memory | None = None, *, reset: Tensor | None = None) -> Step:
        """Read any number of segments in order, as acting read them step by step; the gradient flows through.

        Args:
            inputs: `[rows, time, inputs]`, from the start of a segment.
            memory: at that start.
            reset: bool `[rows, time]`, true at an episode's first step.
        """
        return self._heads(*unroll(self.module, self.embed(inputs), memory, reset=reset))

    def _heads(self, hidden: Tensor, memory: Any) -> Step:
        return Step(self.policy(hidden), self.value(hidden)[..., 0], memory)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An action for each row, int64 `[rows]`, drawn from logits `[rows, actions]`."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def log_probability(logits: Tensor, actions: Tensor) -> Tensor:
    """Logarithm of the probability of the actions taken, of their shape."""
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the policy at each step."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
