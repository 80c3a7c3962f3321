"""Rewards of envpool's first rows are nobody's: tasks of the DeepMind Control suite leave garbage there."""

import numpy as np
import pytest

from actors.envs.envpool_envs import EnvpoolVectorEnv
from actors.envs.faults import EnvFault
from actors.envs.options import EnvOptions

GARBAGE = (7.5e23, np.nan, -np.inf)


class Unwritten:
    """A real pool whose rows have garbage where `spoils(rows seen so far)` says so: memory nobody wrote."""

    def __init__(self, pool, spoils, value):
        self._pool, self._spoils, self._value, self._seen = pool, spoils, value, 0

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def recv(self):
        obs, reward, terminated, truncated, info = self._pool.recv()
        if self._spoils(self._seen, info["elapsed_step"]).any():
            reward = np.where(self._spoils(self._seen, info["elapsed_step"]), self._value, reward)
        self._seen += 1
        return obs, reward.astype(np.float32), terminated, truncated, info


def cartpoles(**options):
    return EnvpoolVectorEnv("CartPole-v1", 2, options=EnvOptions.of(options), timeout=20.0)


def play(env, spoils, value, rows):
    """All rewards [rows, N] and first-row flags, with random actions."""
    env.start(0)
    env._pool = Unwritten(env._pool, spoils, value)
    rng, rewards, firsts = np.random.default_rng(0), [], []
    for _ in range(rows):
        step = env.recv(5.0)
        rewards.append(step.reward.copy())
        firsts.append(step.is_first.copy())
        owed = step.env_id[~step.is_last]
        if len(owed):
            env.send(env.spec.action.sample(rng, len(owed)), owed)
    return np.array(rewards), np.array(firsts)


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("repeat", [1, 2])
def test_first_rows_have_no_reward_whatever_memory_held(repeat, value):
    env = cartpoles(action_repeat=repeat)
    try:
        rewards, firsts = play(env, lambda _, step: step == 0, value, 80)
    finally:
        env.close()
    assert firsts.sum() > 4
    assert (rewards[firsts] == 0).all()
    assert set(np.unique(rewards)) <= {0.0, 1.0, 2.0}


def test_reward_that_is_not_finite_elsewhere_is_a_fault():
    env = cartpoles()
    try:
        with pytest.raises(EnvFault, match="returned reward"):
            play(env, lambda seen, step: (step > 0) & (seen > 3), np.nan, 20)
    finally:
        env.close()
