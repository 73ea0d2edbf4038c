"""What an agent is told at a step as one row of numbers, and which action spaces it can act in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

# Periods of the clock, in steps: the shortest that tells neighbours apart, the longest beyond an episode.
CLOCK_PERIODS = tuple(4.0 * 2.0**octave for octave in range(9))


class Inputs:
    """Turns observations, and what else an agent may be told, into rows of numbers.

    Discrete parts become one-hot, boxes are flattened as they are (scale them with a wrapper of Gymnasium,
    such as `NormalizeObservation`), tuples and dicts are put side by side.

    Args:
        observations: space of one environment's observation.
        actions: number of actions.
        previous_action: tell the last action too; zeros at an episode's first step.
        previous_reward: tell the last reward too.
        clock: tell the steps since the episode began, as sines and cosines.

    Attributes:
        width: numbers of a row.

    Raises:
        TypeError: if the space holds something other than discrete values and boxes.
    """

    def __init__(
        self,
        observations: spaces.Space[Any],
        actions: int,
        *,
        previous_action: bool = False,
        previous_reward: bool = False,
        clock: bool = False,
    ) -> None:
        self.observations = observations
        self.actions = actions
        self.previous_action = previous_action
        self.previous_reward = previous_reward
        self.clock = clock
        self.width = (
            _width(observations)
            + (actions if previous_action else 0)
            + (1 if previous_reward else 0)
            + (2 * len(CLOCK_PERIODS) if clock else 0)
        )

    def __call__(self, observations: Any, actions: Tensor, rewards: Tensor, ages: Tensor) -> Tensor:
        """Rows for several environments.

        Args:
            observations: as a vector environment gives them, the environments along the first axis.
            actions: int64 `[rows]`, each row's last action; of no account where `ages` is 0.
            rewards: `[rows]`, each row's last reward, likewise.
            ages: int64 `[rows]`, steps since the episode began.

        Returns:
            float32 `[rows, width]`.
        """
        parts = [_rows(self.observations, observations)]
        known = (ages > 0).float()
        if self.previous_action:
            parts.append(F.one_hot(actions, self.actions).float() * known[:, None])
        if self.previous_reward:
            parts.append(torch.where(ages > 0, rewards.float(), 0)[:, None])
        if self.clock:
            angles = ages[:, None].float() * (2 * math.pi / torch.tensor(CLOCK_PERIODS))
            parts += [angles.sin(), angles.cos()]
        return torch.cat(parts, 1)


def count_actions(space: spaces.Space[Any]) -> int:
    """Number of actions of a discrete space.

    Raises:
        TypeError: if the space is not discrete.
    """
    if not isinstance(space, spaces.Discrete):
        raise TypeError(
            f"the agent chooses among discrete actions, this environment takes {space}; put a wrapper around "
            "it that makes them discrete, such as popgym.wrappers.DiscreteAction"
        )
    return int(space.n)


def _width(space: spaces.Space[Any]) -> int:
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.MultiBinary() | spaces.Box():
            return math.prod(space.shape)
        case spaces.Tuple():
            return sum(_width(part) for part in space.spaces)
        case spaces.Dict():
            return sum(_width(part) for part in space.spaces.values())
    raise TypeError(
        f"the agent reads Discrete, MultiDiscrete, MultiBinary and Box observations, and tuples and dicts of "
        f"them, not {space}; flatten it with gymnasium.wrappers.FlattenObservation"
    )


def _rows(space: spaces.Space[Any], values: Any) -> Tensor:
    match space:
        case spaces.Tuple():
            return torch.cat([_rows(p, v) for p, v in zip(space.spaces, values, strict=True)], 1)
        case spaces.Dict():
            assert isinstance(values, Mapping)
            return torch.cat([_rows(part, values[name]) for name, part in space.spaces.items()], 1)
        case spaces.Discrete():
            return _one_hot(np.asarray(values) - space.start, int(space.n))
        case spaces.MultiDiscrete():
            columns = (np.asarray(values) - space.start).reshape(len(values), -1)
            sizes = space.nvec.reshape(-1)
            return torch.cat([_one_hot(columns[:, i], int(size)) for i, size in enumerate(sizes)], 1)
    # A copy: a vector environment may write the next observation into the same array.
    return torch.tensor(np.asarray(values), dtype=torch.float32).flatten(1)


def _one_hot(values: Any, size: int) -> Tensor:
    return F.one_hot(torch.as_tensor(values, dtype=torch.int64), size).float()
