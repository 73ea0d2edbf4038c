"""Acting one step at a time, and the segments that are stored for learning.

The memory is a value, so to store a segment is to keep the memory it began with. Learning reads the stored
segments from there, with a reset wherever an episode began inside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from benchmarks.agents.agent import Agent, Step, log_probability, sample
from benchmarks.agents.spaces import Inputs
from memory_models.state import Memory, cat


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Steps of several environments side by side, `[rows, time]`.

    Attributes:
        inputs: `[rows, time, width]`.
        resets: bool, true at an episode's first step.
        actions: int64.
        log_probs: of the actions, under the policy that acted.
        values: what the agent expected.
        rewards: what the action brought.
        ended: bool, whether the episode ended with this step, by itself or by a time limit.
        next_values: expected of the state after the step: 0 where the episode ended by itself; where a time
            limit cut it, of the last observation, which no later step is given.
        memories: one at the start of each window, before its resets; no gradient.
        returns: of the episodes that ended, undiscounted, in order.
        lengths: their steps.
    """

    inputs: Tensor
    resets: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    ended: Tensor
    next_values: Tensor
    memories: tuple[Memory, ...]
    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    def windows(self, *, discount: float, trace: float) -> Windows:
        """Cut at the stored memories, and with the advantages: what learning shuffles."""
        advantages = advantages_of(
            self.rewards, self.values, self.next_values, self.ended, discount=discount, trace=trace
        )
        count = len(self.memories)

        def cut(x: Tensor) -> Tensor:
            return torch.cat(x.chunk(count, 1))

        return Windows(
            inputs=cut(self.inputs),
            resets=cut(self.resets),
            actions=cut(self.actions),
            log_probs=cut(self.log_probs),
            values=cut(self.values),
            advantages=cut(advantages),
            memory=cat(self.memories),
        )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Stretches of one or more whole segments, each with the memory at its start; a row is a window.

    Attributes:
        inputs: `[windows, time, width]`.
        resets: bool `[windows, time]`, true at an episode's first step.
        actions: int64 `[windows, time]`.
        log_probs: `[windows, time]`, under the policy that acted.
        values: `[windows, time]`, what that agent expected.
        advantages: `[windows, time]`.
        memory: of `windows` rows.
    """

    inputs: Tensor
    resets: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    memory: Memory

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def select(self, rows: Tensor) -> Windows:
        """The windows at int64 indices `rows`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        memory = fields.pop("memory").select(rows)
        return Windows(**{name: value[rows] for name, value in fields.items()}, memory=memory)


