"""Worlds whose equations are shipped, against rows worked out by hand; the wrapper of stateful ones."""

import math

import numpy as np
import pytest

from learner.evaluation.simulators import CartPole, Corridor, Restored, simulator_of
from system.specs import ActionSpec, ArraySpec, EnvSpec

LEFT, RIGHT = np.array([[0]], np.int32), np.array([[1]], np.int32)


def test_a_resting_pole_falls_against_the_push() -> None:
    state, reward, terminal = CartPole().step(np.zeros((1, 4)), RIGHT)
    drive = 10.0 / 1.1
    twist = -drive / (0.5 * (4.0 / 3.0 - 0.1 / 1.1))
    pull = drive - 0.1 * 0.5 * twist / 1.1
    np.testing.assert_allclose(state, [[0.0, 0.02 * pull, 0.0, 0.02 * twist]], rtol=1e-12)
    assert reward.tolist() == [1.0]
    assert not terminal.any()


def test_left_mirrors_right() -> None:
    state = np.array([[0.3, -0.4, 0.1, 0.7]])
    right, left = CartPole().step(state, RIGHT)[0], CartPole().step(-state, LEFT)[0]
    np.testing.assert_allclose(right, -left, rtol=1e-12)


@pytest.mark.parametrize(
    ("place", "ended"),
    [
        ([2.39, 0, 0, 0], False),
        ([2.41, 0, 0, 0], True),
        ([-2.41, 0, 0, 0], True),
        ([0, 0, 0.2, 0], False),
        ([0, 0, math.radians(12.1), 0], True),
        ([0, 0, -math.radians(12.1), 0], True),
    ],
)
def test_an_episode_ends_beyond_the_track_or_the_angle(place: list[float], ended: bool) -> None:
    # One step moves neither cart nor pole when both rest: positions move with the speeds before the push.
    assert CartPole().step(np.array([place], np.float64), LEFT)[2].tolist() == [ended]


def test_other_physics_fall_otherwise() -> None:
    state = np.array([[0.0, 0.0, 0.1, 0.0]])
    normal, heavy = (CartPole(gravity=g).step(state, RIGHT)[0] for g in (9.8, 19.6))
    assert heavy[0, 3] > normal[0, 3]


def test_the_corridor_pays_the_arm_that_its_sign_told() -> None:
    world = Corridor(length=2)
    state = np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    assert world.show(state)["sign"].tolist() == [[2], [1]]
    forth, up = np.array([[1], [1]]), np.array([[2], [2]])
    for _ in range(2):
        state, reward, terminal = world.step(state, forth)
        assert reward.tolist() == [0.0, 0.0]
        assert not terminal.any()
        assert world.show(state)["sign"].tolist() == [[0], [0]]  # nothing to be seen any more
    state, reward, terminal = world.step(state, up)
    assert reward.tolist() == [1.0, -1.0]
    assert terminal.all()
    assert world.step(state, up)[1].tolist() == [0.0, 0.0]


def test_the_corridor_has_walls_and_arms_only_at_its_end() -> None:
    world = Corridor(length=3)
    state = np.array([[0.0, 1.0, 0.0]])
    for action in (0, 2, 3):
        assert world.step(state, np.array([[action]]))[0][0, 0] == 0.0
    image = world.show(state)["image"]
    assert image.shape == (1, 4, 4 * 5, 3)
    assert image[0, 0, 0].tolist() == [200, 255, 0]


def test_what_cannot_be_seen_is_as_expected() -> None:
    world = Corridor()
    hidden = world.show(np.array([[3.0, 1.0, 0.0]]))
    assert world.locate(hidden, np.array([[9.0, 1.0, 0.0]])).tolist() == [[3.0, 1.0, 0.0]]
    assert world.locate(hidden, None).tolist() == [[3.0, 0.0, 0.0]]
    sign = world.show(np.array([[0.0, -1.0, 0.0]]))
    assert world.locate(sign, np.array([[0.0, 1.0, 0.0]])).tolist() == [[0.0, -1.0, 0.0]]


class OneCart:
    """A cart-pole that keeps its state inside."""

    def __init__(self) -> None:
        self._world = CartPole()
        self.spec, self.state_size = self._world.spec, 4
        self._state = np.zeros(4)

    def reset(self, seed):
        self._state = self._world.reset(np.random.default_rng(seed), 1)[0]

    def get_state(self):
        return self._state

    def set_state(self, state):
        self._state = np.array(state)

    def step(self, action):
        states, reward, terminal = self._world.step(self._state[None], action[None])
        self._state = states[0]
        return float(reward[0]), bool(terminal[0])

    def show(self):
        return {key: value[0] for key, value in self._world.show(self._state[None]).items()}

    def locate(self, obs, expected):
        return self._world.locate({key: value[None] for key, value in obs.items()}, None)[0]


def test_a_stateful_world_answers_like_a_pure_one() -> None:
    rng = np.random.default_rng(0)
    pure, wrapped = CartPole(), Restored(OneCart())
    state = rng.normal(0, 0.1, (5, 4))
    action = rng.integers(0, 2, (5, 1))
    for ours, theirs in zip(wrapped.step(state, action), pure.step(state, action), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(wrapped.show(state)["vector"], pure.show(state)["vector"])
    np.testing.assert_array_equal(wrapped.locate(pure.show(state), None), pure.locate(pure.show(state), None))
    assert wrapped.reset(rng, 3).shape == (3, 4)
    assert wrapped.show(state[:0])["vector"].shape == (0, 4)


def test_a_simulator_is_found_by_environment_and_by_what_it_shows() -> None:
    spec = EnvSpec(
        name="CartPole-v1",
        obs={"seen": ArraySpec(shape=(4,), dtype="float32")},
        action=ActionSpec(kind="discrete", classes=(2,)),
    )
    for name in ("gym:CartPole-v1", "envpool:CartPole-v1"):
        found = simulator_of(name, spec)
        assert found is not None
        assert list(found.spec.obs) == ["seen"]
    assert simulator_of("gym:Pendulum-v1", spec) is None
    other = EnvSpec(name="x", obs={"seen": ArraySpec(shape=(3,), dtype="float32")}, action=spec.action)
    assert simulator_of("gym:CartPole-v1", other) is None
