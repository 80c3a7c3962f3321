"""Crashes, hangs and garbage of environments: contained, counted, and refused when they do not stop."""

import numpy as np
import pytest

from actors.envs.catalog import make_env
from actors.envs.faults import RestartBudget
from actors.envs.toy import counter_row
from system.errors import ConfigError, EnvError

SEED = 100


def play(env, recvs, timeout=20.0):
    """Rows of `recvs` recvs as (env, is_first, is_last, episode, step) of Strange, in order of arrival."""
    env.start(SEED)
    rows = []
    for _ in range(recvs):
        step = env.recv(timeout)
        for i, env_id in enumerate(step.env_id):
            count = step.obs["count"][i].astype(int).tolist()
            rows.append((int(env_id), bool(step.is_first[i]), bool(step.is_last[i]), *count))
        live = step.env_id[~step.is_last]
        env.send(np.zeros((len(live), 1), np.int32), live)
    return rows


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "crash"),
        ("nan", "non_finite"),
        ("reward", "non_finite"),
        ("shape", "malformed"),
        ("dtype", "malformed"),
        ("range", "malformed"),
        ("missing", "malformed"),
        ("tuple", "malformed"),
    ],
)
def test_one_bad_environment_is_rebuilt_and_its_neighbours_play_on(strange, fault, reason):
    env = make_env(f"{strange}:strange", 3, options={"fault": fault, "bad_seed": SEED + 1})
    rows = play(env, 12)
    env.close()
    assert dict(env.restarts) == {reason: 1}
    healthy = [row[1:] for row in rows if row[0] == 0]
    assert healthy == [row[1:] for row in rows if row[0] == 2]
    assert [row[3] for row in healthy] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    broken = [row[1:] for row in rows if row[0] == 1]
    assert broken[:2] == [(True, False, 0, 0), (False, False, 0, 1)]
    assert broken[2] == (True, False, 0, 0), "the row after the fault begins a new episode"
    assert [row[3] for row in broken[3:8]] == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("mode", ["same_step", "disabled"])
def test_a_rebuild_begins_an_episode_in_every_autoreset_mode(strange, mode):
    options = {"fault": "crash", "bad_seed": SEED + 1, "autoreset": mode}
    env = make_env(f"{strange}:strange", 2, options=options)
    broken = [row[1:] for row in play(env, 12) if row[0] == 1]
    env.close()
    assert [row[3] for row in broken[:4]] == [0, 1, 0, 1]
    assert [row[0] for row in broken[:4]] == [True, False, True, False]
    assert dict(env.restarts) == {"crash": 1}


@pytest.mark.parametrize(("fault", "reason"), [("hang", "hang"), ("segfault", "crash")])
def test_a_hung_or_dead_worker_costs_the_vector_but_not_the_actor(strange, fault, reason):
    options = {"fault": fault, "bad_seed": SEED + 1, "vectorization": "async"}
    env = make_env(f"{strange}:strange", 2, options=options)
    rows = play(env, 8, timeout=2.0)
    env.close()
    assert dict(env.restarts) == {reason: 1}
    for env_id in (0, 1):
        firsts = [row[1] for row in rows if row[0] == env_id]
        assert firsts[:3] == [True, False, True], "all environments begin anew after the rebuild"


def test_an_environment_that_never_stops_breaking_ends_with_its_cause_named(strange):
    options = {"fault": "crash", "always": True, "at": 1, "max_restarts": 3}
    env = make_env(f"{strange}:strange", 1, options=options)
    with pytest.raises(EnvError, match=r"broke 4 times.*allowed are 3.*gearbox exploded.*max_restarts"):
        play(env, 50)
    env.close()


@pytest.mark.filterwarnings("ignore:.*Received the following error")
@pytest.mark.filterwarnings("ignore:.*Raising the last exception")
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_never_worked_is_refused_at_once(strange, vectorization):
    options = {"fault": "reset", "always": True, "vectorization": vectorization}
    env = make_env(f"{strange}:strange", 1, options=options)
    with pytest.raises(EnvError, match="no simulator here"):
        play(env, 1)
    env.close()
    assert not env.restarts


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "crash"),
        ("nan", "non_finite"),
        ("shape", "malformed"),
        ("dtype", "malformed"),
        ("flags", "malformed"),
    ],
)
def test_a_vector_environment_of_our_own_kind_is_rebuilt_whole(fault, reason):
    env = make_env("toy:faulty", 3, options={"fault": fault, "at": 2})
    env.start(SEED)
    for recv in range(6):
        step = env.recv(1.0)
        assert step.is_first.all() == (recv in (0, 2))
        live = step.env_id[~step.is_last]
        env.send(np.zeros((len(live), 1), np.int32), live)
    assert dict(env.restarts) == {reason: 1}


def test_a_toy_that_hangs_is_left_after_the_timeout():
    env = make_env("toy:faulty", 1, options={"fault": "hang", "at": 1})
    env.start(SEED)
    for _ in range(3):
        step = env.recv(0.01)
        env.send(np.zeros((1, 1), np.int32), step.env_id)
    assert dict(env.restarts) == {"hang": 1}


def test_the_budget_forgets_faults_older_than_its_window():
    now = [0.0]
    budget = RestartBudget("x", max_restarts=2, window_seconds=10.0, clock=lambda: now[0])
    budget.spend("crash", "a")
    budget.spend("non_finite", "b")
    with pytest.raises(EnvError, match="broke 3 times"):
        budget.spend("crash", "c")
    now[0] = 10.5
    budget.spend("crash", "d")
    assert budget.counts == {"crash": 2, "non_finite": 1}
    with pytest.raises(ConfigError, match="max_restarts"):
        RestartBudget("x", max_restarts=-1)


def test_a_budget_of_zero_allows_no_rebuild():
    with pytest.raises(EnvError, match="allowed are 0"):
        RestartBudget("x", max_restarts=0).spend("crash", "a")


def test_rows_of_the_counter_toy_are_known_beforehand():
    env = make_env("toy:counter", 4)
    env.start(70_000)
    episode, at = np.full(4, -1), np.zeros(4, np.int64)
    for _ in range(40):
        step = env.recv(1.0)
        episode[step.env_id] += step.is_first
        at[step.env_id] = np.where(step.is_first, 0, at[step.env_id] + 1)
        ids = step.env_id.astype(np.int64)
        want = counter_row(70_000, ids, episode[ids], at[ids])
        for name in ("image", "vector"):
            np.testing.assert_array_equal(step.obs[name], want[name])
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(step, name), want[name])
        live = step.env_id[~step.is_last]
        env.send(np.zeros((len(live), 1), np.int32), live)
    assert episode.min() >= 3
