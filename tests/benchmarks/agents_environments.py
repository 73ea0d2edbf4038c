"""Small environments for the tests of agents."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Counting(gymnasium.Env[int, int]):
    """Shows the number of the step; the reward is the action; ends, or is cut, after `length`."""

    observation_space = spaces.Discrete(64)

    def __init__(self, length: int, *, truncates: bool, first_action: int = 0) -> None:
        self.action_space = spaces.Discrete(3, start=first_action)
        self.length, self.truncates, self.age = length, truncates, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.age = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.age += 1
        over = self.age == self.length
        return self.age, float(action), over and not self.truncates, over and self.truncates, {}


class Cue(gymnasium.Env[Any, int]):
    """Shows one of `cues` signs at the first step, noise then, and asks for the sign at the last one.

    An episode has `shortest` to `longest` steps; the answer brings 1 or -1.
    """

    def __init__(
        self, *, cues: int = 3, shortest: int = 3, longest: int = 7, truncates: bool = False
    ) -> None:
        self.cues, self.shortest, self.longest, self.truncates = cues, shortest, longest, truncates
        # What is asked, a sign, and noise.
        self.observation_space = spaces.Tuple(
            (spaces.Discrete(3), spaces.Discrete(cues), spaces.Box(-1, 1, (2,), np.float32))
        )
        self.action_space = spaces.Discrete(cues)
        self.left, self.cue = 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(self.shortest, self.longest + 1)) - 1
        self.cue = int(self.np_random.integers(self.cues))
        return self._seen(0, self.cue), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        over = self.left == 0
        reward = (1.0 if action == self.cue else -1.0) if over else 0.0
        self.left -= 1
        seen = self._seen(2 if self.left == 0 else 1, int(self.np_random.integers(self.cues)))
        return seen, reward, over, False, {}

    def _seen(self, kind: int, sign: int) -> Any:
        return kind, sign, self.np_random.uniform(-1, 1, 2).astype(np.float32)


def side_by_side(environments: list[gymnasium.Env[Any, Any]]) -> SyncVectorEnv:
    return SyncVectorEnv([lambda e=e: e for e in environments], autoreset_mode=AutoresetMode.SAME_STEP)
