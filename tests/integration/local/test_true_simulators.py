"""The shipped equations against the environments that people train on."""

from itertools import islice

import gymnasium
import numpy as np
import pytest
import torch

from actors.envs.catalog import make_env
from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from learner.evaluation.compounding import compounding, predict
from learner.evaluation.oracle import OracleModel
from learner.evaluation.rows import Rows
from learner.evaluation.simulators import CartPole, simulator_of
from learner.nn.heads import encode_action


def test_cart_pole_moves_like_gymnasiums_to_the_last_bit_of_its_observations() -> None:
    env = gymnasium.make("CartPole-v1").unwrapped
    ours = CartPole()
    rng = np.random.default_rng(0)
    compared = ended = 0
    for episode in range(40):
        env.reset(seed=episode)
        env.state = tuple(rng.uniform(-1, 1, 4) * [2.0, 1.0, 0.18, 1.0])
        state = np.array([env.state], np.float64)
        for _ in range(60):
            action = rng.integers(0, 2)
            obs, reward, terminated, _, _ = env.step(int(action))
            state, own_reward, own_end = ours.step(state, np.array([[action]]))
            np.testing.assert_allclose(state[0], env.state, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(ours.show(state)["vector"][0], obs, rtol=1e-6, atol=1e-7)
            assert (bool(own_end[0]), float(own_reward[0])) == (terminated, reward)
            compared += 1
            if terminated:
                ended += 1
                break
    env.close()
    assert compared > 400
    assert ended > 20


@pytest.mark.parametrize("name", ["gym:CartPole-v1", "envpool:CartPole-v1"])
def test_the_oracle_foretells_the_rows_that_actors_collect(name: str) -> None:
    env = make_env(name, 4)
    try:
        env.start(3)
        made = list(islice(env_loop(env, RandomPolicy(env.spec.action, 0), "train"), 40))
        spec = env.spec
    finally:
        env.close()
    (key,) = spec.obs
    action = encode_action(torch.from_numpy(np.stack([m.action for m in made], 1)), spec.action)  # [N, T, A]
    batch = {
        name: torch.from_numpy(np.stack([getattr(m.step, name) for m in made], 1))
        for name in ("reward", "is_first", "is_last", "is_terminal")
    }
    batch["prev_action"] = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
    batch["obs"] = {key: torch.from_numpy(np.stack([m.step.obs[key] for m in made], 1))}
    simulator = simulator_of(name, spec)
    assert simulator is not None
    model = OracleModel(simulator)
    prediction = predict(model, Rows(batch=batch, start=model.initial(4), seen=1), torch.Generator())
    curves = compounding(model, prediction)
    assert curves["obs"].counted > 8
    for channel in ("obs", "reward", "cont"):
        assert curves[channel].model[: curves[channel].counted].max() < 1e-4, channel
        assert curves[channel].one_step[: curves[channel].counted].max() < 1e-4, channel
    assert curves["obs"].copy[5] > 0.1
    assert batch["is_terminal"][:, 1:].any()
