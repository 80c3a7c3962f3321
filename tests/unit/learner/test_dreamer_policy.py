"""The acting policy: per-environment state, resets, modes, weights."""

import numpy as np
import pytest
import torch

from learner.catalog import make_agent, make_config, make_policy
from learner.nn.codec import unpack_float
from system.errors import SchemaError
from system.experience import Step
from system.specs import ActionSpec, ArraySpec, EnvSpec
from system.weights import NO_VERSION, PolicyVersion, Weights

TINY = {
    "size": "nano",
    "deter": 16,
    "hidden": 8,
    "stoch": 4,
    "classes": 4,
    "units": 8,
    "blocks": 4,
    "bins": 15,
}
DISCRETE = ActionSpec(kind="discrete", classes=(3, 2))


def env_spec(action=DISCRETE):
    return EnvSpec(name="toy", obs={"vector": ArraySpec(shape=(3,), dtype="float32")}, action=action)


def policy(action=DISCRETE, seed=0):
    return make_policy("dreamer", make_config("dreamer", TINY), env_spec(action), seed=seed, threads=0)


def step(vector, env_id=None, first=False, last=False):
    vector = np.asarray(vector, np.float32)
    n = len(vector)
    env_id = np.arange(n) if env_id is None else np.asarray(env_id)
    flag = np.broadcast_to(np.asarray(first), n).copy()
    ended = np.broadcast_to(np.asarray(last), n).copy()
    return Step(
        env_id=env_id.astype(np.int32),
        obs={"vector": vector},
        reward=np.zeros(n, np.float32),
        is_first=flag,
        is_last=ended,
        is_terminal=np.zeros(n, bool),
    )


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3))


def test_actions_and_extras_have_the_declared_shapes():
    for action in (DISCRETE, ActionSpec(kind="continuous", size=2)):
        actor = policy(action)
        chosen, _, extras = actor.act(actor.initial(4), step(vectors(4), first=True), "train")
        assert chosen.shape == (4, *action.shape)
        assert chosen.dtype == action.dtype
        assert {k: (v.shape[1:], v.dtype.name) for k, v in extras.items()} == {
            k: (s.shape, s.dtype) for k, s in actor.columns.items()
        }


def test_is_first_forgets_what_came_before():
    fresh, used = policy(), policy()
    carry = used.initial(2)
    for i in range(5):
        _, carry, _ = used.act(carry, step(vectors(2, i), first=i == 0), "eval")
    used.generator.manual_seed(0)
    fresh.generator.manual_seed(0)
    again = used.act(carry, step(vectors(2, 9), first=True), "eval")
    clean = fresh.act(fresh.initial(2), step(vectors(2, 9), first=True), "eval")
    np.testing.assert_array_equal(again[2]["deter"], clean[2]["deter"])
    np.testing.assert_array_equal(again[0], clean[0])


def test_state_follows_the_env_id_however_rows_arrive():
    """Rows of a subset, in any order, continue the state of their own environment only."""
    actor = policy()
    carry = actor.initial(3)
    _, carry, first = actor.act(carry, step(vectors(3), first=True), "eval")
    untouched = carry.deter[1].clone()
    _, carry, extras = actor.act(carry, step(vectors(2, 1), env_id=[2, 0]), "eval")
    assert torch.equal(carry.deter[1], untouched)
    stored = unpack_float(extras["deter"], torch.device("cpu"))
    assert torch.equal(carry.deter[[2, 0]].to(torch.bfloat16).float(), stored)
    assert not np.array_equal(first["deter"][[2, 0]], extras["deter"])


def test_last_row_of_an_episode_gets_the_zero_action():
    actor = policy()
    chosen, _, _ = actor.act(
        actor.initial(64), step(vectors(64), first=True, last=np.arange(64) % 2 == 0), "train"
    )
    assert not chosen[::2].any()
    assert chosen[1::2].any()


