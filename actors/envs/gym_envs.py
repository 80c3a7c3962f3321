"""Adapter `gym:<id>`: gymnasium environments and vector environments behind our VectorEnv.

All autoreset modes give the same rows. NEXT_STEP gives them as they are. SAME_STEP hides the last row
behind the next first one, so it becomes two rows, in two recvs. DISABLED waits for a reset by mask.
In the last two modes a recv may therefore bring only the first rows of ended episodes: the others'
actions wait until those are answered, because a vector steps as one.
Letters: N environments, n rows of one call.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from actors.envs.faults import EnvFault, RestartBudget
from actors.envs.gate import SendGate
from actors.envs.guard import GuardedEnv, faults_of
from actors.envs.options import EnvOptions
from actors.envs.spaces import ActionCodec, ObsCodec
from system.errors import ConfigError, EnvError
from system.experience import Step
from system.specs import EnvSpec

log = logging.getLogger(__name__)

Array = NDArray[Any]
Vectorization = Literal["sync", "async"]
SEEDS = 2**31
CLOSE_SECONDS = 2.0


GUARDED = EnvOptions(frame="hwc")
"""How to read a vector of guarded environments: the guard applied the user's options already."""


class GymVectorEnv:
    """A gymnasium vector environment of any known autoreset mode."""

    def __init__(
        self,
        name: str,
        vector: VectorEnv[Any, Any, Any],
        options: EnvOptions,
        budget: RestartBudget,
        *,
        timeout: float = 60.0,
    ) -> None:
        """`timeout` (seconds) bounds resets of an asynchronous vector.

        Raises: ConfigError for an unknown autoreset mode or spaces that have no array form.
        """
        self._vector = vector
        self._mode = autoreset_mode_of(name, vector)
        self._budget = budget
        self._timeout = timeout
        self.num_envs = int(vector.num_envs)
        self._obs = ObsCodec(name, vector.single_observation_space, options)
        self._act = ActionCodec(name, vector.single_action_space)
        self.spec = EnvSpec(name=name, obs=self._obs.spec, action=self._act.spec)
        self._gate = SendGate(self.spec.action, self.num_envs)
        self._ids = np.arange(self.num_envs, dtype=np.int32)
        self._clear()

    def _clear(self) -> None:
        self._gate.reset()
        self._ended = np.zeros(self.num_envs, np.bool_)  # [N], newest row shown was is_last
        self._action = np.zeros((self.num_envs, *self.spec.action.shape), self.spec.action.dtype)
        self._next_first: dict[str, Array] | None = None  # obs [N, ...] that hold first rows not shown yet
        self._in_flight = False
        self._started = False

    def start(self, seed: int) -> None:
        """Reset everything; environment i is seeded with seed + i."""
        if self._in_flight:
            self._wait(self._timeout)
        self._clear()
        obs, _ = self._reset(seed % (SEEDS - self.num_envs), None)
        self._next_first = self._obs.encode(obs, self.num_envs, copy=True)
        self._ended[:] = True
        self._started = True

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        action, ids = self._gate.take(action, env_id)
        self._action[ids] = action
        if not self._gate.owed.any() and not self._waits_for_first_rows():
            self._dispatch()

    def recv(self, timeout: float) -> Step:
        """The next rows. Only an asynchronous vector can be left after `timeout`.

        Raises: EnvFault when the vector crashed, hung or broke its spaces; EnvError when actions are owed.
        """
        if not self._started:
            raise EnvError(f"{self.spec.name} was not started; call start(seed) first")
        if self._waits_for_first_rows():
            step = self._first_rows()
        else:
            if self._gate.owed.any():
                owed = np.flatnonzero(self._gate.owed).tolist()
                raise EnvError(f"recv before env_id {owed} got their actions; answer every row once")
            self._dispatch()
            step = self._rows(*self._wait(timeout))
        self._gate.shown(step.env_id, step.is_last)
        return step

    def _waits_for_first_rows(self) -> bool:
        """Whether the next rows are first ones that need no step."""
        if self._next_first is not None:
            return True
        return self._mode is AutoresetMode.DISABLED and bool(self._ended.any())

    def _first_rows(self) -> Step:
        ids = self._ids[self._ended]
        if self._next_first is None:
            obs, info = self._reset(None, self._ended.copy())
            self._spend_faults(info)
            self._next_first = self._obs.encode(obs, self.num_envs, copy=True)
        n = len(ids)
        step = Step(
            env_id=ids,
            obs={name: rows[ids] for name, rows in self._next_first.items()},
            reward=np.zeros(n, np.float32),
            is_first=np.ones(n, np.bool_),
            is_last=np.zeros(n, np.bool_),
            is_terminal=np.zeros(n, np.bool_),
        )
        self._next_first = None
        self._ended[:] = False
        return step

    def _rows(self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Mapping[str, Any]) -> Step:
        """Rows [N] of one vector step."""
        columns = self._obs.encode(obs, self.num_envs, copy=True)
        rewards = self._column("reward", reward, "fiu").astype(np.float32)
        terminal = self._column("terminated", terminated, "b")
        is_last = terminal | self._column("truncated", truncated, "b")
        if not np.isfinite(rewards).all():
            raise EnvFault("non_finite", f"rewards {rewards.tolist()} must be finite")
        is_first = self._ended.copy()
        for env in self._spend_faults(info):
            is_first[env] |= not is_last[env]
        rewards[is_first] = 0
        if self._mode is AutoresetMode.SAME_STEP and is_last.any():
            self._next_first = {name: rows.copy() for name, rows in columns.items()}
            ids = self._ids[is_last]
            final = self._obs.encode_list(_final_observations(info, ids))
            for name, rows in columns.items():
                rows[ids] = final[name]
        self._ended = is_last.copy()
        return Step(
            env_id=self._ids,
            obs=columns,
            reward=rewards,
            is_first=is_first,
            is_last=is_last,
            is_terminal=terminal.copy(),
        )

    def _column(self, name: str, value: Any, kinds: str) -> Array:
        column = np.asarray(value)
        if column.shape != (self.num_envs,) or column.dtype.kind not in kinds:
            raise EnvFault(
                "malformed",
                f"{name} is {column.dtype} {column.shape}, must be {kinds} [{self.num_envs}]",
            )
        return column

    def _spend_faults(self, info: Mapping[str, Any]) -> list[int]:
        """Charge the budget for guarded environments that were rebuilt; returns their ids."""
        faults = faults_of(info, self.num_envs)
        for env, reason, cause in faults:
            self._budget.spend(reason, f"environment {env}: {cause}")
        return [env for env, _, _ in faults]

    def _dispatch(self) -> None:
        """Let an asynchronous vector begin its step; a synchronous one steps in _wait."""
        if isinstance(self._vector, AsyncVectorEnv) and not self._in_flight:
            try:
                self._vector.step_async(self._native_actions())
            except (BrokenPipeError, ConnectionError, EOFError) as error:
                raise EnvFault("crash", f"a worker process of {self.spec.name} died ({error!r})") from error
            self._in_flight = True

    def _native_actions(self) -> Array:
        self._action[self._ended] = 0  # rows that end an episode are answered here
        return self._act.native(self._action)

    def _wait(self, timeout: float) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
        try:
            if not isinstance(self._vector, AsyncVectorEnv):
                return self._vector.step(self._native_actions())
            result = self._vector.step_wait(timeout)
            self._in_flight = False
            return result
        except EnvFault:
            raise
        except multiprocessing.TimeoutError as error:
            raise EnvFault("hang", f"{self.spec.name} did not step within {timeout:g} s") from error
        except Exception as error:  # whatever a stranger's simulator raises is a crash of that simulator
            raise EnvFault("crash", f"step of {self.spec.name} raised {error!r}") from error

    def _reset(self, seed: int | None, mask: NDArray[np.bool_] | None) -> tuple[Any, Any]:
        options = None if mask is None else {"reset_mask": mask}
        try:
            if not isinstance(self._vector, AsyncVectorEnv):
                return self._vector.reset(seed=seed, options=options)
            self._vector.reset_async(seed=seed, options=options)
            return self._vector.reset_wait(self._timeout)
        except EnvFault:
            raise
        except multiprocessing.TimeoutError as error:
            raise EnvFault("hang", f"{self.spec.name} did not reset within {self._timeout:g} s") from error
        except Exception as error:  # as in _wait
            raise EnvFault("crash", f"reset of {self.spec.name} raised {error!r}") from error

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        """A frame [H, W, 3] when the env option render_mode is rgb_array and no step is in flight."""
        if self._vector.render_mode != "rgb_array" or self._in_flight:
            return None
        if isinstance(self._vector, SyncVectorEnv):
            return np.asarray(self._vector.envs[env_id].render(), np.uint8)
        frames: Any = self._vector.render()
        return None if frames is None else np.asarray(frames[env_id], np.uint8)

    def close(self) -> None:
        """Close; workers that do not end within CLOSE_SECONDS are killed."""
        if not isinstance(self._vector, AsyncVectorEnv):
            self._vector.close()
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(EnvFault):  # it may be closed because it hangs
            if self._in_flight:
                self._wait(CLOSE_SECONDS / 2)
        for pipe in self._vector.parent_pipes:
            with contextlib.suppress(OSError):  # a dead worker's pipe
                if pipe is not None and not pipe.closed:
                    pipe.send(("close", None))
        for process in self._vector.processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join(CLOSE_SECONDS)
        for pipe in self._vector.parent_pipes:
            if pipe is not None:
                pipe.close()
        self._vector.closed = True  # its own close would wait for answers that never come


