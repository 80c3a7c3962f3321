"""Keeps the train ratio: takes what the shards report, sends them credit, books who waits for whom.

Between `replay.reader` (which looks and draws), `replay.limiter` (the rule) and `replay.credits` (who gets
how much of it). Clocks are arguments, so that a test can be a fleet for an hour in a second.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from replay.credits import GrantSplitter, GrantTaker
from replay.limiter import RateLimiter
from system.metrics import Metrics

log = logging.getLogger(__name__)

GRANT_SECONDS = 0.005
"""Least time between two rounds of grants while no append waits."""
HASTE_SECONDS = 0.001
"""The same while one does: taking credit back and giving it to another shard are two rounds."""
MARK_SECONDS = 1.0
WINDOW_SECONDS = 60
PACE_SECONDS = 10
LATE_SECONDS = 0.05
"""How long freed credit may take to reach a shard before it counts as late."""
LEAP_ROWS = 1 << 22
"""More rows than any shard inserts between two looks, some milliseconds apart, without a grant for them."""
WAITS = ("prefill", "learner", "actors", "grants")
"""Who waits: the learner for the prefill (or for a sequence to start), the learner for actors, actors for the
learner, actors for credit that was free long ago but has not reached their shard."""


class ShardCounters(Protocol):
    """What the governor reads of a shard; `replay.view.ShardView` has it."""

    @property
    def index(self) -> int: ...
    @property
    def inserted(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class InsertTally:
    """Rows inserted into all shards together: never falls, whoever leaves, dies, returns or lost rows.

    A shard that is away keeps its count. One that returns with more is counted on; one that returns with
    fewer (its rows were lost) counts from there, so what is gone is neither owed nor asked for again.
    """

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, int] = {}

    def count(self, inserted: Mapping[int, int]) -> int:
        """Take the lifetime rows of the shards in sight; return the total."""
        for shard, rows in inserted.items():
            seen = self._seen.get(shard, 0)
            if rows != seen:
                self.total += max(0, rows - seen)
                self._seen[shard] = rows
        return self.total

    def forgive(self, shard: int, rows: int) -> None:
        """What a shard inserted up to `rows` counts as seen and is not owed."""
        self._seen[shard] = rows

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "shards": {str(shard): rows for shard, rows in self._seen.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.total = int(state["total"])
        self._seen = {int(shard): int(rows) for shard, rows in state["shards"].items()}


class CounterGuard:
    """Lifetime rows of shards as their counters say, unless that cannot be.

    The counters lie in shared memory: one flipped bit would be a trillion rows owed for good. A count that is
    negative, or beyond both the shard's grant and a leap from the last one, is refused until the owner writes
    again: then it is what it was, or it goes on from the refused one, which the owner means then.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._most: dict[int, int] = {}  # believed so far
        self._refused: dict[int, int] = {}
        self.refusals = 0

    def check(self, shard: int, rows: int, granted: int, leap: int) -> tuple[int, int | None]:
        """(rows to believe, rows up to which none is owed, None usually). The first count, > 0, is believed.

        `granted`: lifetime rows the shard was allowed; `leap`: rows it may have inserted without our seeing.
        """
        last = self._last.get(shard, rows)
        forgiven = None
        if not 0 <= rows <= max(granted, last + leap):
            most, refused = self._most[shard], self._refused.get(shard, -1)
            if most <= rows <= most + leap:  # a fall that was damage is over
                forgiven = most
            elif 0 <= refused < rows <= refused + leap:
                forgiven = refused
            else:
                self._refuse(shard, rows, last)
                return last, None
        self._refused.pop(shard, None)
        self._last[shard], self._most[shard] = rows, max(rows, self._most.get(shard, 0))
        return rows, forgiven

    def _refuse(self, shard: int, rows: int, last: int) -> None:
        if shard not in self._refused:
            self.refusals += 1
            what = {"shard": shard, "inserted": rows, "believed": last}
            log.warning("insert counter refused: no shard inserts so many rows at once", extra=what)
        self._refused[shard] = rows


class _Mark(NamedTuple):
    time: float
    inserted: int
    trained: int
    seconds: tuple[float, ...]  # by WAITS


