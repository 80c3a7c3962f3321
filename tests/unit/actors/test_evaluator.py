"""Evaluation: a fixed quota per environment, exact scores, repeatable baselines."""

import numpy as np
import pytest

from actors.envs.catalog import make_env
from actors.envs.toy import counter_row, episode_length
from actors.evaluator import evaluate, random_baseline
from actors.random_policy import RandomPolicy
from system.errors import ConfigError
from system.experience import Step
from system.specs import ActionSpec, ArraySpec


def known_episode(seed, env, episode):
    """(return, length) of an episode of toy:counter."""
    ids = np.array([env])
    last = int(episode_length(seed, ids, np.array([episode]), 3, 12)[0])
    steps = np.arange(last + 1)
    rows = counter_row(seed, np.full(last + 1, env), np.full(last + 1, episode), steps)
    return float(rows["reward"].astype(np.float64).sum()), last


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}])
def test_each_environment_plays_its_quota_and_no_short_episode_is_preferred(options):
    env = make_env("toy:counter", 3, options=options)
    report = evaluate(env, RandomPolicy(env.spec.action, 0), episodes=7, seed=4)
    quota = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]
    known = [known_episode(4, *which) for which in quota]
    assert report.complete
    assert report.lengths.tolist() == [length for _, length in known]
    np.testing.assert_allclose(report.returns, [score for score, _ in known])
    assert report.mean == pytest.approx(np.mean(report.returns))
    assert report.std == pytest.approx(np.std(report.returns))


def test_fewer_episodes_than_environments():
    env = make_env("toy:counter", 5)
    assert len(evaluate(env, RandomPolicy(env.spec.action, 0), episodes=2, seed=0).returns) == 2


def test_running_out_of_time_is_said():
    env = make_env("toy:counter", 1, options={"shortest": 10**6, "longest": 10**6})
    report = evaluate(env, RandomPolicy(env.spec.action, 0), episodes=1, seed=0, max_seconds=0.05)
    assert not report.complete
    assert np.isnan(report.mean)


def test_a_baseline_repeats_for_the_same_seed():
    env = make_env("envpool:CartPole-v1", 4)
    first, second = (random_baseline(env, 20, seed=3) for _ in range(2))
    other = random_baseline(env, 20, seed=4)
    env.close()
    np.testing.assert_array_equal(first.returns, second.returns)
    assert not np.array_equal(first.returns, other.returns)
    assert 12 < first.mean < 40, "CartPole ends after about 22 random steps"


def test_no_episodes_are_refused():
    env = make_env("toy:counter", 1)
    with pytest.raises(ConfigError, match="episodes"):
        random_baseline(env, 0, seed=0)


def test_the_random_policy_fills_declared_columns_with_zeros():
    columns = {
        "deter": ArraySpec(shape=(3,), dtype="float32"),
        "stoch": ArraySpec(shape=(2,), dtype="uint16"),
    }
    policy = RandomPolicy(ActionSpec(kind="discrete", classes=(4, 2)), 0, columns)
    flags = np.zeros(5, np.bool_)
    step = Step(
        env_id=np.arange(5, dtype=np.int32),
        obs={},
        reward=np.zeros(5, np.float32),
        is_first=flags,
        is_last=flags,
        is_terminal=flags,
    )
    action, _, extras = policy.act(policy.initial(5), step, "train")
    assert action.shape == (5, 2)
    assert {k: (v.shape, v.dtype.name, v.any()) for k, v in extras.items()} == {
        "deter": ((5, 3), "float32", False),
        "stoch": ((5, 2), "uint16", False),
    }
