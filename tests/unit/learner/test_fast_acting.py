"""The acting step in few calls against the plain one: same random numbers, same actions and states."""

import numpy as np
import pytest
import torch

from learner.catalog import make_config, make_policy
from learner.nn.layers import initialise
from system.experience import Step
from system.specs import ActionSpec, ArraySpec, EnvSpec

SMALL = {"size": "nano", "deter": 32, "hidden": 8, "stoch": 4, "classes": 5, "units": 16, "bins": 15}
VECTOR = {"x": ArraySpec(shape=(3,), dtype="float32")}
MIXED = {
    "a": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=3),
    "b": ArraySpec(shape=(2, 2), dtype="float32"),
    "c": ArraySpec(shape=(7, 7, 3), dtype="uint8", kind="image"),  # too small for a CNN
    "d": ArraySpec(shape=(16, 16, 3), dtype="uint8", kind="image"),
    "e": ArraySpec(shape=(16, 16, 1), dtype="uint8", kind="image"),
    "f": ArraySpec(shape=(20, 18, 1), dtype="uint8", kind="image"),
}
CONTINUOUS = ActionSpec(kind="continuous", size=2)
DISCRETE = ActionSpec(kind="discrete", classes=(4,))
SEVERAL = ActionSpec(kind="discrete", classes=(3, 2))
STEPS, ENVS = 5, 4


def made_up(spec, rows, rng):
    if spec.dtype == "float32":
        return (10.0 * rng.normal(size=(rows, *spec.shape))).astype(np.float32)
    return rng.integers(0, spec.classes or 256, size=(rows, *spec.shape)).astype(spec.dtype)


def scene(obs, action, settings=None):
    """A policy whose weights are off their initial values, and the rows of a few steps."""
    env = EnvSpec(name="toy", obs=obs, action=action)
    policy = make_policy("dreamer", make_config("dreamer", SMALL | (settings or {})), env, seed=1, threads=0)
    generator = torch.Generator().manual_seed(7)
    initialise(policy.plain, generator)
    with torch.no_grad():
        for parameter in policy.plain.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        policy.fast.join()
    rng = np.random.default_rng(0)
    steps = []
    for t in range(STEPS):
        ids = np.arange(ENVS) if t % 2 == 0 else rng.permutation(ENVS)[: 1 + t]
        rows = len(ids)
        steps.append(
            Step(
                env_id=ids.astype(np.int32),
                obs={key: made_up(spec, rows, rng) for key, spec in obs.items()},
                reward=np.zeros(rows, np.float32),
                is_first=np.full(rows, t == 0) | (rng.random(rows) < 0.3),
                is_last=rng.random(rows) < 0.2,
                is_terminal=np.zeros(rows, bool),
            )
        )
    return policy, steps


def plainly(policy, state, step, mode, generator):
    """One step by the modules themselves; state holds deter, stoch and action of all environments."""
    plain, rows = policy.plain, torch.from_numpy(step.env_id.astype(np.int64))
    uniform = torch.rand((len(rows), plain.rssm.sizes.stoch), generator=generator)
    noise = (
        plain.actor.noise((len(rows),), generator)
        if mode == "train"
        else torch.zeros(len(rows), plain.actor.noise_width)
    )
    with torch.no_grad():
        action, deter, stoch = plain(
            *(part[rows] for part in state),
            {key: torch.from_numpy(value) for key, value in step.obs.items()},
            torch.from_numpy(step.is_first),
            uniform,
            noise,
            torch.full((len(rows),), mode == "eval"),
        )
    for part, new in zip(state, (deter, stoch.flatten(1), action), strict=True):
        part[rows] = new
    return action, stoch.argmax(-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("obs", "action", "settings"),
    [
        (VECTOR, CONTINUOUS, {}),
        (MIXED, CONTINUOUS, {"min_std": 0.3, "max_std": 0.3}),
        (VECTOR, DISCRETE, {"unimix": 0.0}),
        (MIXED, SEVERAL, {"actor_unimix": 0.05}),
    ],
)
def test_steps_equal_the_plain_ones_whatever_rows_arrive(obs, action, settings, mode):
    policy, steps = scene(obs, action, settings)
    carry = policy.initial(ENVS)
    state = [torch.zeros_like(x) for x in (carry.deter, carry.stoch, carry.action)]
    generator = torch.Generator().set_state(policy.generator.get_state())
    for step in steps:
        chosen, carry, extras = policy.act(carry, step, mode)
        expected, index = plainly(policy, state, step, mode, generator)
        live = ~step.is_last
        if action.kind == "continuous":
            np.testing.assert_allclose(chosen[live], expected.clamp(-1, 1).numpy()[live], atol=1e-5)
            assert np.abs(chosen[live]).max() > 0.05
        else:
            ours = torch.cat([torch.eye(n)[chosen[:, k]] for k, n in enumerate(action.classes)], -1)
            assert torch.equal(ours[live], expected[live])
        assert not chosen[step.is_last].any()
        np.testing.assert_array_equal(extras["stoch"], index.numpy())
        torch.testing.assert_close(carry.deter, state[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(carry.stoch, state[1])
    assert torch.equal(policy.generator.get_state(), generator.get_state())


def test_example_inputs_fit_the_plain_step():
    for obs, action in ((MIXED, SEVERAL), (VECTOR, CONTINUOUS)):
        policy, _ = scene(obs, action)
        chosen, deter, stoch = policy.plain(**policy.example(3))
        assert chosen.shape == (3, action.width)
        assert deter.shape == (3, 32)
        assert stoch.sum(-2).eq(1.0).all()


def blank(ids):
    rows = len(ids)
    zeros = np.zeros(rows, bool)
    return Step(
        env_id=np.asarray(ids, np.int32),
        obs={"x": np.zeros((rows, 3), np.float32)},
        reward=np.zeros(rows, np.float32),
        is_first=zeros,
        is_last=zeros,
        is_terminal=zeros,
    )


def test_buffers_of_partial_steps_are_bounded():
    policy, _ = scene(VECTOR, DISCRETE)
    carry = policy.initial(100)
    for rows in range(1, 70):
        policy.act(carry, blank(np.arange(rows) + 1), "train")
        assert sum(policy.fast._partial) <= 1024
    assert 69 in policy.fast._partial
    assert 1 not in policy.fast._partial


def test_step_without_rows_changes_nothing():
    policy, steps = scene(VECTOR, CONTINUOUS)
    carry = policy.initial(ENVS)
    policy.act(carry, steps[0], "eval")
    before = carry.state.clone()
    action, carry, extras = policy.act(carry, blank([]), "eval")
    assert action.shape == (0, 2)
    assert extras["deter"].shape == (0, 32)
    assert torch.equal(carry.state, before)
