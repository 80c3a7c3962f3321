"""Worlds whose truth is known: functions from state and action to the next state, and what it looks like.

A simulator keeps no state of its own, so any moment can be started from again. One that keeps it inside is
wrapped by `Restored`. `oracle.OracleModel` puts either behind the contract of world models.
Letters: N worlds, S numbers of a state, K action components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from system.specs import ActionSpec, ArraySpec, EnvSpec

States = NDArray[np.float64]
Array = NDArray[Any]


class Simulator(Protocol):
    """N worlds at once. Every function is pure."""

    spec: EnvSpec
    state_size: int

    def reset(self, rng: np.random.Generator, n: int) -> States: ...  # [N, S], first rows of episodes
    def step(self, state: States, action: Array) -> tuple[States, NDArray[np.float32], NDArray[np.bool_]]:
        """State [N, S], action [N, K] as the environment takes it -> (next state, reward, terminal [N])."""
        ...

    def show(self, state: States) -> dict[str, Array]: ...  # observations [N, ...] of EnvSpec.obs
    def locate(self, obs: Mapping[str, Array], expected: States | None) -> States:
        """The state [N, S] that looks so; what cannot be seen is as `expected`, or as at a first row."""
        ...


class CartPole:
    """A pole hinged on a cart that is pushed left or right; S = 4: x, x', theta, theta' in SI units.

    Source: Barto, Sutton and Anderson, Neuronlike adaptive elements (1983); constants of CartPole-v1.
    """

    state_size = 4
    track_limit, angle_limit = 2.4, 12 * math.pi / 180  # metres, radians: beyond is the end

    def __init__(
        self,
        key: str = "vector",
        *,
        gravity: float = 9.8,
        cart_mass: float = 1.0,
        pole_mass: float = 0.1,
        half_length: float = 0.5,
        force: float = 10.0,
        seconds: float = 0.02,
    ) -> None:
        """`key`: name of the observation; masses in kg, lengths in m, force in N, `seconds` per step."""
        self.spec = EnvSpec(
            name="CartPole-v1",
            obs={key: ArraySpec(shape=(4,), dtype="float32")},
            action=ActionSpec(kind="discrete", classes=(2,)),
        )
        self.key, self.gravity, self.force, self.seconds = key, gravity, force, seconds
        self.pole_mass, self.half_length = pole_mass, half_length
        self.mass = cart_mass + pole_mass

    def reset(self, rng: np.random.Generator, n: int) -> States:
        return rng.uniform(-0.05, 0.05, (n, 4))

    def step(self, state: States, action: Array) -> tuple[States, NDArray[np.float32], NDArray[np.bool_]]:
        _, speed, angle, spin = state.T
        push = np.where(action[:, 0] == 1, self.force, -self.force)
        cos, sin = np.cos(angle), np.sin(angle)
        moment = self.pole_mass * self.half_length
        drive = (push + moment * spin**2 * sin) / self.mass
        inertia = self.half_length * (4.0 / 3.0 - self.pole_mass * cos**2 / self.mass)
        twist = (self.gravity * sin - cos * drive) / inertia  # angular acceleration
        pull = drive - moment * twist * cos / self.mass
        # Explicit Euler: positions move with the speeds from before the push.
        change = np.stack([speed, pull, spin, twist], 1)
        after = state + self.seconds * change
        ended = (np.abs(after[:, 0]) > self.track_limit) | (np.abs(after[:, 2]) > self.angle_limit)
        return after, np.ones(len(state), np.float32), ended

    def show(self, state: States) -> dict[str, Array]:
        return {self.key: state.astype(np.float32)}

    def locate(self, obs: Mapping[str, Array], expected: States | None) -> States:
        del expected  # everything can be seen
        return np.asarray(obs[self.key], np.float64)


class Corridor:
    """A T-shaped corridor: a sign at its beginning tells which of the two arms at its end pays.

    Actions: back, forth, up, down. S = 3: place (0 .. length, then an arm), sign (-1 down, 1 up), done.
    The sign is shown at place 0 only, so whoever wants the reward has to remember it. Observations: `place`
    (discrete), `sign` (discrete: 0 nothing, 1 down, 2 up), `image` of one row of cells, the sign in red.
    """

    state_size = 3
    cell = 4  # pixels

    def __init__(self, length: int = 6) -> None:
        """`length`: forward steps from the sign to the arms."""
        self.length = length
        places = length + 2
        self.spec = EnvSpec(
            name="corridor",
            obs={
                "place": ArraySpec(shape=(1,), dtype="int32", kind="discrete", classes=places),
                "sign": ArraySpec(shape=(1,), dtype="int32", kind="discrete", classes=3),
                "image": ArraySpec(shape=(self.cell, self.cell * places, 3), dtype="uint8", kind="image"),
            },
            action=ActionSpec(kind="discrete", classes=(4,)),
        )

    def reset(self, rng: np.random.Generator, n: int) -> States:
        state = np.zeros((n, 3))
        state[:, 1] = rng.choice([-1.0, 1.0], n)
        return state

    def step(self, state: States, action: Array) -> tuple[States, NDArray[np.float32], NDArray[np.bool_]]:
        place, sign, done = state.T
        move = np.asarray(action)[:, 0]
        chose = (place == self.length) & (move >= 2) & (done == 0)
        walked = np.clip(place + (move == 1) - (move == 0), 0, self.length)
        after = np.where(chose, self.length + 1, np.where(done == 1, place, walked))
        right = np.where(move == 2, 1.0, -1.0) == sign
        reward = np.where(chose, np.where(right, 1.0, -1.0), 0.0).astype(np.float32)
        return np.stack([after, sign, np.where(chose, 1.0, done)], 1), reward, chose

    def show(self, state: States) -> dict[str, Array]:
        place, sign = state[:, 0].astype(np.int32), state[:, 1]
        shown = np.where(place == 0, np.where(sign > 0, 2, 1), 0).astype(np.int32)
        cells = np.zeros((len(state), self.length + 2, 3), np.uint8)
        cells[np.arange(len(state)), place, 1] = 255
        cells[np.arange(len(state)), place, 0] = 100 * shown
        wide = cells.repeat(self.cell, 1)[:, None].repeat(self.cell, 1)  # [N, cell, cell * places, 3]
        return {"place": place[:, None], "sign": shown[:, None], "image": wide}

    def locate(self, obs: Mapping[str, Array], expected: States | None) -> States:
        place, shown = (np.asarray(obs[key], np.int64)[:, 0] for key in ("place", "sign"))
        hidden = np.zeros(len(place)) if expected is None else expected[:, 1]
        sign = np.where(shown == 0, hidden, np.where(shown == 2, 1.0, -1.0))
        return np.stack([place.astype(np.float64), sign, (place == self.length + 1).astype(np.float64)], 1)


class Snapshots(Protocol):
    """One world that keeps its state inside, as most simulators do, and lets it be read and set."""

    spec: EnvSpec
    state_size: int

    def reset(self, seed: int) -> None: ...
    def get_state(self) -> States: ...  # [S]
    def set_state(self, state: States) -> None: ...
    def step(self, action: Array) -> tuple[float, bool]: ...  # [K] -> (reward, terminal)
    def show(self) -> dict[str, Array]: ...  # observations [...] of the state
    def locate(self, obs: Mapping[str, Array], expected: States | None) -> States: ...  # [...] -> [S]


class Restored:
    """A `Simulator` of one world with snapshots: every step sets its state, steps and reads it again."""

    def __init__(self, world: Snapshots) -> None:
        self.world, self.spec, self.state_size = world, world.spec, world.state_size

    def reset(self, rng: np.random.Generator, n: int) -> States:
        states = np.empty((n, self.state_size))
        for row in range(n):
            self.world.reset(int(rng.integers(2**31)))
            states[row] = self.world.get_state()
        return states

    def step(self, state: States, action: Array) -> tuple[States, NDArray[np.float32], NDArray[np.bool_]]:
        n = len(state)
        after, reward, terminal = np.empty_like(state), np.empty(n, np.float32), np.empty(n, np.bool_)
        for row in range(n):
            self.world.set_state(state[row])
            reward[row], terminal[row] = self.world.step(action[row])
            after[row] = self.world.get_state()
        return after, reward, terminal

    def show(self, state: States) -> dict[str, Array]:
        shown: list[dict[str, Array]] = []
        for row in state:
            self.world.set_state(row)
            shown.append({key: np.array(value) for key, value in self.world.show().items()})
        return {
            key: np.stack([one[key] for one in shown]) if shown else np.zeros((0, *spec.shape), spec.dtype)
            for key, spec in self.spec.obs.items()
        }

    def locate(self, obs: Mapping[str, Array], expected: States | None) -> States:
        n = len(next(iter(obs.values())))
        rows = [
            self.world.locate(
                {key: value[row] for key, value in obs.items()}, None if expected is None else expected[row]
            )
            for row in range(n)
        ]
        return np.stack(rows) if rows else np.zeros((0, self.state_size))


SIMULATORS: dict[str, type[CartPole]] = {"CartPole-v1": CartPole}
"""Simulators of environments that runs train on, by the name behind the backend's prefix."""


def simulator_of(env: str, spec: EnvSpec) -> Simulator | None:
    """The simulator of environment `env`, when one is shipped and shows what `spec` says."""
    kind = SIMULATORS.get(env.partition(":")[2])
    if kind is None or len(spec.obs) != 1:
        return None
    found = kind(next(iter(spec.obs)))
    same = [a.shape == b.shape for a, b in zip(found.spec.obs.values(), spec.obs.values(), strict=True)]
    return found if all(same) and found.spec.action == spec.action else None