def advantages_of(
    rewards: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, *, discount: float, trace: float
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, §3), `[rows, time]`.

    Args:
        rewards: `[rows, time]`.
        values: `[rows, time]`, of the states acted in.
        next_values: `[rows, time]`, of the states after; 0 where the episode ended by itself.
        ended: bool `[rows, time]`: no later reward belongs to the same episode.
        discount: weight of a reward one step later.
        trace: share of a later surprise that an advantage takes in (lambda).
    """
    surprises = rewards + discount * next_values - values
    carried = discount * trace * (~ended).to(rewards.dtype)
    advantages = torch.empty_like(surprises)
    later = torch.zeros_like(surprises[:, 0])
    for step in reversed(range(surprises.shape[1])):
        later = surprises[:, step] + carried[:, step] * later
        advantages[:, step] = later
    return advantages


class Actor:
    """Acts in vectorised environments, a step of all rows at a time, and carries the memory.

    Segments end in all rows at once, every `segment_length` steps, wherever episodes begin and end.

    Args:
        agent: who acts; its weights may change between rollouts.
        environments: a Gymnasium vector environment that resets in the step that ends an episode.
        inputs: what the agent is told.
        seed: of the environments and of the choice of actions.
        reward_scale: rewards are multiplied by this in what is stored and told, not in the returns.

    Raises:
        ValueError: if the environments reset in another way.
    """

    def __init__(
        self,
        agent: Agent,
        environments: VectorEnv[Any, Any, Any],
        inputs: Inputs,
        *,
        seed: int,
        reward_scale: float = 1.0,
    ) -> None:
        if environments.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(
                "the environments must reset in the step that ends an episode, so that no step is wasted: "
                "make them with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
            )
        self.agent = agent
        self.environments = environments
        self.inputs = inputs
        self.reward_scale = reward_scale
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = environments.num_envs
        # The agent counts actions from 0, a space may not.
        self._first_action = int(getattr(environments.single_action_space, "start", 0))
        self._observations, _ = environments.reset(seed=seed)
        self._actions = torch.zeros(self.rows, dtype=torch.int64)
        self._rewards = torch.zeros(self.rows)
        self._ages = torch.zeros(self.rows, dtype=torch.int64)
        self._returns = np.zeros(self.rows)
        # Detached: a fresh memory may be learned, and what is stored must not hold a graph.
        self._memory: Any = agent.module.init_memory(self.rows).detach()

    @torch.no_grad()
    def collect(self, *, segments: int, window: int = 1) -> Rollout:
        """Act for some whole segments.

        Args:
            segments: how many.
            window: segments between two memories that are stored.

        Raises:
            ValueError: if the segments cannot be shared out evenly, or the environment gives numbers that are
                not finite.
        """
        if window < 1 or segments < 1 or segments % window:
            raise ValueError(
                f"segments ({segments}) must be a multiple of window ({window}), and both at least 1"
            )
        length = self.agent.module.segment_length
        columns: list[tuple[Tensor, ...]] = []
        memories: list[Memory] = []
        returns: list[float] = []
        lengths: list[int] = []
        for step in range(segments * length):
            if step % (window * length) == 0:
                memories.append(self._memory)
            inputs, resets = self._told(), self._ages == 0
            logits, values, memory = self._read(
                inputs, self._memory, reset=resets, close=step % length == length - 1
            )
            actions = sample(logits, self.generator)
            taken = actions.numpy() + self._first_action
            observations, rewards, terminated, truncated, infos = self.environments.step(taken)
            self._memory, self._observations = memory, observations
            self._actions = actions
            self._rewards = self.reward_scale * torch.tensor(rewards, dtype=torch.float32)
            self._ages, self._returns = self._ages + 1, self._returns + rewards
            ended = torch.tensor(terminated | truncated)
            # Only a time limit leaves a value behind; the memory made by the look ahead is dropped.
            cut = torch.tensor(truncated & ~terminated).nonzero()[:, 0]
            left = torch.zeros(self.rows)
            if len(cut):
                left[cut] = self._value_of_last(infos, cut)
            for row in ended.nonzero()[:, 0].tolist():
                returns.append(float(self._returns[row]))
                lengths.append(int(self._ages[row]))
            self._returns = np.where(ended.numpy(), 0.0, self._returns)
            self._ages = torch.where(ended, 0, self._ages)
            log_probs = log_probability(logits, actions)
            columns.append((inputs, resets, actions, log_probs, values, self._rewards, ended, left))
        ahead = self._read(self._told(), self._memory, reset=self._ages == 0).values
        device = self.agent.embed.weight.device
        inputs, resets, actions, log_probs, values, stored, ended, left = (
            torch.stack(column, 1).to(device) for column in zip(*columns, strict=True)
        )
        after = torch.cat([values[:, 1:], ahead.to(device)[:, None]], 1)
        return Rollout(
            inputs=inputs,
            resets=resets,
            actions=actions,
            log_probs=log_probs,
            values=values,
            rewards=stored,
            ended=ended,
            next_values=torch.where(ended, left, after),
            memories=tuple(memories),
            returns=tuple(returns),
            lengths=tuple(lengths),
        )

    def _told(self) -> Tensor:
        return self._inputs(self._observations, slice(None))

    def _inputs(self, observations: Any, rows: Tensor | slice) -> Tensor:
        inputs = self.inputs(observations, self._actions[rows], self._rewards[rows], self._ages[rows])
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError("the environment gave an observation or a reward that is not finite")
        return inputs

    def _read(self, inputs: Tensor, memory: Any, *, reset: Tensor | None = None, close: bool = False) -> Step:
        # One step of some rows. Environments are on the processor, wherever the agent is.
        device = self.agent.embed.weight.device
        where = None if reset is None else reset.to(device)
        step = self.agent(inputs[:, None].to(device), memory, reset=where, close=close)
        return Step(step.logits[:, 0].cpu(), step.values[:, 0].cpu(), step.memory)

    def _value_of_last(self, infos: dict[str, Any], rows: Tensor) -> Tensor:
        space = self.environments.single_observation_space
        last = [infos["final_obs"][row] for row in rows.tolist()]
        room: Any = create_empty_array(space, len(last))
        observations = concatenate(space, last, room)
        return self._read(self._inputs(observations, rows), self._memory.select(rows)).values
