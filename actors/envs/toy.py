"""Numpy-only environments whose every row is known beforehand: the test bench of actors and replay.

`toy:counter` makes rows that are pure functions of (seed, env, episode, step), so whatever reaches a
store can be checked against `counter_row`. `toy:faulty` is the same with a fault injected.
Letters: N environments, n rows of one recv, S image side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.envs.checked import CheckedEnv
from actors.envs.gate import SendGate
from actors.envs.options import EnvOptions
from system.errors import ConfigError, EnvError, EnvTimeout
from system.experience import Step
from system.interfaces import VectorEnv
from system.specs import ActionSpec, ArraySpec, EnvSpec

Ints = NDArray[np.int64]
Array = NDArray[Any]
FAULTS = ("crash", "hang", "nan", "shape", "dtype", "flags")


def _mix(*parts: Ints | int) -> NDArray[np.uint64]:
    """A hash of integers, elementwise over broadcast arrays (multiply and xorshift)."""
    state = np.array([0x9E3779B97F4A7C15], np.uint64)
    for part in parts:
        state = (state ^ np.asarray(part, np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        state = state ^ (state >> np.uint64(29))
    return state


def episode_length(seed: int, env: Ints, episode: Ints, shortest: int, longest: int) -> Ints:
    """Index of an episode's last row [n], within [shortest, longest]."""
    return shortest + (_mix(seed, env, episode, 1) % np.uint64(longest - shortest + 1)).astype(np.int64)


def counter_row(seed: int, env: Ints, episode: Ints, step: Ints, *, side: int = 8) -> dict[str, Array]:
    """The observation, reward and flags `toy:counter` shows with default lengths; arguments are [n].

    vector [n, 5]: seed // 65536, seed % 65536, env, episode, step; image [n, S, S, 3]: hashed noise.
    """
    return _row(seed, env, episode, step, side, *_DEFAULT_LENGTHS)


_DEFAULT_LENGTHS = (3, 12)


def _row(seed: int, env: Ints, episode: Ints, step: Ints, side: int, low: int, high: int) -> dict[str, Array]:
    vector = np.stack(
        [np.full_like(env, seed >> 16), np.full_like(env, seed & 0xFFFF), env, episode, step], 1
    )
    first, last = step == 0, step == episode_length(seed, env, episode, low, high)
    reward = (_mix(seed, env, episode, step, 2) % np.uint64(1000)).astype(np.float32) / np.float32(1000)
    row: dict[str, Array] = {
        "vector": vector.astype(np.float32),
        "reward": np.where(first, np.float32(0), reward),
        "is_first": first,
        "is_last": last,
        "is_terminal": last & (_mix(seed, env, episode, 3) % np.uint64(2) == 0),
    }
    if side:
        pixel = np.arange(side * side * 3)
        noise = _mix(seed, env[:, None], episode[:, None], step[:, None], pixel)  # [n, S * S * 3]
        row["image"] = (noise >> np.uint64(7)).astype(np.uint8).reshape(-1, side, side, 3)
    return row


class CounterEnv:
    """N streams of predictable rows. `batch_size` < num_envs makes it answer a few at a time."""

    def __init__(
        self,
        num_envs: int,
        *,
        image_side: int = 8,
        shortest: int = _DEFAULT_LENGTHS[0],
        longest: int = _DEFAULT_LENGTHS[1],
        actions: int = 4,
        batch_size: int | None = None,
    ) -> None:
        """Raises: ConfigError for lengths or a batch that cannot be."""
        if not 1 <= shortest <= longest:
            raise ConfigError(f"toy:counter needs 1 <= shortest ({shortest}) <= longest ({longest})")
        batch = num_envs if batch_size is None else batch_size
        if not 1 <= batch <= num_envs:
            raise ConfigError(f"env option batch_size ({batch}) must lie in [1, num_envs={num_envs}]")
        obs = {"vector": ArraySpec(shape=(5,), dtype="float32")}
        if image_side:
            obs["image"] = ArraySpec(shape=(image_side, image_side, 3), dtype="uint8", kind="image")
        action = ActionSpec(kind="discrete", classes=(actions,))
        self.spec = EnvSpec(name="toy:counter", obs=obs, action=action)
        self.num_envs = num_envs
        self._side = image_side
        self._lengths = (shortest, longest)
        self._batch = batch
        self._gate = SendGate(action, num_envs)
        self._queue: list[int] = []  # env ids with a row to show, oldest first; at most N
        self._seed = 0
        self._episode = np.zeros(num_envs, np.int64)  # [N]
        self._step = np.zeros(num_envs, np.int64)  # [N]

    def start(self, seed: int) -> None:
        self._gate.reset()
        self._seed = seed
        self._episode[:] = 0
        self._step[:] = 0
        self._queue = list(range(self.num_envs))

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        _, ids = self._gate.take(action, env_id)
        self._step[ids] += 1
        self._queue.extend(ids.tolist())

    def recv(self, timeout: float) -> Step:
        """The next rows, at once. Raises: EnvError when actions are owed."""
        batch = min(self._batch, self.num_envs)
        if len(self._queue) < batch:
            owed = np.flatnonzero(self._gate.owed).tolist()
            raise EnvError(f"toy:counter has {len(self._queue)} rows of {batch}; answer env_id {owed} first")
        ids = np.array(sorted(self._queue[:batch]), np.int32)
        self._queue = self._queue[batch:]
        row = _row(
            self._seed, ids.astype(np.int64), self._episode[ids], self._step[ids], self._side, *self._lengths
        )
        ended = ids[row["is_last"]]
        self._episode[ended] += 1
        self._step[ended] = 0
        self._queue.extend(ended.tolist())
        self._gate.shown(ids, row["is_last"])
        return Step(
            env_id=ids,
            obs={name: row[name] for name in self.spec.obs},
            reward=row["reward"],
            is_first=row["is_first"],
            is_last=row["is_last"],
            is_terminal=row["is_terminal"],
        )

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        """The image of the newest row [S, S, 3]."""
        if not self._side:
            return None
        one = np.array([env_id])
        return counter_row(self._seed, one, self._episode[one], self._step[one], side=self._side)["image"][0]

    def close(self) -> None:
        self._queue = []


