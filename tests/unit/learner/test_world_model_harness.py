"""The harness on models that are right, copying, deaf, or broken in one way each: it tells them apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.catalog import make_agent, make_config
from learner.evaluation.compounding import compounding, predict, shuffled_actions, steps_better
from learner.evaluation.counterfactual import counterfactual, plan_gap, random_actions, recall
from learner.evaluation.harness import evaluate_model
from learner.evaluation.invariants import invariants
from learner.evaluation.oracle import OracleModel, simulated_rows
from learner.evaluation.rows import Rows, at_row, map_leaves
from learner.evaluation.simulators import CartPole, Corridor
from learner.interfaces import Rollout, Space
from system.errors import ConfigError
from system.specs import ActionSpec, ArraySpec, EnvSpec

SEEN, TIME, SEQUENCES = 3, 20, 24


class CopyModel(OracleModel):
    """Believes that nothing ever changes."""

    def step(self, state, action, noise):
        return state, {"reward": state["reward"], "cont": state["cont"]}


class Prophet(OracleModel):
    """Knows the observation after the one it sees."""

    def observe(self, carry, obs, prev_action, is_first, noise):
        later = {key: torch.cat([value[:, 1:], value[:, -1:]], 1) for key, value in obs.items()}
        return super().observe(carry, later, prev_action, is_first, noise)


class Planner(OracleModel):
    """Knows the last of the actions before it takes the first."""

    def imagine(self, state, horizon, policy, noise):
        rollout = super().imagine(state, horizon, policy, noise)
        return Rollout(
            state=rollout.state | {"reward": rollout.state["reward"] + rollout.action[:, -1:, 0]},
            action=rollout.action, out=rollout.out, feat=rollout.feat,
        )  # fmt: skip


class Gossip(OracleModel):
    """Tells each sequence what the others saw."""

    def observe(self, carry, obs, prev_action, is_first, noise):
        carry, states = super().observe(carry, obs, prev_action, is_first, noise)
        return carry, states | {"sim": states["sim"] + states["sim"].mean(0, keepdim=True)}


class Elephant(OracleModel):
    """Does not forget at a first row."""

    def observe(self, carry, obs, prev_action, is_first, noise):
        carry, states = super().observe(carry, obs, prev_action, is_first, noise)
        return carry, states | {"sim": states["sim"].cumsum(1)}


class Dice(OracleModel):
    """Throws its own dice."""

    def step(self, state, action, noise):
        after, out = super().step(state, action, noise)
        return after | {"sim": after["sim"] + 1e-3 * torch.rand(())}, out


class Deaf(OracleModel):
    """Believes in one action whatever is done."""

    def step(self, state, action, noise):
        return super().step(state, torch.eye(action.shape[-1])[0].expand_as(action), noise)


class Blind(OracleModel):
    """Looks at nothing but the clock."""

    def observe(self, carry, obs, prev_action, is_first, noise):
        carry, states = super().observe(carry, obs, prev_action, is_first, noise)
        return carry, map_leaves(torch.zeros_like, states)


class Skipping(OracleModel):
    """Its rollout takes two steps where one is asked for."""

    def imagine(self, state, horizon, policy, noise):
        doubled = policy.repeat_interleave(2, 1)
        rollout = super().imagine(state, 2 * horizon, doubled, noise)
        half = map_leaves(lambda leaf: leaf[:, 1::2], rollout.state)
        out = map_leaves(lambda leaf: leaf[:, 1::2], rollout.out)
        return Rollout(state=half, action=policy, out=out, feat=rollout.feat[:, ::2])


class Distracted(OracleModel):
    """Has another state when it sees a row alone."""

    def observe(self, carry, obs, prev_action, is_first, noise):
        carry, states = super().observe(carry, obs, prev_action, is_first, noise)
        alone = float(is_first.shape[1] == 1)
        return carry, states | {"sim": states["sim"] + alone}


class Dreamy(OracleModel):
    """Expects one unit of reward more at every step than there is."""

    def step(self, state, action, noise):
        after, out = super().step(state, action, noise)
        return after | {"reward": after["reward"] + 1.0}, out | {"reward": out["reward"] + 1.0}


class Feeling(OracleModel):
    """Decodes nothing: can be judged by its features alone."""

    caps = frozenset({"step"})


def rows(world=None, *, seen=SEEN, time=TIME):
    return simulated_rows(world or CartPole(), sequences=SEQUENCES, time=time, seen=seen, seed=1)


def generator():
    return torch.Generator().manual_seed(0)


def failed(model, world=None):
    checks = invariants(model, rows(world), generator())
    assert len(checks) >= 9
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("world", [CartPole(), Corridor(3)], ids=["cartpole", "corridor"])
def test_the_truth_scores_the_ceiling_everywhere(world) -> None:
    oracle = OracleModel(world)
    report = evaluate_model(oracle, rows(world), seed=0, reference=oracle, policy=random_policy(oracle, 15))
    assert report.passed, report.text()
    assert report.main.useful_horizon == report.main.counted > 10
    assert report.main.model.max() < 1e-5
    assert report.main.copy[4] > 0.3
    assert report.shuffle["obs"] > 100
    told = report.counterfactual
    assert (told.retrieval, told.noise_spread) == (1.0, 0.0)
    assert told.starts > SEQUENCES / 2
    assert told.distinct > 0.9
    assert told.spread == pytest.approx(1.0)
    assert report.plan.gap == 0.0
    assert report.plan.error.max() < 1e-5
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"]


def random_policy(model, horizon):
    actions = random_actions(model.action_space, (SEQUENCES, horizon), generator())
    return lambda state, h: actions[:, h]


def test_an_untrained_model_is_sound_and_knows_nothing() -> None:
    world = CartPole()
    agent = make_agent("dreamer", make_config("dreamer", {"size": "nano"}), world.spec, device="cpu", seed=0)
    given = rows(world)
    report = evaluate_model(
        agent.model, given.starting(agent.model.initial(SEQUENCES)), seed=0, reference=OracleModel(world)
    )
    assert report.sound, report.text()
    assert [check.passed for check in report.checks if check.name in report.scores] == [False] * 3
    assert report.main.useful_horizon == 0
    assert report.counterfactual.retrieval < 0.3
    assert {"observe_p50_ms", "step_p95_ms", "read_p50_ms"} <= report.latency.keys()


def test_dreamer_on_images_and_continuous_actions_knows_no_future() -> None:
    spec = EnvSpec(
        name="noise",
        obs={
            "image": ArraySpec(shape=(32, 32, 3), dtype="uint8", kind="image"),
            "class": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=3),
        },
        action=ActionSpec(kind="continuous", size=2),
    )
    model = make_agent("dreamer", make_config("dreamer", {"size": "nano"}), spec, device="cpu", seed=0).model
    rng, shape = np.random.default_rng(0), (3, 8)
    obs = {
        "image": rng.integers(0, 256, (*shape, 32, 32, 3)).astype(np.uint8),
        "class": rng.integers(0, 3, (*shape, 2)).astype(np.int32),
    }
    batch = {
        "obs": {key: torch.from_numpy(value) for key, value in obs.items()},
        "prev_action": torch.from_numpy(rng.uniform(-1, 1, (*shape, 2)).astype(np.float32)),
        "reward": torch.zeros(shape),
        **{name: torch.zeros(shape, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    given = Rows(batch=batch, start=model.initial(3), seen=4)
    assert {check.name for check in invariants(model, given, generator()) if not check.passed} == set()
    curves = compounding(model, predict(model, given, generator()))
    assert {"obs", "obs/image", "obs/image/changed", "obs/class", "reward", "cont", "feat"} == set(curves)


def test_whoever_copies_is_not_better_than_copying_and_does_not_listen() -> None:
    model, oracle = CopyModel(CartPole()), OracleModel(CartPole())
    prediction = predict(model, rows(), generator())
    curve = compounding(model, prediction)["obs"]
    np.testing.assert_allclose(curve.model, curve.copy, atol=1e-6)
    assert curve.useful_horizon == 0
    np.testing.assert_allclose(curve.one_step, curve.one_step_copy, atol=1e-6)
    assert curve.one_step.mean() < 0.7 * curve.model.mean()  # teacher forcing flatters
    assert shuffled_actions(model, prediction, generator())["obs"] == pytest.approx(1.0)
    told = counterfactual(model, oracle, rows(), generator(), futures=4, horizon=8)
    assert told.retrieval == pytest.approx(0.25, abs=0.02)
    assert told.spread == 0.0


@pytest.mark.parametrize(
    ("model", "broken"),
    [
        (Prophet, {"causality/observe"}),
        (Planner, {"causality/imagine"}),
        (Gossip, {"isolation"}),
        (Elephant, {"reset", "agreement/observe"}),
        (Dice, {"determinism/imagine"}),
        (Deaf, {"listens/action"}),
        (Blind, {"listens/observation"}),
        (Skipping, {"agreement/step"}),
        (Distracted, {"agreement/observe"}),
    ],
)
def test_each_way_of_being_wrong_is_found(model, broken) -> None:
    found = failed(model(CartPole()))
    assert broken <= found
    assert failed(OracleModel(CartPole())) == set()


def test_futures_of_a_deaf_model_are_matched_by_chance() -> None:
    told = counterfactual(
        Deaf(CartPole()), OracleModel(CartPole()), rows(), generator(), futures=8, horizon=10
    )
    assert told.retrieval < 0.3
    assert told.spread == 0.0


def test_a_plan_that_expects_too_much_shows_a_gap() -> None:
    model, oracle = Dreamy(CartPole()), OracleModel(CartPole())
    gap = plan_gap(model, oracle, rows(), random_policy(model, 10), generator(), horizon=10)
    assert gap.gap == pytest.approx(gap.real_return)
    assert gap.error.max() < 1e-5
    assert gap.copy[-1] > 0.3


def test_a_model_without_decoder_is_judged_by_its_features() -> None:
    report = evaluate_model(Feeling(CartPole()), rows(), seed=0, reference=OracleModel(CartPole()))
    assert set(report.curves) == {"feat"}
    assert report.passed, report.text()
    deaf = type("DeafFeeling", (Feeling, Deaf), {})(CartPole())
    assert not evaluate_model(deaf, rows(), seed=0, reference=OracleModel(CartPole())).passed


@pytest.mark.parametrize("length", [1, 5, 9])
def test_who_remembers_knows_the_arm_at_any_distance_and_who_forgets_does_not(length) -> None:
    world = Corridor(length)
    forth = simulated_rows(
        world, sequences=16, time=length + 2, seen=length + 1, seed=2,
        choose=lambda state, rng: np.ones((len(state), 1), np.int32),
    )  # fmt: skip
    arms = torch.eye(4)[2:]

    class Forgetful(OracleModel):
        def observe(self, carry, obs, prev_action, is_first, noise):
            carry, states = super().observe(carry, obs, prev_action, is_first, noise)
            states["sim"][..., 1] *= obs["sign"][..., 0] != 0
            return at_row(states, -1), states

        def step(self, state, action, noise):
            after, out = super().step(state, action, noise)
            known = state["sim"][:, 1] != 0
            return after, out | {"reward": out["reward"] * known}

    assert recall(OracleModel(world), OracleModel(world), forth, arms, generator()) == 1.0
    assert recall(Forgetful(world), OracleModel(world), forth, arms, generator()) == 0.5


def test_rows_behind_the_end_of_an_episode_count_nowhere() -> None:
    model, given = OracleModel(CartPole()), rows()
    batch = dict(given.batch)
    batch["is_first"] = batch["is_first"].clone()
    batch["is_first"][:, SEEN + 4] = True
    batch["obs"] = {key: value.clone() for key, value in batch["obs"].items()}
    batch["obs"]["vector"][:, SEEN + 4 :] = 7.0
    curve = compounding(model, predict(model, replace(given, batch=batch), generator()))["obs"]
    assert curve.counted == 4
    assert curve.model.max() < 1e-5
    assert curve.useful_horizon == 4


def test_pixels_that_never_change_flatter_whoever_copies() -> None:
    world = Corridor()
    model = CopyModel(world)
    curves = compounding(model, predict(model, rows(world), generator()))
    still, moved = curves["obs/image"], curves["obs/image/changed"]
    assert (moved.copy[:5] > 2 * still.copy[:5]).all()
    np.testing.assert_allclose(moved.model, moved.copy)


@pytest.mark.parametrize(
    ("error", "baseline", "steps"),
    [
        ([1, 1, 3, 1], [2, 2, 2, 2], 2),
        ([2, 1], [2, 2], 0),  # a tie is no win
        ([0, 0], [0, 1], 2),  # no error is one
        ([1, float("nan")], [2, 2], 1),
        ([], [2, 2], 0),
    ],
)
def test_useful_horizon_ends_where_a_copy_is_as_good(error, baseline, steps) -> None:
    assert steps_better(np.array(error, float), np.array(baseline, float)) == steps


def test_the_same_seed_gives_the_same_report() -> None:
    oracle = OracleModel(CartPole())
    model = CopyModel(CartPole())
    told = [evaluate_model(model, rows(), seed=3, reference=oracle).to_json() for _ in range(2)]
    for one in told:
        one.pop("latency")
    assert told[0] == told[1]


def test_random_actions_are_of_their_kind() -> None:
    discrete = random_actions(Space(kind="discrete", shape=(5,), classes=(2, 3)), (4, 6), generator())
    assert discrete.shape == (4, 6, 5)
    assert (discrete[..., :2].sum(-1) == 1).all()
    assert (discrete[..., 2:].sum(-1) == 1).all()
    box = random_actions(Space(kind="box", shape=(3,)), (50,), generator())
    assert box.shape == (50, 3)
    assert -1 <= box.min() < -0.5 < 0.5 < box.max() <= 1


def test_too_few_rows_or_sequences_are_refused() -> None:
    one = simulated_rows(CartPole(), sequences=1, time=8, seen=2, seed=0)
    with pytest.raises(ConfigError, match="at least 2"):
        evaluate_model(OracleModel(CartPole()), one, seed=0)
    with pytest.raises(ConfigError, match="must be between 1 and 3"):
        simulated_rows(CartPole(), sequences=2, time=4, seen=4, seed=0)