def autoreset_mode_of(name: str, vector: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The declared mode. Raises: ConfigError when it is missing or unknown."""
    declared = vector.metadata.get("autoreset_mode")
    try:
        return declared if isinstance(declared, AutoresetMode) else AutoresetMode(declared)
    except ValueError:
        known = ", ".join(mode.name for mode in AutoresetMode)
        raise ConfigError(
            f"{name} declares autoreset mode {declared!r}, must be one of {known}: "
            "set metadata['autoreset_mode'] in the vector environment to what it really does"
        ) from None


def _final_observations(info: Mapping[str, Any], ids: NDArray[np.int32]) -> list[Any]:
    if "final_obs" not in info:
        raise EnvFault(
            "malformed", "SAME_STEP autoreset ended an episode without info['final_obs']; the row is lost"
        )
    final = info["final_obs"]
    if isinstance(final, Mapping):
        return [{key: values[i] for key, values in final.items()} for i in ids]
    return [final[i] for i in ids]


def vectorize(
    name: str,
    make: Callable[[], gymnasium.Env[Any, Any]],
    num_envs: int,
    options: EnvOptions,
    *,
    vectorization: Vectorization,
    autoreset: AutoresetMode,
    context: str,
) -> VectorEnv[Any, Any, Any]:
    """A guarded gymnasium vector of `num_envs` environments.

    async steps each one in a process of its own, started by `context` (never fork: threads of gRPC
    would be copied mid-flight). Only there can a hang or a segfault be survived.
    """
    makers: Sequence[Callable[[], Any]] = [partial(GuardedEnv, name, make, options)] * num_envs
    try:
        if vectorization == "sync":
            return SyncVectorEnv(makers, copy=False, autoreset_mode=autoreset)
        return AsyncVectorEnv(makers, copy=False, context=context, autoreset_mode=autoreset)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"gymnasium cannot make a vector of {name}: {error}") from error
    except (EOFError, ConnectionError) as error:
        raise EnvError(
            f"a worker process of {name} died while it started ({error!r}); if this is a script of yours, "
            "put its code under `if __name__ == '__main__':`"
        ) from error
