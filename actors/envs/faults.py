"""What can go wrong inside an environment, and how often it may before the actor gives up.

Adapters raise `EnvFault`; `wrappers.ContainedEnv` rebuilds and asks the `RestartBudget` whether it may.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal

from system.errors import ConfigError, EnvError

log = logging.getLogger(__name__)

FaultReason = Literal["crash", "hang", "non_finite", "malformed"]
FAULT_REASONS: tuple[FaultReason, ...] = ("crash", "hang", "non_finite", "malformed")


class EnvFault(EnvError):
    """An environment broke in a way that a rebuild may mend; `reason` labels the restart counter."""

    def __init__(self, reason: FaultReason, message: str) -> None:
        super().__init__(message)
        self.reason: FaultReason = reason


class RestartBudget:
    """Allows `max_restarts` rebuilds within any `window_seconds`, and counts them by reason."""

    def __init__(
        self,
        name: str,
        *,
        max_restarts: int = 10,
        window_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_restarts < 0 or window_seconds <= 0:
            raise ConfigError(
                f"max_restarts ({max_restarts}) must be >= 0 and restart_window ({window_seconds}) > 0; "
                "correct the env options"
            )
        self._name = name
        self._max = max_restarts
        self._window = window_seconds
        self._clock = clock
        self._times: deque[float] = deque(maxlen=max(max_restarts, 1))
        self.counts: Counter[str] = Counter()

    def spend(self, reason: FaultReason, cause: str) -> None:
        """Record one rebuild. Raises: EnvError naming the cause when the budget is used up."""
        now = self._clock()
        while self._times and now - self._times[0] > self._window:
            self._times.popleft()
        if len(self._times) >= self._max:
            raise EnvError(
                f"environment {self._name!r} broke {len(self._times) + 1} times within {self._window:g} s, "
                f"allowed are {self._max}; newest cause ({reason}): {cause}; "
                "mend the environment or raise the env option max_restarts"
            )
        self._times.append(now)
        self.counts[reason] += 1
        if self.counts[reason] == 1:  # once per cause; the counter tells the rest
            log.warning("environment rebuilt", extra={"env": self._name, "reason": reason, "cause": cause})
