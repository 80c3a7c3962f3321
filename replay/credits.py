"""Insert credit: how the limiter's budget is split among shards and sent to them.

Between `replay.limiter` (how many rows in all) and `replay.shard` (each waits for its own grant).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from system.errors import DreamfleetError

log = logging.getLogger(__name__)

UNLIMITED = 1 << 62
"""A grant no shard reaches."""
DEAD_SECONDS = 1.0
"""How long a shard that failed to take a grant is left alone."""
REPEAT_SECONDS = 1.0
"""How often grants are sent although they did not change."""


class GrantTaker(Protocol):
    """A shard, as far as credit is concerned; `grant` returns promptly or raises a DreamfleetError."""

    def grant(self, max_inserted: int) -> None: ...


def split_budget(
    budget: int, inserted: Sequence[int], waiting: Sequence[int], alive: Sequence[bool]
) -> list[int]:
    """Lifetime rows each shard may reach, so that together they reach `budget` and no more.

    What is free goes to the living shards with waiting appends, evenly; to all living ones when none
    waits. So an idle or dead shard cannot hold back credit that another one needs. All lists are [K].
    """
    free = max(0, budget - sum(inserted))
    takers = [k for k, up in enumerate(alive) if up and waiting[k] > 0] or [
        k for k, up in enumerate(alive) if up
    ]
    grants = list(inserted)
    for order, k in enumerate(takers):
        grants[k] += free // len(takers) + (order < free % len(takers))
    return grants


class GrantSplitter:
    """Sends each shard its part of the insert budget; one that does not answer is left alone a second."""

    def __init__(self, controls: Sequence[GrantTaker]) -> None:
        self._controls = list(controls)
        self._sent = [-1] * len(self._controls)
        self._dead_until = [0.0] * len(self._controls)
        self.failures = 0

    @property
    def size(self) -> int:
        return len(self._controls)

    def send(self, budget: int, inserted: Sequence[int], waiting: Sequence[int], now: float) -> None:
        """Grant so that all shards together may reach `budget`; `inserted` may name shards beyond ours."""
        elsewhere = sum(inserted[self.size :])
        alive = [now >= until for until in self._dead_until]
        grants = split_budget(budget - elsewhere, inserted[: self.size], waiting[: self.size], alive)
        order = sorted(range(self.size), key=lambda k: grants[k] - self._sent[k])  # take back before giving
        for k in order:
            if alive[k] and grants[k] != self._sent[k]:
                self._send_one(k, grants[k], now)

    def forget(self) -> None:
        """Send every grant anew next time: a restarted shard has forgotten its own."""
        self._sent = [-1] * self.size

    def _send_one(self, k: int, grant: int, now: float) -> None:
        try:
            self._controls[k].grant(grant)
        except DreamfleetError as error:
            self.failures += 1
            self._sent[k] = -1
            self._dead_until[k] = now + DEAD_SECONDS
            log.warning("shard does not take grants", extra={"shard": k, "cause": str(error)})
        else:
            self._sent[k] = grant