def test_evaluation_takes_the_most_probable_action_and_training_samples():
    actor = policy(ActionSpec(kind="discrete", classes=(4,)))
    repeated = np.repeat(vectors(1), 256, 0)
    with torch.no_grad():
        for parameter in actor.plain.rssm.posterior.parameters():
            parameter.zero_()  # one latent for all rows would need equal samples: make stoch irrelevant
        actor.plain.actor.logits[0].weight.zero_()
        actor.plain.actor.logits[0].bias.copy_(torch.tensor([0.0, 1.0, 0.5, -1.0]))
        actor.fast.join()
    carry = actor.initial(256)
    greedy = actor.act(carry, step(repeated, first=True), "eval")[0]
    assert set(greedy[:, 0].tolist()) == {1}
    sampled = actor.act(carry, step(repeated, first=True), "train")[0]
    assert len(set(sampled[:, 0].tolist())) > 2


def test_continuous_actions_stay_in_bounds():
    actor = policy(ActionSpec(kind="continuous", size=2))
    chosen = actor.act(actor.initial(256), step(vectors(256), first=True), "train")[0]
    assert np.abs(chosen).max() <= 1.0
    assert np.abs(chosen).max() > 0.5


def test_policy_filters_to_the_same_state_as_the_learner():
    config, env = make_config("dreamer", TINY), env_spec()
    agent = make_agent("dreamer", config, env, device="cpu", seed=3)
    actor = make_policy("dreamer", config, env, seed=0, threads=0)
    actor.load(Weights.of(PolicyVersion(1, 1), agent.weights()))
    carry = actor.initial(2)
    deters, actions, uniforms = [], [], []
    for t in range(4):
        state = actor.generator.get_state()
        uniforms.append(torch.rand((2, 4), generator=torch.Generator().set_state(state)))
        chosen, carry, _ = actor.act(carry, step(vectors(2, t), first=t == 0), "eval")
        deters.append(carry.deter.clone())
        actions.append(carry.action.clone())
        assert chosen.shape == (2, 2)
    obs = {"vector": torch.tensor(np.stack([vectors(2, t) for t in range(4)], 1), dtype=torch.float32)}
    prev = torch.stack([torch.zeros_like(actions[0]), *actions[:-1]], 1)
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[:, 0] = True
    states = agent.model.observe(
        agent.model.initial(2), obs, prev, first, {"stoch": torch.stack(uniforms, 1)}
    )[1]
    assert torch.allclose(states["deter"], torch.stack(deters, 1), atol=1e-5)


def test_loading_sets_the_version_and_refuses_weights_of_another_model():
    actor = policy()
    assert actor.version == NO_VERSION
    agent = make_agent("dreamer", make_config("dreamer", TINY), env_spec(), device="cpu", seed=1)
    actor.load(Weights.of(PolicyVersion(2, 7), agent.weights()))
    assert actor.version == PolicyVersion(2, 7)
    other = make_agent(
        "dreamer", make_config("dreamer", TINY | {"units": 16}), env_spec(), device="cpu", seed=1
    )
    with pytest.raises(SchemaError, match="belong to another model"):
        actor.load(Weights.of(PolicyVersion(2, 8), other.weights()))
    assert actor.version == PolicyVersion(2, 7)
    missing = dict(agent.weights())
    del missing["rssm.core.norm.scale"]
    with pytest.raises(SchemaError, match="lack array"):
        actor.load(Weights.of(PolicyVersion(2, 9), missing))


def test_same_seed_acts_the_same():
    chosen = [
        p.act(p.initial(8), step(vectors(8), first=True), "train")[0]
        for p in (policy(seed=5), policy(seed=5))
    ]
    np.testing.assert_array_equal(*chosen)


def test_policy_builds_no_part_an_actor_does_not_need():
    names = {name.split(".")[0] for name, _ in policy().plain.named_parameters()}
    assert names == {"encoder", "rssm", "actor"}
    assert not hasattr(policy().plain.rssm, "prior")
