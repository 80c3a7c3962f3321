"""The actor: rows arrive exactly once and in order, weights only grow, waiting is bounded and counted."""

import itertools

import numpy as np
import pytest

from actors.actor import Actor
from actors.envs.catalog import make_env
from actors.envs.toy import counter_row
from actors.random_policy import RandomPolicy
from replay.limiter import RateLimiter
from replay.memory import MemoryReplay
from system.errors import ConfigError, DeadlineError, DivergedError, SchemaError
from system.metrics import Metrics
from system.params.memory import MemoryWeights
from system.seeds import child_seed
from system.specs import ArraySpec, TableSpec
from system.weights import NO_VERSION, PolicyVersion, Weights

COLUMNS = {"memory": ArraySpec(shape=(2,), dtype="float32")}


class Counting:
    """Answers with action 1 and remembers in its carry how many rows each environment showed."""

    def __init__(self):
        self.columns = COLUMNS
        self.version = NO_VERSION
        self.scale = np.float32(1)

    def initial(self, num_envs):
        return np.zeros(num_envs, np.float32)

    def act(self, carry, step, mode):
        carry = carry.copy()
        carry[step.env_id] = np.where(step.is_first, 0, carry[step.env_id] + 1)
        seen = carry[step.env_id] * self.scale
        return np.ones((len(step), 1), np.int32), carry, {"memory": np.stack([seen, -seen], 1)}

    def load(self, weights):
        self.version = weights.version
        self.scale = np.float32(weights.arrays["scale"])


class Recording(MemoryReplay):
    """The in-memory replay, which also keeps what it accepted, by stream."""

    def __init__(self, table, *, tolerance=10**6):
        limiter = RateLimiter(train_ratio=1.0, prefill_rows=0, tolerance_rows=tolerance, min_rows=1)
        super().__init__(table, capacity_rows=100_000, batch=1, length=2, context=0, seed=0, limiter=limiter)
        self.rows = {}

    def append(self, chunks, timeout):
        ack = super().append(chunks, timeout)
        for chunk in chunks:
            self.rows.setdefault(chunk.stream.env, []).append(chunk.columns)
        return ack

    def stream(self, env):
        return {k: np.concatenate([part[k] for part in self.rows[env]]) for k in self.rows[env][0]}


def ticking(step=0.001):
    """A clock that moves by `step` seconds whenever it is looked at."""
    ticks = itertools.count()
    return lambda: next(ticks) * step


def publish(source, counter, scale=2.0):
    version = PolicyVersion(1, counter)
    source.publish(Weights.of(version, {"scale": np.array(scale, np.float32)}))
    return version


def make(
    name="toy:counter", options=None, *, num_envs=3, policy=None, source=None, tolerance=10**6, **settings
):
    env = make_env(name, num_envs, options=options)
    policy = policy or Counting()
    table = TableSpec.of(env.spec, policy.columns)
    replay = Recording(table, tolerance=tolerance)
    source = source or MemoryWeights()
    settings = {
        "chunk_rows": 4,
        "seed": 9,
        "clock": ticking(),
        "sleep": lambda seconds: None,
        "index": 2,
        "incarnation": 5,
    } | settings
    actor = Actor(
        settings.pop("index"),
        settings.pop("incarnation"),
        env,
        policy,
        replay,
        source,
        table=table,
        **settings,
    )
    return actor, replay, source


def check_stream(columns, env, seed):
    """Every stored row is the one the toy makes, identities are complete, flags and actions fit."""
    episode, step = columns["episode"].astype(np.int64), columns["step"].astype(np.int64)
    ids = np.full(len(step), env, np.int64)
    want = counter_row(seed, ids, episode, step)
    for name, values in want.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)
    begins = np.concatenate([[True], columns["is_last"][:-1]])
    np.testing.assert_array_equal(columns["is_first"], begins)
    np.testing.assert_array_equal(episode, np.cumsum(begins) - 1)
    assert (columns["action"][columns["is_last"]] == 0).all()
    assert (columns["incarnation"] == 5).all()


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 2}])
def test_every_row_reaches_the_replay_once_in_order_and_unchanged(options):
    actor, replay, _ = make(options=options)
    reports = [actor.run(0.4) for _ in range(3)]
    assert actor.close() == 0
    seed = child_seed(9, "actor", 2, "incarnation", 5)
    stored = 0
    for env in range(3):
        columns = replay.stream(env)
        check_stream(columns, env, seed)
        stored += len(columns["step"])
    made = sum(report.rows for report in reports)
    assert stored == made > 100
    assert made - sum(report.acknowledged for report in reports) == reports[-1].pending
    episodes = [episode for report in reports for episode in report.episodes]
    assert len(episodes) == sum(int(replay.stream(env)["is_last"].sum()) for env in range(3))
    for report in reports:
        assert report.pending <= 3 * (4 + 1)


