"""Keeps an actor's policy fresh: asks the weight source at intervals, loads what is newer, knows the lag.

Between the parameter server (system.params) and Policy.load. Until the first weights it plays at random.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.random_policy import RandomPolicy
from system.errors import ConfigError, DeadlineError, InfrastructureError, IntegrityError
from system.experience import Step
from system.interfaces import Mode, Policy, WeightSource
from system.metrics import Metrics
from system.weights import NO_VERSION, PolicyVersion, Weights

log = logging.getLogger(__name__)

MAX_BACKOFF = 32  # times pull_seconds between tries at a silent source
WAITING_PULL_SECONDS = 0.1  # pause between tries while nothing else can be done


class WarmingPolicy:
    """Random until the first weights arrive, the real policy from then on."""

    def __init__(self, warmup: RandomPolicy, policy: Policy) -> None:
        self._warmup = warmup
        self._policy = policy
        self.version: PolicyVersion = policy.version
        self.columns = policy.columns

    def initial(self, num_envs: int) -> Any:
        return self._policy.initial(num_envs)

    def act(
        self, carry: Any, step: Step, mode: Mode
    ) -> tuple[NDArray[np.generic], Any, dict[str, NDArray[np.generic]]]:
        if self.version > NO_VERSION:
            return self._policy.act(carry, step, mode)
        action, _, extras = self._warmup.act(None, step, mode)
        return action, carry, extras

    def load(self, weights: Weights) -> None:
        self._policy.load(weights)
        self.version = weights.version


class PolicyFeed:
    """Pulls weights for one policy. Versions never go back. Times are seconds."""

    def __init__(
        self,
        policy: Policy,
        source: WeightSource,
        *,
        pull_seconds: float,
        pull_timeout: float,
        wait_for_policy: bool,
        max_weights_age: float | None,
        metrics: Metrics | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_weights_age` forbids acting while the source is silent for longer.

        Raises: ConfigError for times that cannot be.
        """
        if pull_seconds <= 0 or pull_timeout <= 0:
            raise ConfigError(
                f"pull_seconds ({pull_seconds}) and pull_timeout ({pull_timeout}) must be > 0; "
                "correct the actor's settings"
            )
        self.lag = 0  # versions missed when the newest weights arrived
        self._policy = policy
        self._source = source
        self._pull_seconds = pull_seconds
        self._pull_timeout = pull_timeout
        self._wait_for_policy = wait_for_policy
        self._max_weights_age = max_weights_age
        self._metrics = metrics
        self._clock = clock
        self._backoff = 1
        self._answered = self.next_pull = clock()

    @property
    def age(self) -> float:
        """Seconds since the source last answered."""
        return self._clock() - self._answered

    @property
    def must_wait(self) -> bool:
        """Whether acting is not allowed: no weights yet, or none heard of for too long."""
        if self._wait_for_policy and self._policy.version == NO_VERSION:
            return True
        return self._max_weights_age is not None and self.age > self._max_weights_age

    def pull(self) -> None:
        """Ask once and load what is newer; a silent source is asked ever less often."""
        try:
            newer = self._source.latest(self._policy.version, self._pull_timeout)
        except (DeadlineError, InfrastructureError, IntegrityError) as error:
            if self._backoff == 1:  # once per silence
                log.warning("weights not fetched", extra={"error": str(error)})
            self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        else:
            self._answered = self._clock()
            self._backoff = 1
            if newer is not None and newer.version > self._policy.version:
                self._load(newer)
        pause = self._pull_seconds * self._backoff
        self.next_pull = self._clock() + (min(pause, WAITING_PULL_SECONDS) if self.must_wait else pause)

    def _load(self, newer: Weights) -> None:
        used = self._policy.version
        self.lag = newer.version.counter - used.counter if newer.version.epoch == used.epoch else 0
        self._policy.load(newer)
        if self._metrics is not None:
            self._metrics["actor_policy_lag_versions"].observe(self.lag)
            self._metrics["actor_policy_version"].set(newer.version.counter)
