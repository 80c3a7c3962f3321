"""Insert credit: how the limiter's budget is split among shards and brought to them.

Between `replay.governor` (how many rows in all) and `replay.shard` (each waits for its own grant). Credit
is conserved: a row is promised to one shard at a time. What one shard holds unused is given to
another only after the first one has heard that it is taken back, or has not answered for DOUBT_SECONDS.
So all shards together insert at most

    budget + the unused credit of shards that were given up as dead and come back before they are told

rows. A shard that does not answer gets nothing until it acknowledges a grant again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from system.errors import DreamfleetError

log = logging.getLogger(__name__)

UNLIMITED = 1 << 62
"""A grant no shard reaches."""
DEAD_SECONDS = 1.0
"""How long a shard that failed to take a grant is left alone."""
DOUBT_SECONDS = 2.0
"""How long credit of a shard that does not answer is kept from the others."""
SLOW_SECONDS = 0.5
"""How long a shard may take to acknowledge before it gets nothing more."""
REPEAT_SECONDS = 1.0
"""How often grants are sent although they did not change: a restarted shard has forgotten its own."""


class GrantTaker(Protocol):
    """A shard, as far as credit is concerned; `grant` returns promptly or raises a DreamfleetError."""

    def grant(self, max_inserted: int) -> None: ...


@runtime_checkable
class DistantGrantTaker(GrantTaker, Protocol):
    """A shard behind a wire: `grant` returns before the shard has heard it."""

    @property
    def ceiling(self) -> int:
        """The largest grant the shard may be acting on now."""
        ...

    @property
    def settled(self) -> bool:
        """The newest grant was acknowledged."""
        ...


def split_free(free: int, waiting: Mapping[int, int]) -> dict[int, int]:
    """Each shard's share of `free` rows of credit; `waiting` are the rows held back, by shard that is up.

    It goes to the shards with waiting appends, evenly; to all when none waits. So an idle shard cannot
    hold back credit that another one needs.
    """
    takers = sorted(k for k, rows in waiting.items() if rows > 0) or sorted(waiting)
    free = max(0, free)
    shares = dict.fromkeys(waiting, 0)
    for order, k in enumerate(takers):
        shares[k] = free // len(takers) + (order < free % len(takers))
    return shares


class _Line:
    """What is known of one shard's credit."""

    def __init__(self, index: int, control: GrantTaker) -> None:
        self.index = index
        self.control = control
        self.up = True
        self.leaving = False
        self.failures = 0
        self._sent = -1
        self._repeat_at = 0.0
        self._ceiling = 0
        self._unsettled_since: float | None = None
        self._failed_since: float | None = None
        self._retry_at = 0.0

    @property
    def ceiling(self) -> int:
        """Lifetime rows the shard may believe it can reach."""
        if isinstance(self.control, DistantGrantTaker):
            return self.control.ceiling
        return self._ceiling

    @property
    def settled(self) -> bool:
        if isinstance(self.control, DistantGrantTaker):
            return self.control.settled
        return self._failed_since is None

    def held(self, inserted: int, now: float) -> int:
        """Rows the shard may still insert unasked; 0 once it counts as dead."""
        if self._failed_since is not None and now - self._failed_since >= DOUBT_SECONDS:
            return 0
        return max(0, self.ceiling - inserted)

    def look(self, now: float) -> None:
        """Give up a shard that is slow to acknowledge; count it as up again once it has."""
        if self._sent < 0:
            return
        if self.settled:
            if not self.up and not self.leaving:
                log.info("shard takes grants again", extra={"shard": self.index})
            self.up = not self.leaving
            self._unsettled_since = self._failed_since = None
            return
        if self._unsettled_since is None:
            self._unsettled_since = now
        if now - self._unsettled_since >= SLOW_SECONDS:
            self.up = False
            self._failed_since = self._failed_since or self._unsettled_since

    def gone(self, now: float) -> bool:
        """True for a leaving shard that holds no credit any more."""
        doubted = self._failed_since is not None and now - self._failed_since >= DOUBT_SECONDS
        return self.leaving and (doubted or (self._sent >= 0 and self.settled))

    def send(self, grant: int, now: float) -> None:
        """Bring the shard to `grant`, unless it was told so a moment ago or is left alone now."""
        if now < self._retry_at or (grant == self._sent and now < self._repeat_at):
            return
        try:
            self.control.grant(grant)
        except DreamfleetError as error:
            self._fail(now, error)
            return
        self._sent, self._ceiling = grant, grant
        self._repeat_at = now + REPEAT_SECONDS
        if not isinstance(self.control, DistantGrantTaker):
            self._failed_since = None

    def send_again(self) -> None:
        self._sent = -1

    def leave(self) -> None:
        self.leaving, self.up = True, False
        self.send_again()

    def _fail(self, now: float, error: DreamfleetError) -> None:
        self.failures += 1
        if self._failed_since is None:
            self._failed_since = now if self._unsettled_since is None else self._unsettled_since
            log.warning("shard does not take grants", extra={"shard": self.index, "cause": str(error)})
        self.up = False
        self._sent = -1
        self._retry_at = now + DEAD_SECONDS