def test_another_incarnation_plays_other_seeds():
    firsts = []
    for incarnation in (0, 1):
        actor, replay, _ = make(incarnation=incarnation)
        actor.run(0.1)
        actor.close()
        columns = replay.stream(0)
        assert (columns["incarnation"] == incarnation).all()
        firsts.append(columns["vector"][0].tolist())
    assert firsts[0] != firsts[1]


def test_it_acts_at_random_until_weights_arrive_and_marks_each_row():
    actor, replay, source = make(pull_seconds=0.01)
    actor.run(0.3)
    version = publish(source, 3)
    report = actor.run(0.3)
    actor.close()
    assert report.policy_version == version
    columns = replay.stream(0)
    fresh = columns["policy_version"] == version.encoded
    assert set(columns["policy_version"].tolist()) == {0, version.encoded}
    assert (np.diff(fresh.astype(int)) >= 0).all(), "the version never goes back"
    assert (columns["memory"][~fresh] == 0).all(), "random rows fill the policy's columns with zeros"
    assert (columns["action"][fresh & ~columns["is_last"]] == 1).all()
    whole = np.flatnonzero(fresh & columns["is_first"])[0]
    np.testing.assert_array_equal(columns["memory"][whole:, 0], 2.0 * columns["step"][whole:])


def test_lag_counts_the_versions_missed():
    metrics = Metrics("run", "actor")
    actor, _, source = make(pull_seconds=0.01, metrics=metrics)
    publish(source, 1)
    assert actor.run(0.1).policy_version.counter == 1
    publish(source, 5)
    report = actor.run(0.1)
    assert (report.policy_version.counter, report.lag) == (5, 4)
    assert metrics.value("actor_policy_version") == 5
    actor.close()


def test_it_can_wait_for_the_first_weights():
    actor, _, source = make(wait_for_policy=True, pull_seconds=0.01)
    report = actor.run(0.3)
    assert report.rows == 0
    assert report.waits["weights"] > 0
    publish(source, 1)
    assert actor.run(0.3).rows > 0
    actor.close()


class Silent:
    """A weight source nobody answers at."""

    def latest(self, newer_than, timeout):
        raise DeadlineError(f"no answer within {timeout:g} s")


def test_a_silent_weight_source_does_not_stop_collection_until_the_policy_is_too_old():
    actor, _, _ = make(source=Silent(), pull_seconds=0.01, max_weights_age=0.5)
    fresh = actor.run(0.3)
    assert fresh.rows > 0
    actor.run(0.3)
    stale = actor.run(0.3)
    assert stale.rows == 0
    assert stale.weights_age > 0.5
    assert stale.waits["weights"] > 0
    actor.close()


def test_a_blocked_replay_stops_the_environments_and_loses_nothing():
    actor, replay, _ = make(tolerance=40, append_timeout=0.001)
    first = actor.run(0.5)
    blocked = actor.run(0.2)
    assert blocked.rows == 0, "no rows are made while rows wait"
    assert blocked.waits["append"] > 0
    assert 0 < blocked.pending <= 3 * (4 + 1)
    assert first.rows == first.acknowledged + blocked.pending
    while replay.limiter.can_train(2):
        replay.sample(1.0)
    resumed = actor.run(0.5)
    assert resumed.acknowledged > 0
    replay.limiter.tolerance_rows = 10**6
    assert actor.close() == 0
    for env in range(3):
        check_stream(replay.stream(env), env, child_seed(9, "actor", 2, "incarnation", 5))


def test_a_silent_weight_source_is_asked_ever_less_often():
    asked = []

    class Counted(Silent):
        def latest(self, newer_than, timeout):
            asked.append(timeout)
            return super().latest(newer_than, timeout)

    actor, _, _ = make(source=Counted(), pull_seconds=0.01, pull_timeout=3.0)
    assert actor.run(1.0).rows > 0
    assert 3 <= len(asked) <= 12, "doubling pauses, not one call per 0.01 s"
    assert set(asked) == {3.0}
    actor.close()


