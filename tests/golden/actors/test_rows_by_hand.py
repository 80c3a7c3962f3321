"""The row stream of a deterministic environment, written out by hand, for every autoreset mode."""

import functools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from actors.envs.catalog import make_env
from actors.envs.faults import RestartBudget
from actors.envs.gym_envs import GUARDED, GymVectorEnv, vectorize
from actors.envs.options import EnvOptions
from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from system.experience import EpisodeStats


class Ladder(gymnasium.Env):
    """Climbs one rung per step. The first episode falls off at rung 2, the next ends by time at rung 3."""

    def __init__(self):
        self.observation_space = spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.episode, self.rung = -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.rung = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.rung += 1
        fell = self.episode % 2 == 0 and self.rung == 2
        late = self.episode % 2 == 1 and self.rung == 3
        return self._obs(), 10.0 * self.rung, fell, late, {}

    def _obs(self):
        return np.array([self.episode, self.rung], np.float32)


# episode, rung, reward, is_first, is_last, is_terminal
BY_HAND = [
    (0, 0, 0, True, False, False),
    (0, 1, 10, False, False, False),
    (0, 2, 20, False, True, True),
    (1, 0, 0, True, False, False),
    (1, 1, 10, False, False, False),
    (1, 2, 20, False, False, False),
    (1, 3, 30, False, True, False),
    (2, 0, 0, True, False, False),
    (2, 1, 10, False, False, False),
]


def rows_of(env, recvs):
    env.start(5)
    rows = {i: [] for i in range(env.num_envs)}
    loop = env_loop(env, RandomPolicy(env.spec.action, 0), "train", timeout=10.0)
    for made in (next(loop) for _ in range(recvs)):
        step = made.step
        assert (made.action[step.is_last] == 0).all()
        for i, env_id in enumerate(step.env_id):
            obs = step.obs["vector"][i].astype(int).tolist()
            flags = (bool(step.is_first[i]), bool(step.is_last[i]), bool(step.is_terminal[i]))
            rows[int(env_id)].append((*obs, int(step.reward[i]), *flags))
    env.close()
    return rows


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_gives_the_rows_written_by_hand(mode):
    vector = vectorize(
        "ladder", Ladder, 3, EnvOptions(), vectorization="sync", autoreset=mode, context="forkserver"
    )
    rows = rows_of(GymVectorEnv("ladder", vector, GUARDED, RestartBudget("ladder")), 12)
    for env_id in range(3):
        assert rows[env_id][: len(BY_HAND)] == BY_HAND


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_unguarded_vector_of_the_users_gives_the_same_rows(mode):
    makers = [functools.partial(Ladder)] * 2
    vector = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    rows = rows_of(GymVectorEnv("ladder", vector, EnvOptions(), RestartBudget("ladder")), 12)
    assert rows[0][: len(BY_HAND)] == rows[1][: len(BY_HAND)] == BY_HAND


def streams(name, options, recvs):
    """CartPole under a policy that is a function of the observation alone."""
    env = make_env(name, 3, options=options)
    env.start(7)
    out = {i: [] for i in range(3)}
    for _ in range(recvs):
        step = env.recv(20.0)
        action = (step.obs["vector"][:, 2:3] > 0.01).astype(np.int32)
        for i, env_id in enumerate(step.env_id):
            flags = (bool(step.is_first[i]), bool(step.is_last[i]), bool(step.is_terminal[i]))
            out[int(env_id)].append((step.obs["vector"][i].tobytes(), float(step.reward[i]), *flags))
        live = ~step.is_last
        env.send(action[live], step.env_id[live])
    env.close()
    return out


def test_cartpole_streams_agree_over_modes_and_processes():
    base = streams("gym:CartPole-v1", {}, 150)
    assert sum(row[3] for row in base[0]) >= 2, "several episodes end"
    variants = [
        {"autoreset": "same_step"},
        {"autoreset": "disabled"},
        {"vectorization": "async"},
        {"vectorization": "async", "autoreset": "same_step"},
        {"vectorization": "async", "autoreset": "disabled"},
    ]
    for options in variants:
        other = streams("gym:CartPole-v1", options, 150)
        for env_id in range(3):
            shared = min(len(base[env_id]), len(other[env_id]))
            assert shared > 100
            assert base[env_id][:shared] == other[env_id][:shared], options


def test_envpool_streams_do_not_depend_on_the_batch_size():
    lockstep = streams("envpool:CartPole-v1", {}, 100)
    eager = streams("envpool:CartPole-v1", {"batch_size": 1}, 300)
    for env_id in range(3):
        shared = min(len(lockstep[env_id]), len(eager[env_id]))
        assert shared > 50
        assert lockstep[env_id][:shared] == eager[env_id][:shared]


def test_episode_statistics_by_hand():
    vector = gymnasium.vector.SyncVectorEnv([Ladder])
    env = GymVectorEnv("ladder", vector, EnvOptions(), RestartBudget("ladder"))
    env.start(0)
    loop = env_loop(env, RandomPolicy(env.spec.action, 0), "train")
    episodes = [episode for _ in range(9) for episode in next(loop).episodes]
    assert episodes == [
        EpisodeStats(env_id=0, length=2, score=30.0, terminal=True, policy_version=0),
        EpisodeStats(env_id=0, length=3, score=60.0, terminal=False, policy_version=0),
    ]