class WaitBooks:
    """Seconds that each side waited, and rates and ratio over the last minute."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(WAITS, 0.0)
        self._now: _Mark | None = None
        self._waiting: frozenset[str] = frozenset()
        self._marks: deque[_Mark] = deque(maxlen=WINDOW_SECONDS + 1)

    def note(self, now: float, inserted: int, trained: int, waiting: frozenset[str]) -> bool:
        """Book the time since the last note; True once a second, when a mark was set.

        The learner waits in one call, so it waited in between when it waited then and waits now. Appends
        come and go, so half of the time is booked by what was seen then and half by what is seen now.
        """
        if self._now is not None:
            spent = max(0.0, now - self._now.time)
            for side in WAITS:
                ends = (side in self._waiting) + (side in waiting)
                self.seconds[side] += spent * (ends // 2 if side in ("prefill", "learner") else ends / 2)
        self._waiting = waiting
        self._now = _Mark(now, inserted, trained, tuple(self.seconds[side] for side in WAITS))
        if self._marks and now - self._marks[-1].time < MARK_SECONDS:
            return False
        self._marks.append(self._now)
        return True

    def begin(self) -> None:
        """Let the minute begin anew; the seconds go on."""
        self._marks.clear()

    def rate(self) -> float:
        """Rows inserted per second over the last minute or the last PACE_SECONDS, whichever was slower."""
        rates = [
            (now.inserted - then.inserted) / (now.time - then.time)
            for then, now in (self._span(WINDOW_SECONDS), self._span(PACE_SECONDS))
            if now.time > then.time
        ]
        return min(rates, default=0.0)

    def held_ratio(self) -> float | None:
        """Trained rows per inserted row over the last minute; None when nothing was inserted."""
        then, now = self._span(WINDOW_SECONDS)
        return (
            (now.trained - then.trained) / (now.inserted - then.inserted)
            if now.inserted > then.inserted
            else None
        )

    def shares(self) -> dict[str, float]:
        """Part of the last minute that each side waited."""
        then, now = self._span(WINDOW_SECONDS)
        wall = now.time - then.time
        return {
            side: (now.seconds[k] - then.seconds[k]) / wall if wall > 0 else 0.0
            for k, side in enumerate(WAITS)
        }

    def _span(self, seconds: float) -> tuple[_Mark, _Mark]:
        now = self._now or _Mark(0.0, 0, 0, (0.0,) * len(WAITS))
        marks = [m for m in self._marks if now.time - m.time <= seconds + MARK_SECONDS / 2]
        return (marks[0] if marks else now), now


_SENTENCES = {
    "prefill": "the learner waits for the prefill",
    "learner": "the learner waits for actors",
    "actors": "actors wait for the learner",
    "grants": "actors wait for credit on its way",
}


class Governor:
    """The limiter in its surroundings. Belongs to the sampling thread; any may ask `line` and `report`."""

    def __init__(
        self, limiter: RateLimiter, controls: Sequence[GrantTaker], *, metrics: Metrics | None = None
    ) -> None:
        """`controls[k]` takes the credit of shard k."""
        self.limiter = limiter
        self.grants = GrantSplitter(controls)
        self.books = WaitBooks()
        self._tally = InsertTally()
        self._guard = CounterGuard()
        self._inserted: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._next_grant = 0.0
        self._exhausted_at = -LATE_SECONDS  # when all credit was last used up
        self._metrics = metrics
        self._exported = dict(self.books.seconds)
        self._rule = (False, limiter.train_ratio)
        self._line = "no experience yet"
        self._report = self._summary()

    def observe(
        self, now: float, shards: Iterable[ShardCounters], live: int, starts: int, *, stalled: bool = False
    ) -> None:
        """Take the counters of the shards in sight; `stalled` while the learner has to wait for its batch."""
        for shard in shards:
            rows = shard.inserted
            if rows > 0 or shard.index in self._inserted:  # not 0 for want of an answer so far
                self._inserted[shard.index] = self._believe(shard.index, rows)
            self._waiting[shard.index] = shard.waiting
        self.limiter.observe(self._tally.count(self._inserted), live, starts)
        if (rule := (self.limiter.prefilled, self.limiter.train_ratio)) != self._rule:
            self._rule = rule
            self.books.begin()  # no ratio is held over a prefill or over two ratios
        if self.limiter.insert_budget() <= self.limiter.inserted:
            self._exhausted_at = now
        waiting = frozenset(self._who_waits(stalled, now))
        if self.books.note(now, self.limiter.inserted, self.limiter.trained, waiting):
            self.limiter.pace(self.books.rate())
            self._line = self._describe()
            self._report = self._summary()
            self._export()

    def _believe(self, shard: int, rows: int) -> int:
        """What `rows`, said by the shard's counter, are worth."""
        limiter, before = self.limiter, self._guard.refusals
        leap = max(LEAP_ROWS, limiter.prefill_rows + limiter.tolerance_rows + limiter.min_rows)
        rows, forgiven = self._guard.check(shard, rows, self.grants.ceiling(shard), leap)
        if forgiven is not None:
            self._tally.forgive(shard, forgiven)
        if self._metrics is not None and self._guard.refusals > before:
            self._metrics.labels("replay_counters_refused_total", counter="inserted").inc()
        return rows

    def pump(self, now: float, *, at_once: bool = False) -> None:
        """Send the grants that are due."""
        if now < self._next_grant and not at_once:
            return
        self._next_grant = now + (HASTE_SECONDS if self.waiting_rows else GRANT_SECONDS)
        free = self.limiter.insert_budget() - self.limiter.inserted
        self.grants.send(free, self._inserted, self._waiting, now)

    @property
    def waiting_rows(self) -> int:
        """Rows that appends hold back in shards that answer."""
        return sum(rows for shard, rows in self._waiting.items() if self.grants.answers(shard))

    def line(self) -> str:
        """Who waited for whom in the last minute, and the ratio held, as of about a second ago."""
        return self._line

    def report(self) -> dict[str, Any]:
        """What a status needs, JSON-able, as of about a second ago; seconds are of this process's life."""
        return self._report

    def _summary(self) -> dict[str, Any]:
        return {
            "line": self._line,
            "seconds": dict(self.books.seconds),
            "shares": self.books.shares(),
            "held_ratio": self.books.held_ratio(),
            "asked_ratio": self.limiter.train_ratio,
            "ahead_rows": self.limiter.ahead_rows,
            "band_rows": self.limiter.band_rows,
        }

    def state(self) -> dict[str, Any]:
        """The ledger, for a checkpoint."""
        return {"limiter": self.limiter.state(), "tally": self._tally.state()}

    def load(self, state: Mapping[str, Any], *, unseen: bool = False) -> None:
        """Take up a saved ledger beside the shards as last observed (see `RateLimiter.load`)."""
        self._tally.load(state["tally"])
        limiter = self.limiter
        limiter.observe(self._tally.count(self._inserted), limiter.live, limiter.starts)
        limiter.load(state["limiter"], unseen=unseen)
        self.grants.forget()

    def _who_waits(self, stalled: bool, now: float) -> Iterable[str]:
        limiter = self.limiter
        if stalled:
            yield "learner" if limiter.prefilled and limiter.starts else "prefill"
        if self.waiting_rows > 0:
            yield "actors" if now - self._exhausted_at < LATE_SECONDS else "grants"

    def _describe(self) -> str:
        shares = self.books.shares()
        side = max(shares, key=lambda name: shares[name])
        who = (
            f"{_SENTENCES[side]} {shares[side]:.0%} of the last minute"
            if shares[side] >= 0.01
            else ("nobody waits")
        )
        held = self.books.held_ratio()
        ratio = "" if held is None else f"{held:.4g} of "
        return f"{who}; train ratio {ratio}{self.limiter.train_ratio:g}"

    def _export(self) -> None:
        if self._metrics is None:
            return
        for side, seconds in self.books.seconds.items():
            self._metrics.labels("learner_stall_seconds_total", side=side).inc(seconds - self._exported[side])
        self._exported = dict(self.books.seconds)
        held = self.books.held_ratio()
        if held is not None:
            self._metrics["learner_train_ratio_minute"].set(held)
        self._metrics["learner_train_ratio"].set(self.limiter.held_ratio)
        self._metrics["learner_train_ratio_target"].set(self.limiter.train_ratio)
        self._metrics["learner_ahead_rows"].set(self.limiter.ahead_rows)
        self._metrics["learner_tolerance_rows"].set(self.limiter.band_rows)
