"""Adapter `envpool:<Task>`: a C++ pool of environments behind our VectorEnv. `envpool_door` imports it.

A pool must be built in the process that uses it: a forked copy hangs. Its recv blocks in C++ without a
deadline, and bad input aborts the process, so every send is checked here and a hang is left to the
heartbeat of whoever runs the actor. Native NEXT_STEP autoreset gives our rows as they are.
Letters: N environments, n rows of one call.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.envs.envpool_door import load_envpool, prepare_pixels, unknown_task
from actors.envs.faults import EnvFault
from actors.envs.gate import SendGate
from actors.envs.options import EnvOptions
from actors.envs.spaces import ActionCodec, ObsCodec, with_default_drops
from system.errors import ConfigError, EnvError
from system.experience import Step
from system.specs import EnvSpec

log = logging.getLogger(__name__)

SEEDS = 2**31  # seeds are a C++ int


class EnvpoolVectorEnv:
    """`num_envs` environments of one envpool task; `batch_size` < num_envs makes it asynchronous.

    Rows of one env id always come in order; with batch_size the arrival order over ids is free.
    """

    def __init__(self, task: str, num_envs: int, *, options: EnvOptions, timeout: float = 60.0) -> None:
        """Read the task's spaces; no simulator is built before start.

        Raises: ConfigError for an unknown task or option, or envpool not installed; PreflightError
        when pixels are asked for and this machine cannot draw.
        """
        self._envpool = load_envpool()
        if task not in self._envpool.list_all_envs():
            raise ConfigError(unknown_task(task, self._envpool.list_all_envs()))
        self._task = task
        self.num_envs = num_envs
        self._repeat = options.action_repeat
        self._kwargs = _pool_kwargs(options)
        self._batch = int(self._kwargs.pop("batch_size", num_envs))
        if not 1 <= self._batch <= num_envs:
            raise ConfigError(f"env option batch_size ({self._batch}) must lie in [1, num_envs={num_envs}]")
        if self._kwargs.get("from_pixels"):
            prepare_pixels(task, self._kwargs, timeout)
        space, action_space = self._spaces()
        is_grid = task.startswith(("MiniGrid-", "BabyAI-"))
        options = with_default_drops(options, ("mission",) if is_grid else ())
        self._obs = ObsCodec(f"envpool:{task}", space, options)
        self._act = ActionCodec(f"envpool:{task}", action_space)
        self.spec = EnvSpec(name=f"envpool:{task}", obs=self._obs.spec, action=self._act.spec)
        self._gate = SendGate(self.spec.action, num_envs)
        self._ids = np.arange(num_envs, dtype=np.int32)
        self._zeros = np.zeros((num_envs, *self.spec.action.shape), self.spec.action.dtype)
        self._pool: Any = None
        self._clear()

    def _clear(self) -> None:
        n = self.num_envs
        self._gate.reset()
        self._ended = np.zeros(n, np.bool_)  # [N], newest row of this id was is_last
        self._unanswered = np.zeros(n, np.bool_)  # [N], is_last rows shown whose reset is not asked for yet
        self._flying = np.zeros(n, np.bool_)  # [N], sent and not received
        self._action = self._zeros.copy()  # [N, A], newest action of each id
        self._reward = np.zeros(n, np.float32)  # [N], sum within one action repeat
        self._count = np.zeros(n, np.int32)  # [N], simulator steps done of one action repeat

    def _spaces(self) -> tuple[Any, Any]:
        try:
            with warnings.catch_warnings():  # gymnasium warns about envpool's float64 bounds
                warnings.simplefilter("ignore")
                spec = self._envpool.make_spec(self._task, num_envs=self.num_envs, **self._kwargs)
                if int(spec.config.max_num_players) > 1:
                    raise ConfigError(
                        f"envpool:{self._task} has several players; only single-player tasks fit"
                    )
                return spec.gymnasium_observation_space, spec.gymnasium_action_space
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"envpool refuses {self._task} with options {sorted(self._kwargs)}: {error}; "
                "correct the env options (names are those of envpool.make)"
            ) from error

    def start(self, seed: int) -> None:
        """Build the pool anew; environment i is seeded with seed + i."""
        self.close()
        self._clear()
        seeds = [(seed + i) % SEEDS for i in range(self.num_envs)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._pool = self._envpool.make(
                    self._task,
                    env_type="gymnasium",
                    num_envs=self.num_envs,
                    batch_size=self._batch,
                    seed=seeds,
                    **self._kwargs,
                )
                _ = self._pool.observation_space  # built, with warnings, on first use
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise EnvError(
                f"envpool cannot build {self._task}: {error}; check its options and data"
            ) from error
        self._pool.async_reset()
        self._flying[:] = True
        self._ended[:] = True  # whatever comes first is a first row

    def send(self, action: NDArray[np.generic], env_id: NDArray[np.int32]) -> None:
        action, ids = self._gate.take(action, env_id)
        self._action[ids] = action
        if self._batch < self.num_envs:
            self._forward(ids)
        elif not self._gate.owed.any():
            # A second send before recv corrupts a synchronous pool, so all answers go out together.
            self._forward(self._ready())

    def _ready(self) -> NDArray[np.int32]:
        """Ids of a synchronous pool whose answers wait here; an asynchronous pool keeps none back."""
        if self._batch < self.num_envs:
            return self._ids[:0]
        return self._ids[~self._flying & ~self._unanswered]

    def _forward(self, ids: NDArray[np.int32]) -> None:
        """Send the actions of `ids` and zeros for rows that end an episode, in one call."""
        last = np.flatnonzero(self._unanswered).astype(np.int32)
        if len(last):
            self._action[last] = 0
            self._unanswered[last] = False
            ids = np.union1d(ids, last).astype(np.int32)
        if len(ids):
            self._reward[ids] = 0
            self._count[ids] = 0
            self._push(ids)

    def _push(self, ids: NDArray[np.int32]) -> None:
        action = self._action if len(ids) == self.num_envs else self._action[ids]
        self._flying[ids] = True
        self._pool.send(self._act.native(action), ids)

    def recv(self, timeout: float) -> Step:
        """The next rows. `timeout` cannot interrupt C++; see the module's note.

        Raises: EnvFault for rows that break the task's spec; EnvError when actions are owed.
        """
        if self._pool is None:
            raise EnvError(f"envpool:{self._task} was not started; call start(seed) first")
        if self._unanswered.any() and not (self._batch == self.num_envs and self._gate.owed.any()):
            self._forward(self._ready())
        flying = int(np.count_nonzero(self._flying))
        if flying < self._batch:
            raise EnvError(
                f"recv needs {self._batch} environments in flight, {flying} are: "
                f"answer env_id {np.flatnonzero(self._gate.owed).tolist()} first"
            )
        step = self._receive() if self._repeat == 1 else self._receive_repeated()
        self._gate.shown(step.env_id, step.is_last)
        self._unanswered[step.env_id] = step.is_last
        return step

    def _receive(self) -> Step:
        """One batch of rows straight from the pool."""
        obs, reward, terminated, truncated, info = self._pool.recv()
        ids = info["env_id"]
        n = len(ids)
        before = np.count_nonzero(self._flying)
        if n == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.num_envs or not self._flying[ids].all():
            raise EnvFault("malformed", f"envpool returned rows of env_id {ids.tolist()} nobody stepped")
        self._flying[ids] = False
        if before - np.count_nonzero(self._flying) != n:
            raise EnvFault("malformed", f"envpool returned env_id {ids.tolist()} with repeats")
        if reward.shape != (n,):
            raise EnvFault("malformed", f"envpool:{self._task} returned rewards of shape {reward.shape}")
        is_first = self._ended[ids]
        # Nothing was done yet, and tasks of the DeepMind Control suite leave there what memory held before.
        reward = np.where(is_first, np.float32(0), reward)
        if not np.isfinite(reward).all():
            raise EnvFault("non_finite", f"envpool:{self._task} returned reward {reward!r}")
        is_last = terminated | truncated
        self._ended[ids] = is_last
        return Step(
            env_id=ids,
            obs=self._obs.encode(obs, n, copy=False),  # every recv returns fresh arrays
            reward=reward.astype(np.float32, copy=False),
            is_first=is_first,
            is_last=is_last,
            is_terminal=terminated,
        )

    def _receive_repeated(self) -> Step:
        """Rows after `action_repeat` simulator steps or an episode's border, rewards summed.

        A synchronous pool waits until all ids are through, an asynchronous one passes on who is.
        """
        done: list[tuple[Step, NDArray[np.bool_]]] = []
        while True:
            step = self._receive()
            ids = step.env_id
            self._reward[ids] += step.reward
            self._count[ids] += 1
            through = step.is_first | step.is_last | (self._count[ids] >= self._repeat)  # [n]
            if through.any():
                done.append((step, through))
            if not through.all():
                self._push(ids[~through])
            if done and (self._batch < self.num_envs or not self._flying.any()):
                return self._merge(done)

    def _merge(self, parts: list[tuple[Step, NDArray[np.bool_]]]) -> Step:
        ids = np.concatenate([step.env_id[keep] for step, keep in parts])
        order = np.argsort(ids, kind="stable")

        def join(columns: list[NDArray[Any]]) -> NDArray[Any]:
            kept = [column[keep] for column, (_, keep) in zip(columns, parts, strict=True)]
            return np.concatenate(kept)[order]

        is_first = join([step.is_first for step, _ in parts])
        ids = ids[order]
        return Step(
            env_id=ids,
            obs={name: join([step.obs[name] for step, _ in parts]) for name in self.spec.obs},
            reward=np.where(is_first, np.float32(0), self._reward[ids]),
            is_first=is_first,
            is_last=join([step.is_last for step, _ in parts]),
            is_terminal=join([step.is_terminal for step, _ in parts]),
        )

    def render(self, env_id: int) -> NDArray[np.uint8] | None:
        """A frame [H, W, 3], or None unless the env option render_mode was rgb_array."""
        if self._pool is None or self._kwargs.get("render_mode") != "rgb_array":
            return None
        return np.asarray(self._pool.render(env_ids=[env_id])[0], np.uint8)

    def close(self) -> None:
        self._pool = None  # the pool's threads end with its last reference, not with its close()


def _pool_kwargs(options: EnvOptions) -> dict[str, Any]:
    kwargs = dict(options.backend)
    if options.time_limit is not None:
        kwargs["max_episode_steps"] = options.time_limit
    for name in ("img_height", "img_width", "render_width", "render_height"):
        if name in kwargs and (not isinstance(kwargs[name], int) or kwargs[name] < 1):
            raise ConfigError(f"env option {name} ({kwargs[name]!r}) must be an integer >= 1")
    if kwargs.get("from_pixels"):
        kwargs.setdefault("render_camera_id", 0)  # the suite's own camera; envpool's default flies freely
    return kwargs
