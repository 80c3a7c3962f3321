"""The example behind `recipes/custom_env.yaml`: a small gymnasium environment of your own.

A point on a line must be pushed to a target that moves every episode. Observations are a dict of two
vectors, actions are continuous, episodes end by a time limit.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class LineWorld(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """State: position and velocity in [-1, 1]; reward: 1 - distance to the target, each step."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium declares it as an instance attribute)

    def __init__(self, time_limit: int = 50) -> None:
        one = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {"state": gymnasium.spaces.Box(-2.0, 2.0, (2,)), "target": one}
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._limit = time_limit
        self._state, self._target, self._steps = np.zeros(2), 0.0, 0

    def _obs(self) -> dict[str, np.ndarray]:
        return {"state": self._state.astype(np.float32), "target": np.array([self._target], np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._state = np.array([self.np_random.uniform(-1, 1), 0.0])
        self._target, self._steps = float(self.np_random.uniform(-1, 1)), 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        position, velocity = self._state
        velocity = np.clip(0.8 * velocity + 0.2 * float(action[0]), -1.0, 1.0)
        self._state = np.array([np.clip(position + velocity, -1.5, 1.5), velocity])
        self._steps += 1
        reward = 1.0 - abs(float(self._state[0]) - self._target)
        return self._obs(), reward, False, self._steps >= self._limit, {}


def make(time_limit: int = 50) -> LineWorld:
    """What `env.name: actors.envs.example_env:make` calls, once per environment."""
    return LineWorld(time_limit)
