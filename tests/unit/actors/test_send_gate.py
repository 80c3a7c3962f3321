"""Unsound actions stop at our border: behind it envpool would abort the process or say nothing."""

import numpy as np
import pytest

from actors.envs.catalog import make_env
from actors.envs.gate import SendGate
from system.errors import EnvError
from system.specs import ActionSpec

IDS = np.arange(4, dtype=np.int32)


@pytest.fixture(params=["envpool:CartPole-v1", "gym:CartPole-v1", "toy:counter"])
def env(request):
    made = make_env(request.param, 4)
    made.start(0)
    made.recv(5.0)
    yield made
    made.close()


def act(value=0, n=4, dtype=np.int32):
    return np.full((n, 1), value, dtype)


@pytest.mark.parametrize(
    ("action", "env_id", "says"),
    [
        (act(n=3), IDS, "shape"),
        (act(n=5), IDS, "shape"),
        (np.zeros(4, np.int32), IDS, "shape"),
        (np.eye(4, dtype=np.int32), IDS, "shape"),
        ([[0]] * 4, IDS, "array"),
        (act(dtype=np.float32), IDS, "dtype"),
        (act(dtype=np.int64), IDS, "dtype"),
        (act(99), IDS, "outside"),
        (act(-1), IDS, "outside"),
        (act(), IDS + 1, r"must lie in \[0, 4\)"),
        (act(), IDS - 1, r"must lie in \[0, 4\)"),
        (act(), np.array([0, 1, 2, 2], np.int32), "repeats"),
        (act(), IDS.astype(np.float32), "integers"),
    ],
)
def test_a_bad_send_is_refused_and_the_environment_plays_on(env, action, env_id, says):
    with pytest.raises(EnvError, match=says):
        env.send(action, env_id)
    env.send(act(), IDS)
    assert len(env.recv(5.0)) == 4


def test_a_row_is_answered_once(env):
    env.send(act(), IDS)
    with pytest.raises(EnvError, match="wants no action"):
        env.send(act(), IDS)


def test_recv_before_the_actions_is_refused_instead_of_hanging(env):
    with pytest.raises(EnvError, match="answer"):
        env.recv(0.1)


def test_answers_may_come_in_parts(env):
    env.send(act(n=1), IDS[3:])
    env.send(act(n=3), IDS[:3])
    env.send(act(n=0), IDS[:0])
    step = env.recv(5.0)
    assert sorted(step.env_id.tolist()) == [0, 1, 2, 3]
    assert not step.is_first.any()


@pytest.mark.parametrize("name", ["envpool:CartPole-v1", "gym:CartPole-v1"])
def test_recv_before_start_is_refused(name):
    env = make_env(name, 1)
    with pytest.raises(EnvError, match="start"):
        env.recv(0.1)
    env.close()


def test_non_finite_continuous_actions_are_refused():
    env = make_env("envpool:Pendulum-v1", 2)
    env.start(0)
    env.recv(5.0)
    with pytest.raises(EnvError, match="NaN"):
        env.send(np.array([[np.nan], [0]], np.float32), IDS[:2])
    env.close()


def test_rows_that_end_an_episode_want_no_action():
    gate = SendGate(ActionSpec(kind="discrete", classes=(2,)), 4)
    gate.shown(IDS, np.array([False, True, False, False]))
    with pytest.raises(EnvError, match=r"\[1\]"):
        gate.take(act(), IDS)
    gate.take(act(n=3), IDS[[0, 2, 3]])
    assert not gate.owed.any()


def test_an_asynchronous_pool_is_never_asked_for_more_than_flies():
    env = make_env("envpool:CartPole-v1", 4, options={"batch_size": 3})
    env.start(0)
    step = env.recv(5.0)
    assert len(step) == 3
    with pytest.raises(EnvError, match="in flight"):
        env.recv(5.0)
    env.send(act(n=3), step.env_id)
    assert len(env.recv(5.0)) == 3
    env.close()
