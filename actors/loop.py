"""The environment loop: a generator that lets a policy act and hands out finished rows.

Reading order: system/experience -> here -> replay. Everything else (staging, appending, weights,
evaluation) wraps this loop. Letters: N environments, n rows of one recv.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from system.errors import DivergedError
from system.experience import EpisodeStats, Step
from system.interfaces import Mode, Policy, VectorEnv
from system.weights import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStep:
    """Finished rows. Made by env_loop, taken by Actor and evaluate."""

    step: Step
    action: NDArray[np.generic]  # [n, A], zeros on is_last rows
    extras: Mapping[str, NDArray[np.generic]]  # the policy's columns, each [n, ...]
    version: PolicyVersion  # of the policy that chose `action`
    episodes: tuple[EpisodeStats, ...]  # those that ended with these rows
    env_seconds: float  # inside send and recv
    policy_seconds: float  # inside act


class EpisodeTracker:
    """Running return and length of each environment; an abandoned episode leaves no trace."""

    def __init__(self, num_envs: int) -> None:
        self._score = np.zeros(num_envs, np.float64)  # [N]
        self._length = np.zeros(num_envs, np.int64)  # [N]

    def update(self, step: Step, version: PolicyVersion) -> tuple[EpisodeStats, ...]:
        """Count rows [n] and return the episodes they end."""
        ids = step.env_id
        if step.is_first.any():
            begun = ids[step.is_first]
            self._score[begun] = 0
            self._length[begun] = -1
        self._score[ids] += step.reward
        self._length[ids] += 1
        if not step.is_last.any():
            return ()
        return tuple(
            EpisodeStats(
                env_id=int(ids[row]),
                length=int(self._length[ids[row]]),
                score=float(self._score[ids[row]]),
                terminal=bool(step.is_terminal[row]),
                policy_version=version.encoded,
            )
            for row in np.flatnonzero(step.is_last)
        )


def env_loop(
    env: VectorEnv, policy: Policy, mode: Mode, *, timeout: float = 60.0
) -> Generator[LoopStep, None, None]:
    """Yield rows of a started environment for ever; the environments step while the caller works.

    `timeout` bounds one wait for rows, in seconds. The policy may load newer weights between yields.
    Raises: DivergedError for a non-finite action; whatever the environment raises.
    """
    carry = policy.initial(env.num_envs)
    tracker = EpisodeTracker(env.num_envs)
    while True:
        begin = time.perf_counter()
        step = env.recv(timeout)
        received = time.perf_counter()
        version = policy.version
        action, carry, extras = policy.act(carry, step, mode)
        if action.dtype.kind == "f" and not np.isfinite(action).all():
            raise DivergedError(
                f"policy version {tuple(version)} chose a non-finite action; "
                "its weights or its carry hold NaN or infinity: roll the learner back"
            )
        acted = time.perf_counter()
        if step.is_last.any():
            live = ~step.is_last
            action = np.where(live[:, None], action, np.zeros((), action.dtype))
            env.send(action[live], step.env_id[live])
        else:
            env.send(action, step.env_id)
        sent = time.perf_counter()
        yield LoopStep(
            step=step,
            action=action,
            extras=extras,
            version=version,
            episodes=tracker.update(step, version),
            env_seconds=received - begin + sent - acted,
            policy_seconds=acted - received,
        )
