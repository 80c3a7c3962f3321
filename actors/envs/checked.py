"""Checks every row and action of somebody else's VectorEnv against its own spec and our contract.

Letters: N environments, n rows of one recv.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from actors.envs.faults import EnvFault
from actors.envs.gate import SendGate
from system.errors import DreamfleetError
from system.experience import Step
from system.interfaces import VectorEnv
from system.specs import ArraySpec


class CheckedEnv:
    """A VectorEnv that lets no unsound row or action through."""

    def __init__(self, env: VectorEnv) -> None:
        self._env = env
        self.spec = env.spec
        self.num_envs = env.num_envs
        self._gate = SendGate(env.spec.action, env.num_envs)
        self._ended = np.ones(env.num_envs, np.bool_)  # [N], the next row must be is_first

    def start(self, seed: int) -> None:
        self._gate.reset()
        self._ended[:] = True
        self._env.start(seed)

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        action, ids = self._gate.take(action, env_id)
        self._env.send(action, ids)

    def recv(self, timeout: float) -> Step:
        """The next rows. Raises: EnvFault when they break the contract or the environment raised."""
        try:
            step = self._env.recv(timeout)
        except DreamfleetError:
            raise
        except Exception as error:  # whatever a stranger's simulator raises is a crash of that simulator
            raise EnvFault("crash", f"recv of {self.spec.name} raised {error!r}") from error
        check_rows(step, self.spec.obs, self.num_envs)
        missing = self._ended[step.env_id] & ~step.is_first
        if missing.any():
            raise EnvFault("malformed", f"env_id {step.env_id[missing].tolist()} must show is_first now")
        self._ended[step.env_id] = step.is_last
        self._gate.shown(step.env_id, step.is_last)
        return step

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        return self._env.render(env_id)

    def close(self) -> None:
        self._env.close()


def check_rows(step: Step, obs: Mapping[str, ArraySpec], num_envs: int) -> None:
    """Raise EnvFault unless rows [n] have the declared names, shapes, dtypes, ranges and flags."""
    ids = step.env_id
    n = len(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(np.unique(ids)) != n:
        raise EnvFault("malformed", f"env_id {ids.tolist()} must be distinct integers [n]")
    if n and (ids.min() < 0 or ids.max() >= num_envs):
        raise EnvFault("malformed", f"env_id {ids.tolist()} must lie in [0, {num_envs})")
    for name in ("reward", "is_first", "is_last", "is_terminal"):
        _check_array(name, getattr(step, name), (n,), "float32" if name == "reward" else "bool")
    if not np.isfinite(step.reward).all():
        raise EnvFault("non_finite", f"rewards {step.reward.tolist()} must be finite")
    if set(step.obs) != set(obs):
        raise EnvFault("malformed", f"observations {sorted(step.obs)} must be {sorted(obs)} as the spec says")
    for name, spec in obs.items():
        value = step.obs[name]
        _check_array(name, value, (n, *spec.shape), spec.dtype)
        if spec.kind == "discrete":
            index = value.astype(np.int64)
            if n and (index.min() < 0 or index.max() >= spec.classes):
                raise EnvFault("malformed", f"observation {name!r} lies outside [0, {spec.classes})")
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            raise EnvFault("non_finite", f"observation {name!r} holds NaN or infinity")
    _check_flags(step)


def _check_array(name: str, value: NDArray[np.generic], shape: tuple[int, ...], dtype: str) -> None:
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.dtype(dtype):
        got = f"{np.shape(value)} {getattr(value, 'dtype', type(value).__name__)}"
        raise EnvFault("malformed", f"{name!r} is {got}, must be {shape} {dtype}")


def _check_flags(step: Step) -> None:
    if (step.is_terminal & ~step.is_last).any():
        raise EnvFault("malformed", "is_terminal without is_last: a terminal row must be the last one")
    if (step.is_first & step.is_last).any():
        raise EnvFault("malformed", "a row is both is_first and is_last: an episode has at least two rows")
    if (step.reward[step.is_first] != 0).any():
        raise EnvFault("malformed", "an is_first row has a reward: nothing was done yet, it must be 0")
