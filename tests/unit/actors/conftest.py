"""A user's package with environments that misbehave in chosen ways; importable in worker processes too."""

import importlib
import sys

import pytest

SOURCE = '''
import os
import time

import gymnasium
import numpy as np


class Strange(gymnasium.Env):
    """Counts its steps in the observation; 4 steps per episode; breaks once as told."""

    def __init__(self, fault="none", bad_seed=-1, at=2, always=False):
        self.observation_space = gymnasium.spaces.Dict({
            "count": gymnasium.spaces.Box(-1e6, 1e6, (2,), np.float64),
            "height": gymnasium.spaces.Box(-1e6, 1e6, (), np.float64),
            "nested": gymnasium.spaces.Dict({"door": gymnasium.spaces.Discrete(3, start=5)}),
            "words": gymnasium.spaces.Text(8),
        })
        self.action_space = gymnasium.spaces.Discrete(2)
        self.fault, self.bad_seed, self.at, self.always = fault, bad_seed, at, always
        self.bad, self.steps, self.episode, self.total = False, 0, -1, 0

    def obs(self):
        count = np.array([self.episode, self.steps], np.float64)
        return {"count": count, "height": np.float64(self.steps), "nested": {"door": 5 + self.steps % 3},
                "words": "hi"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.bad = self.always or seed == self.bad_seed
        self.steps, self.episode = 0, self.episode + 1
        if self.fault == "reset" and self.bad:
            raise OSError("no simulator here")
        return self.obs(), {"noise": 3}

    def step(self, action):
        self.steps, self.total = self.steps + 1, self.total + 1
        obs, reward = self.obs(), float(self.steps)
        if self.bad and self.total >= self.at:
            self.bad = self.always
            if self.fault == "crash":
                raise ValueError("gearbox exploded")
            if self.fault == "segfault":
                os._exit(11)
            if self.fault == "hang":
                time.sleep(60)
            if self.fault == "nan":
                obs["count"][0] = np.nan
            if self.fault == "shape":
                obs["count"] = np.zeros(3)
            if self.fault == "dtype":
                obs["nested"]["door"] = 5.5
            if self.fault == "range":
                obs["nested"]["door"] = 99
            if self.fault == "missing":
                del obs["height"]
            if self.fault == "reward":
                reward = float("inf")
            if self.fault == "tuple":
                return obs, reward, False, {}
        return obs, reward, self.steps == 4 and self.episode % 2 == 0, self.steps == 4, {"noise": self.steps}


class Vector(gymnasium.vector.VectorEnv):
    """Declares an autoreset mode of its own invention."""

    def __init__(self, num_envs, mode="sometimes"):
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)


def strange(**options):
    return Strange(**options)


def picky(size):
    return Strange()


NUMBER = 3


def nothing():
    return "not an environment"


def raises():
    raise KeyError("licence")
'''


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """Name of the importable module."""
    (tmp_path / "strange_envs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "strange_envs"
    sys.modules.pop("strange_envs", None)