def test_rows_lost_at_close_are_counted():
    metrics = Metrics("run", "actor")
    actor, _, _ = make(tolerance=40, append_timeout=0.001, metrics=metrics)
    report = actor.run(0.5)
    assert actor.close() == report.pending > 0
    assert metrics.value("actor_rows_lost_total", reason="close") == report.pending


def test_slow_rows_leave_after_chunk_seconds():
    actor, replay, _ = make(chunk_rows=1000, chunk_seconds=0.1, clock=ticking(0.02))
    assert actor.run(1.0).acknowledged > 0
    assert max(len(part["step"]) for part in replay.rows[0]) < 20
    actor.close()


def test_a_broken_environment_closes_its_episode_as_cut_off():
    metrics = Metrics("run", "actor")
    actor, replay, _ = make(
        "toy:faulty", {"fault": "crash", "at": 7, "shortest": 50, "longest": 60}, metrics=metrics
    )
    report = actor.run(0.3)
    actor.close()
    assert report.restarts == {"crash": 1}
    assert metrics.value("actor_env_restarts_total", reason="crash") == 1
    columns = replay.stream(1)
    assert columns["step"][:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert columns["episode"][:9].tolist() == [0] * 7 + [1] * 2
    assert columns["is_last"][:9].tolist() == [False] * 6 + [True, False, False]
    assert not columns["is_terminal"][6]
    assert columns["action"][6] == 0
    assert [episode for episode in report.episodes if episode.length < 50] == []


def test_metrics_agree_with_the_reports():
    metrics = Metrics("run", "actor")
    actor, _, _ = make(metrics=metrics)
    reports = [actor.run(0.2), actor.run(0.2)]
    actor.close()
    assert metrics.value("actor_env_steps_total") == sum(r.rows for r in reports)
    assert metrics.value("actor_rows_acknowledged_total") == sum(r.acknowledged for r in reports)
    assert metrics.value("actor_episodes_total") == sum(len(r.episodes) for r in reports)
    assert metrics.value("actor_episode_return") == pytest.approx(reports[-1].episodes[-1].score)
    assert metrics.value("actor_incarnation") == 5


class NotFinite(Counting):
    def act(self, carry, step, mode):
        action, carry, extras = super().act(carry, step, mode)
        extras["memory"][0, 1] = np.nan
        return action, carry, extras


class WrongShape(Counting):
    def act(self, carry, step, mode):
        action, carry, extras = super().act(carry, step, mode)
        return action, carry, {"memory": extras["memory"][:, :1]}


class Forgets(Counting):
    def act(self, carry, step, mode):
        action, carry, _ = super().act(carry, step, mode)
        return action, carry, {}


@pytest.mark.parametrize(
    ("policy", "error", "says"),
    [
        (NotFinite, DivergedError, "memory"),
        (WrongShape, SchemaError, "shape"),
        (Forgets, SchemaError, "gave no column"),
    ],
)
def test_bad_columns_of_a_policy_never_reach_the_replay(policy, error, says):
    source = MemoryWeights()
    publish(source, 1)
    actor, replay, _ = make(policy=policy(), source=source)
    with pytest.raises(error, match=says):
        actor.run(0.5)
    assert replay.rows == {}


class Drifting(RandomPolicy):
    """Chooses NaN once its weights have diverged."""

    def act(self, carry, step, mode):
        action, carry, extras = super().act(carry, step, mode)
        return np.full_like(action, np.nan), carry, extras


def test_a_non_finite_action_names_the_policy_version():
    env = make_env("gym:Pendulum-v1", 1)
    source = MemoryWeights()
    publish(source, 7)
    policy = Drifting(env.spec.action, 0)
    env.close()
    actor, _, _ = make("gym:Pendulum-v1", policy=policy, source=source, num_envs=1)
    with pytest.raises(DivergedError, match=r"\(1, 7\)"):
        actor.run(0.2)
    actor.close()


def test_a_table_of_another_policy_is_refused():
    env = make_env("toy:counter", 1)
    replay = Recording(TableSpec.of(env.spec, {}))
    with pytest.raises(SchemaError, match="memory"):
        Actor(0, 0, env, Counting(), replay, MemoryWeights(), table=TableSpec.of(env.spec, {}), seed=0)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="chunk_rows"):
        make(chunk_rows=0)