class GrantSplitter:
    """Sends each shard its part of the insert budget and takes back what others need more."""

    def __init__(self, controls: Sequence[GrantTaker]) -> None:
        """`controls[k]` reaches shard k."""
        self._lines = {k: _Line(k, control) for k, control in enumerate(controls)}
        self._failures_gone = 0

    @property
    def shards(self) -> list[int]:
        """Shards that credit is sent to."""
        return sorted(k for k, line in self._lines.items() if not line.leaving)

    @property
    def failures(self) -> int:
        """Grants that did not arrive."""
        return self._failures_gone + sum(line.failures for line in self._lines.values())

    def answers(self, shard: int) -> bool:
        """False while a shard is left alone because it does not take grants."""
        line = self._lines.get(shard)
        return line is not None and line.up and not line.leaving

    def ceiling(self, shard: int) -> int:
        """Lifetime rows the shard may believe it can reach, 0 when it was told nothing."""
        line = self._lines.get(shard)
        return 0 if line is None else line.ceiling

    def join(self, shard: int, control: GrantTaker) -> None:
        """Send credit to one more shard, or to a shard by another way than before."""
        self._lines[shard] = _Line(shard, control)

    def leave(self, shard: int) -> None:
        """Send no more credit to a shard; what it holds is taken back before others get it."""
        if shard in self._lines:
            self._lines[shard].leave()

    def send(self, free: int, inserted: Mapping[int, int], waiting: Mapping[int, int], now: float) -> None:
        """Distribute `free` rows of credit over the shards, by what they inserted and hold back."""
        for shard in [k for k, line in self._lines.items() if line.gone(now)]:
            self._failures_gone += self._lines.pop(shard).failures
        lines = self._lines.values()
        for line in lines:
            line.look(now)
        shares = split_free(free, {line.index: waiting.get(line.index, 0) for line in lines if line.up})
        targets = {k: inserted.get(k, 0) + shares.get(k, 0) for k in self._lines}
        for line in lines:
            if not line.up or line.ceiling >= targets[line.index]:
                line.send(targets[line.index], now)
        room = max(0, free) - self._held(lines, inserted, now)
        for line in lines:
            if line.up and room > 0 and line.ceiling < targets[line.index]:
                # A ceiling below what was inserted promises nothing and holds nothing.
                base = max(line.ceiling, inserted.get(line.index, 0))
                more = min(targets[line.index] - base, room)
                room -= more
                line.send(base + more, now)

    def forget(self) -> None:
        """Send every grant anew next time, whatever was sent before."""
        for line in self._lines.values():
            line.send_again()

    @staticmethod
    def _held(lines: Iterable[_Line], inserted: Mapping[int, int], now: float) -> int:
        return sum(line.held(inserted.get(line.index, 0), now) for line in lines)
