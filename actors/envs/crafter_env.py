"""Crafter behind the gymnasium interface, for `env.name: actors.envs.crafter_env:make`.

Crafter speaks an older reset/step protocol and is an extra: pip install crafter.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from system.errors import ConfigError


class Crafter(gymnasium.Env[NDArray[np.uint8], int]):
    """64x64x3 image, 17 discrete actions. Death terminates; the 10,000-step limit truncates."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium declares it as an instance attribute)

    def __init__(self, size: int = 64, length: int = 10_000) -> None:
        try:
            import crafter  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("environment Crafter needs the crafter package; pip install crafter") from error
        self._make, self._size, self._length = crafter.Env, size, length
        self._env: Any = None
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(17)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        super().reset(seed=seed)
        if self._env is None or seed is not None:
            world_seed = int(self.np_random.integers(2**31 - 1))
            self._env = self._make(size=(self._size, self._size), length=self._length, seed=world_seed)
        return self._env.reset(), {}

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        obs, reward, done, info = self._env.step(int(action))
        dead = bool(info["discount"] == 0)
        return obs, float(reward), dead, bool(done and not dead), {}

    def render(self) -> NDArray[np.uint8] | None:
        return None if self._env is None else self._env.render()


def make(size: int = 64, length: int = 10_000) -> Crafter:
    """What the crafter recipe calls, once per environment. Raises: ConfigError without crafter."""
    return Crafter(size, length)
