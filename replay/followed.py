"""One segment as its reader follows it: how far its slots are filled, and which of their rows may be read.

The owner's counters are memory shared with it: what they say is held against what a slot can have.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replay.admission import MAX_ACTOR, MAX_ENV, stream_key
from replay.index import Run, StartIndex
from replay.rows import Home, SegmentHome
from system.experience import StreamId
from system.metrics import Metrics

log = logging.getLogger(__name__)


def named(home: SegmentHome) -> NDArray[np.bool_]:
    """Which slots [S] have the name of a stream that can be."""
    actor, env, start = home.slots.T
    return (actor >= 0) & (actor < MAX_ACTOR) & (env >= 0) & (env < MAX_ENV) & (start >= 0)


class Followed:
    """A segment and the rows of it that the index has."""

    def __init__(self, path: Path, origin: int, home: SegmentHome, *, metrics: Metrics | None = None) -> None:
        self.path = path
        self.origin = origin
        self.home = home
        self._metrics = metrics
        self.known = np.zeros(len(home.committed), np.int64)  # [S]
        self.runs: list[Run[Home] | None] = [None] * len(self.known)
        self.limit: NDArray[np.int64] | None = None  # [S] rows that may be read, where some may not
        self.sealed = False  # the counters will not change any more
        self.refused = np.zeros(len(self.known), np.bool_)  # [S] slots whose counter said what cannot be

    @property
    def complete(self) -> bool:
        """Nothing is to be expected once its counters have been read."""
        rows = self.home.slot_rows
        most = rows if self.limit is None else np.minimum(self.limit, rows)
        return self.sealed or bool((self.known == most).all())

    def believe(self, good: NDArray[np.int64], seen: NDArray[np.int64]) -> int:
        """Of the `seen` rows of each slot [S] only `good` [S] may be read; return how many that costs.

        A slot with damage is read up to there and no further, whatever is appended to it.
        """
        lost = int(np.maximum(seen - good, 0).sum())  # more may be good than were seen: it grew meanwhile
        if lost:
            self.limit = np.where(good < seen, good, self.home.slot_rows)
        return lost

    def read_counters(self, index: StartIndex[Home]) -> bool:
        """Tell the index of new rows; False when nothing changed."""
        now = self.home.committed.copy()  # one load of the counters; rows behind it are complete
        if self.limit is not None:
            now = np.minimum(now, self.limit)
        changed = np.flatnonzero(now != self.known)
        if not len(changed):
            return False
        wrong = (now != self.known) & ~self._possible(now)
        if wrong.any():
            self._refuse(wrong)
            now = np.where(wrong, self.known, now)
            changed = np.flatnonzero(now != self.known)
        for slot in changed.tolist():
            run = self.runs[slot]
            if run is None:
                run = self.runs[slot] = self._new_run(index, slot)
            index.grow(run, run.start + int(now[slot]))
        self.known = now
        return len(changed) > 0

    def _possible(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these counts [S] slots can have."""
        return (counts >= 0) & (counts <= self.home.slot_rows) & ((counts == 0) | named(self.home))

    def _refuse(self, wrong: NDArray[np.bool_]) -> None:
        """Say once of every slot [S] that its counter is wrong: it keeps the count it had."""
        new = wrong & ~self.refused
        if not new.any():
            return
        self.refused |= new
        what = {"segment": str(self.path), "slots": np.flatnonzero(new).tolist()}
        log.warning("row counters refused: a slot cannot have so many rows", extra=what)
        if self._metrics is not None:
            self._metrics.labels("replay_counters_refused_total", counter="committed").inc(int(new.sum()))

    def _new_run(self, index: StartIndex[Home], slot: int) -> Run[Home]:
        actor, env, start = self.home.slots[slot].tolist()
        stream = stream_key(StreamId(actor=actor, env=env))
        return index.add(self.origin, stream, start, self.home, slot * self.home.slot_rows)