class FaultyEnv:
    """Shows CounterEnv's rows until recv number `at`, then breaks as `fault` says."""

    def __init__(self, env: CounterEnv, fault: str, at: int, more: Callable[[], bool]) -> None:
        """`more` says whether this life still breaks, so that a rebuilt one may behave.

        Raises: ConfigError for an unknown fault.
        """
        if fault not in FAULTS:
            raise ConfigError(f"env option fault ({fault!r}) must be one of {', '.join(FAULTS)}")
        self._env = env
        self._fault = fault
        self._at = at
        self._more = more
        self._received = 0
        self.spec = env.spec
        self.num_envs = env.num_envs

    def start(self, seed: int) -> None:
        self._received = 0
        self._env.start(seed)

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        self._env.send(action, env_id)

    def recv(self, timeout: float) -> Step:
        self._received += 1
        step = self._env.recv(timeout)
        return step if self._received <= self._at or not self._more() else self._break(step, timeout)

    def _break(self, step: Step, timeout: float) -> Step:
        obs = dict(step.obs)
        terminal = step.is_terminal
        if self._fault == "crash":
            raise RuntimeError("toy:faulty was told to crash")
        if self._fault == "hang":
            threading.Event().wait(timeout)
            raise EnvTimeout(f"toy:faulty did not answer within {timeout:g} s")
        if self._fault == "nan":
            obs["vector"] = np.full_like(obs["vector"], np.nan)
        elif self._fault == "shape":
            obs["vector"] = obs["vector"][:, :-1]
        elif self._fault == "dtype":
            obs["vector"] = obs["vector"].astype(np.float64)
        else:
            terminal = ~step.is_last
        return Step(
            env_id=step.env_id,
            obs=obs,
            reward=step.reward,
            is_first=step.is_first,
            is_last=step.is_last,
            is_terminal=terminal,
        )

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        return self._env.render(env_id)

    def close(self) -> None:
        self._env.close()


def builder(name: str, num_envs: int, options: EnvOptions) -> Callable[[], VectorEnv]:
    """What builds toy:counter or toy:faulty (options fault, at, times beside those of the counter).

    Raises: ConfigError for another name or option.
    """
    if name not in ("counter", "faulty"):
        raise ConfigError(f"there is no toy:{name}; there are toy:counter and toy:faulty")
    if options.action_repeat > 1 or options.time_limit is not None:
        raise ConfigError(f"toy:{name} knows no action_repeat or time_limit; use shortest and longest")
    kwargs = dict(options.backend)
    fault, at = str(kwargs.pop("fault", "crash")), int(kwargs.pop("at", 5))
    left = [int(kwargs.pop("times", 1))]  # shared by all lives

    def more() -> bool:
        left[0] -= 1
        return left[0] >= 0

    def build() -> VectorEnv:
        try:
            env = CounterEnv(num_envs, **kwargs)
        except TypeError as error:
            raise ConfigError(f"toy:{name} refuses its options: {error}; see actors.envs.toy") from error
        return env if name == "counter" else CheckedEnv(FaultyEnv(env, fault, at, more))

    return build
