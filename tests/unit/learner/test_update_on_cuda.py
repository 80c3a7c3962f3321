"""What only a card can show: captured updates are the same updates, and batches may travel meanwhile."""

import numpy as np
import pytest
import torch

from learner.catalog import make_agent, make_config, overlay_columns
from learner.families.dreamer.agent import DreamerAgent
from system.experience import Sequence
from tests.unit.learner.test_dreamer_agent import TINY, draw, mixed_env, replaced, vector_env
from tests.unit.learner.test_update_capture import arm_env

UPDATES = 10

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(env, **settings) -> DreamerAgent:
    config = make_config("dreamer", TINY | {"warmup": 3} | settings)
    return make_agent("dreamer", config, env, device="cuda", seed=0, priority_signal="value")


def batches(env, count: int = UPDATES) -> list[Sequence]:
    columns = overlay_columns("dreamer", make_config("dreamer", TINY), env)
    return [draw(env, columns, seed=i) for i in range(count)]


def moved(agent: DreamerAgent, from_: torch.Tensor) -> torch.Tensor:
    return agent.parameters.values - from_


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("env", [vector_env(), mixed_env(), arm_env()], ids=["vector", "mixed", "continuous"])
def test_captured_and_eager_updates_give_the_same_parameters(env, dtype):
    eager, captured = build(env, graph="off", dtype=dtype), build(env, dtype=dtype)
    start = eager.parameters.values.clone()
    assert torch.equal(start, captured.parameters.values)
    for batch in batches(env):
        one, other = (agent.learn(batch, {}) for agent in (eager, captured))
        assert one[1].keys() == other[1].keys()
        for name, value in one[1].items():
            assert other[1][name] == pytest.approx(value, rel=0.05, abs=0.05), name
    assert captured._step.replays
    assert not eager._step.replays
    # Sums of a GPU have no fixed order, and LaProp makes steps of equal size of the smallest gradients.
    apart = (eager.parameters.values - captured.parameters.values).norm()
    assert apart <= 0.02 * moved(eager, start).norm()
    assert eager.optimiser.updates == captured.optimiser.updates == UPDATES
    torch.testing.assert_close(
        eager.behavior.returns.pair, captured.behavior.returns.pair, rtol=0.01, atol=1e-3
    )


def test_replayed_update_that_is_not_finite_changes_nothing_and_is_reported_one_call_later():
    env = vector_env()
    agent = build(env)
    several = batches(env)
    for batch in several[:6]:
        agent.learn(batch, {})
    assert agent._step.replays
    before = agent.parameters.values.clone(), agent.optimiser.rms.clone(), agent.behavior.returns.pair.clone()
    spoilt = np.full_like(several[6].columns["vector"], np.nan)
    agent.learn(replaced(several[6], vector=spoilt), {})
    after = agent.parameters.values, agent.optimiser.rms, agent.behavior.returns.pair
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    _, metrics, write_back = agent.learn(several[7], {})
    assert metrics["nonfinite"] == 1.0
    assert write_back is None
    assert agent.learn(several[8], {})[1]["nonfinite"] == 0.0
    assert agent.optimiser.updates == 8


def test_arrays_of_a_batch_may_be_overwritten_as_soon_as_learn_returns():
    env = vector_env()
    kept, reused = build(env), build(env)
    start = kept.parameters.values.clone()
    several = batches(env)
    space = {name: np.empty_like(column) for name, column in several[0].columns.items()}
    for batch in several:
        kept.learn(batch, {})
        for name, column in batch.columns.items():
            np.copyto(space[name], column)
        reused.learn(Sequence(columns=space, ids=batch.ids, context=batch.context), {})
        for column in space.values():
            column.view(np.uint8).fill(255)  # not a number, or beyond every class
    apart = (kept.parameters.values - reused.parameters.values).norm()
    assert apart <= 0.02 * moved(kept, start).norm()


def test_state_loaded_into_a_captured_agent_is_what_its_replays_work_on():
    env = vector_env()
    several = batches(env)
    straight, replaying = build(env, graph="off"), build(env)
    start = straight.parameters.values.clone()
    for batch in several[:6]:
        straight.learn(batch, {})
        replaying.learn(batch, {})
    replaying.load(straight.state())
    for batch in several[6:]:
        straight.learn(batch, {})
        replaying.learn(batch, {})
    assert replaying._step.replays
    apart = (straight.parameters.values - replaying.parameters.values).norm()
    assert apart <= 0.02 * moved(straight, start).norm()
