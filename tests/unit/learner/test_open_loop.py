"""Open-loop prediction through the contract, on a model whose future is known."""

import numpy as np
import pytest
import torch

from learner.evaluation.openloop import film_strip, open_loop
from learner.interfaces import Rollout, Space
from system.errors import ConfigError
from system.experience import Sequence, SequenceIds

B, T = 2, 6


class CounterModel:
    """The truth: obs = start + number of actions so far; predicts it exactly, or late by `lag`."""

    caps = frozenset({"decode", "reward"})

    def __init__(self, lag=0.0):
        self.obs_space = {
            "count": Space(kind="box", shape=(1,)),
            "frame": Space(kind="image", shape=(2, 2, 1)),
        }
        self.lag = lag

    def noise(self, batch, time, generator):
        return {}

    def observe(self, carry, obs, prev_action, is_first, noise):
        return {"count": obs["count"][:, -1]}, {"count": obs["count"]}

    def imagine(self, state, horizon, policy, noise):
        assert policy.shape == (B, horizon, 1)
        count = state["count"].unsqueeze(1) + policy.cumsum(1) - self.lag
        return Rollout(state={"count": count}, action=policy, out={"reward": count[..., 0]}, feat=count)

    def read(self, state, what):
        pixels = state["count"].unsqueeze(-1).unsqueeze(-1).expand(*state["count"].shape[:2], 2, 2, 1)
        return {"obs": {"count": state["count"], "frame": pixels}}


class Agent:
    def __init__(self, lag=0.0, first=()):
        self.model = CounterModel(lag)
        self.first = first

    def prepare(self, sequence):
        count = torch.arange(T).float().view(1, T, 1).expand(B, T, 1)
        is_first = torch.zeros(B, T, dtype=torch.bool)
        for row in self.first:
            is_first[row] = True
        frame = count.view(B, T, 1, 1, 1).expand(B, T, 2, 2, 1).to(torch.uint8)
        rows = {
            "obs": {"count": count, "frame": frame},
            "prev_action": torch.ones(B, T, 1),
            "is_first": is_first,
            "reward": count[..., 0],
        }
        return rows, {"count": torch.zeros(B, 1)}


def sequence():
    zeros = np.zeros(B)
    ids = SequenceIds(
        shard=zeros.astype(np.int32), stream=zeros.astype(np.int32), start=zeros.astype(np.int64)
    )
    return Sequence(columns={"reward": np.zeros((B, T), np.float32)}, ids=ids)


def test_perfect_model_has_no_error_and_copying_has_a_growing_one():
    report = open_loop(Agent(), sequence(), context=2, seed=0)
    assert set(report.error) == {"count", "frame", "reward"}
    for key in report.error:
        assert report.error[key].tolist() == [0.0] * 4
        assert report.copy_error[key].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert report.valid.tolist() == [2, 2, 2, 2]


def test_rows_behind_an_episode_border_count_in_no_error():
    report = open_loop(Agent(lag=1.0, first=[(0, 3)]), sequence(), context=2, seed=0)
    assert report.valid.tolist() == [2, 1, 1, 1]
    assert report.error["count"].tolist() == [1.0] * 4


def test_film_shows_truth_model_and_difference():
    report = open_loop(Agent(lag=2.0), sequence(), context=2, seed=0)
    film = report.images["frame"]
    assert film.shape == (3, B, T, 2, 2, 1)
    assert film.dtype == np.uint8
    assert film[0, 0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert film[1, 0, :, 0, 0, 0].tolist() == [0, 1, 0, 1, 2, 3]
    assert film[2, 0, :, 0, 0, 0].tolist() == [127, 127, 126, 126, 126, 126]
    assert film_strip(film).shape == (T, 6, 4, 1)
    assert film_strip(film, limit=1)[3, :, 0, 0].tolist() == [3, 3, 1, 1, 126, 126]


@pytest.mark.parametrize("context", [0, T])
def test_context_that_leaves_nothing_is_refused(context):
    with pytest.raises(ConfigError, match="must be between 1 and 5"):
        open_loop(Agent(), sequence(), context=context, seed=0)
