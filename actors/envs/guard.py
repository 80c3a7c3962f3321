"""A guard around one gymnasium environment: repeats actions, checks every sample, rebuilds what broke.

Sits inside the vector environment (and inside its worker process), so that one bad sub-environment
costs one episode, not the whole vector. Faults travel to the adapter in the step's info.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium

from actors.envs.faults import FAULT_REASONS, EnvFault, FaultReason
from actors.envs.options import EnvOptions
from actors.envs.spaces import ObsCodec
from system.errors import EnvError
from system.seeds import child_seed

FAULT = "dreamfleet_fault"  # info key: 1 + index into FAULT_REASONS
CAUSE = "dreamfleet_cause"  # info key: what happened, in words
REBUILD_ATTEMPTS = 3


class GuardedEnv(gymnasium.Env[Any, Any]):
    """One environment that cannot take its neighbours down.

    After a fault, step returns a fresh first observation with reward 0 and no flag set, and info
    names     the fault: the adapter turns that into an is_first row. The very first reset is not guarded.
    Observations are encoded here already, into the one form that vector environments batch well.

    """

    def __init__(self, name: str, make: Callable[[], gymnasium.Env[Any, Any]], options: EnvOptions) -> None:
        self._name = name
        self._make = make
        self._repeat = options.action_repeat
        self._env = make()
        self.action_space = self._env.action_space
        self.metadata = dict(self._env.metadata)  # vector environments write into it
        self.render_mode = self._env.render_mode
        self._codec = ObsCodec(name, self._env.observation_space, options)
        self.observation_space = self._codec.space()
        self._seed = 0
        self._rebuilds = 0
        self._worked = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._seed = seed
        reason: FaultReason
        try:
            return self._first(seed), {}
        except EnvFault as fault:
            reason, cause = fault.reason, str(fault)
        except Exception as error:  # whatever a stranger's simulator raises is a crash of that simulator
            reason, cause = "crash", f"reset raised {error!r}"
        if not self._worked:
            raise EnvError(f"first reset of {self._name}: {cause}")
        return self._restart(), _info(reason, cause)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reason: FaultReason
        try:
            return self._step(action)
        except EnvFault as fault:
            reason, cause = fault.reason, str(fault)
        except Exception as error:  # as in reset
            reason, cause = "crash", f"step raised {error!r}"
        return self._restart(), 0.0, False, False, _info(reason, cause)

    def _first(self, seed: int | None) -> Any:
        result = self._env.reset(seed=seed)
        if not isinstance(result, tuple) or len(result) != 2:
            raise EnvFault("malformed", f"reset returned {type(result).__name__}, must be (obs, info)")
        obs = self._codec.encode_one(result[0])
        self._worked = True
        return obs

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total, done, count = 0.0, False, 0
        obs: Any = None
        terminated: Any = False
        truncated: Any = False
        while count < self._repeat and not done:
            result = self._env.step(action)
            if not isinstance(result, tuple) or len(result) != 5:
                raise EnvFault(
                    "malformed",
                    "step must return (obs, reward, terminated, truncated, info)",
                )
            obs, reward, terminated, truncated, _ = result
            total += float(reward)
            done = bool(terminated or truncated)
            count += 1
        encoded = self._codec.encode_one(obs)
        if not math.isfinite(total):
            raise EnvFault("non_finite", f"reward is {total}, must be finite")
        return encoded, total, bool(terminated), bool(truncated), {}

    def _restart(self) -> Any:
        """Build anew and return a first observation. Raises: EnvError when that fails repeatedly."""
        cause = ""
        for _ in range(REBUILD_ATTEMPTS):
            self._rebuilds += 1
            with contextlib.suppress(Exception):  # it is broken: closing it may fail as well
                self._env.close()
            try:
                self._env = self._make()
                return self._first(child_seed(self._seed, "rebuild", self._rebuilds))
            except Exception as error:  # as in reset
                cause = repr(error)
        raise EnvError(f"{self._name} could not be rebuilt in {REBUILD_ATTEMPTS} attempts: {cause}")

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


def _info(reason: FaultReason, cause: str) -> dict[str, Any]:
    return {FAULT: 1 + FAULT_REASONS.index(reason), CAUSE: cause}


def faults_of(info: Mapping[str, Any], num_envs: int) -> list[tuple[int, FaultReason, str]]:
    """The (env id, reason, cause) of guarded environments that were rebuilt in this vector step."""
    if FAULT not in info:
        return []
    codes, mask = info[FAULT], info[f"_{FAULT}"]
    return [
        (env, FAULT_REASONS[int(codes[env]) - 1], str(info[CAUSE][env]))
        for env in range(num_envs)
        if mask[env] and codes[env]
    ]
