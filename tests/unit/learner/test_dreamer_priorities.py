"""Importance weights in, priorities out: what prioritized replay asks of the DreamerV3 agent."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.catalog import make_agent, make_config
from learner.families.dreamer.update import row_priority
from tests.unit.learner.test_dreamer_agent import TINY, draw, vector_env

BATCH, ROWS = 4, 7


def build(**changes):
    signal = changes.pop("priority_signal", "none")
    config = make_config("dreamer", TINY | changes)
    return make_agent("dreamer", config, vector_env(), device="cpu", seed=0, priority_signal=signal)


def sequence(agent, weights=None):
    drawn = draw(vector_env(), agent.columns, BATCH, ROWS)
    return replace(drawn, weights=None if weights is None else np.asarray(weights, np.float32))


def losses(weights, **changes):
    """(model loss, behavior loss, metrics) of a fresh agent."""
    agent = build(**changes)
    batch, start = agent.prepare(sequence(agent, weights))
    noise = agent.model.noise(BATCH, ROWS - 1, agent.generator)
    model = agent.model.loss(batch, start, noise)
    noise = agent.behavior.noise(BATCH, ROWS - 1, agent.generator)
    noise |= agent.model.noise(len(noise["action"]), agent.behavior.horizon, agent.generator)
    behavior = agent.behavior.loss(agent.model, batch, model.states, noise)
    return model.total, behavior.total, model


@pytest.mark.parametrize("starts", [0, 8])
def test_losses_are_means_over_sequences_that_weights_take_apart(starts):
    whole = losses(None, imagination_starts=starts)
    ones = losses(np.ones(BATCH), imagination_starts=starts)
    single = [losses(np.eye(BATCH)[b], imagination_starts=starts) for b in range(BATCH)]
    for part in range(2):
        torch.testing.assert_close(ones[part], whole[part])
        torch.testing.assert_close(sum(one[part] for one in single), whole[part])
    assert len({one[0].item() for one in single}) == BATCH


def test_weights_change_what_is_learned():
    agents = [build(warmup=0) for _ in range(3)]
    for agent, weights in zip(agents, (None, None, [1.0, 0.1, 0.1, 0.1]), strict=True):
        agent.learn(sequence(agent, weights), {})
    same, again, other = (agent.parameters.values for agent in agents)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_without_a_signal_nothing_is_said_about_priorities():
    agent = build()
    assert agent.learn(sequence(agent), {})[2].priority is None


def test_the_model_signal_is_the_loss_of_each_row():
    total, _, model = losses(None)
    agent = build(priority_signal="model")
    back = agent.learn(sequence(agent), {})[2]
    assert back.priority.shape == (BATCH, ROWS - 1)
    assert back.priority.dtype == np.float32
    assert back.priority.mean() == pytest.approx(total.item(), rel=1e-5)
    assert "error" not in model.rows


@pytest.mark.parametrize("starts", [0, 8])
def test_the_value_signal_is_zero_where_no_return_is_known(starts):
    agent = build(priority_signal="value", imagination_starts=starts)
    drawn = sequence(agent)
    back = agent.learn(drawn, {})[2]
    assert back.priority.shape == (BATCH, ROWS - 1)
    assert np.isfinite(back.priority).all()
    assert (back.priority >= 0).all()
    assert back.priority.max() > 0
    trailing = 2 if starts else ROWS - 1
    last = drawn.columns["is_last"][:, -trailing:].copy()
    last[:, -1] = True
    assert (back.priority[:, -trailing:][last] == 0).all()


def test_a_signal_changes_nothing_that_is_learned():
    plain, signalled = build(warmup=0), build(warmup=0, priority_signal="value")
    for agent in (plain, signalled):
        agent.learn(sequence(agent), {})
    assert torch.equal(plain.parameters.values, signalled.parameters.values)


def test_rows_before_the_trained_tail_get_the_mean_of_it():
    error = torch.tensor([[1.0, 3.0], [0.0, -0.5]])
    assert row_priority(error, 4).tolist() == [[2, 2, 1, 3], [0, 0, 0, 0]]
