"""Where sequences may start: the live ranges of all streams, and the arithmetic from a start to its rows.

Pure bookkeeping over positions; knows neither files nor Zarr. Between `reader` (which finds the runs) and
`selectors` (which draw from the counts).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Home = TypeVar("Home")


class Piece(NamedTuple, Generic[Home]):
    """Consecutive rows of one run: rows first .. first + rows - 1 inside its home."""

    home: Home
    first: int
    rows: int


@dataclass(slots=True, kw_only=True)
class StreamRuns(Generic[Home]):
    """The live rows of one stream: positions lo .. hi - 1 without a gap, cut into runs.

    A run begins at `starts[i]` and lies in `homes[i]` from row `firsts[i]` on; it ends where the next begins.
    """

    shard: int
    stream: int
    hi: int = 0
    starts: list[int] = field(default_factory=list[int])
    homes: list[Home] = field(default_factory=list[Home])
    firsts: list[int] = field(default_factory=list[int])

    @property
    def lo(self) -> int:
        return self.starts[0] if self.starts else self.hi

    def add(self, start: int, home: Home, first: int) -> None:
        """A run that begins at position `start`; in any order."""
        at = bisect_right(self.starts, start)
        self.starts.insert(at, start)
        self.homes.insert(at, home)
        self.firsts.insert(at, first)

    def drop(self, home: Home) -> None:
        """Forget every run in `home`, and what came before it: live rows never have a gap."""
        gone = [i for i, h in enumerate(self.homes) if h is home]
        if gone:
            keep = gone[-1] + 1
            del self.starts[:keep], self.homes[:keep], self.firsts[:keep]

    def pieces(self, position: int, length: int) -> Iterator[Piece[Home]]:
        """The rows position .. position + length - 1, which must be live, in order."""
        assert self.lo <= position <= self.hi - length, (self.lo, position, length, self.hi)
        run = bisect_right(self.starts, position) - 1
        while length > 0:
            end = self.starts[run + 1] if run + 1 < len(self.starts) else self.hi
            count = min(length, end - position)
            first = self.firsts[run] + position - self.starts[run]
            yield Piece(self.homes[run], first, count)
            position += count
            length -= count
            run += 1


class StartIndex(Generic[Home]):
    """All streams in canonical order (shard, stream), and how many legal starts each has.

    A start is legal when `length` rows from it on are live. The order depends only on what is stored,
    so that equal data and equal random numbers give equal batches.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.streams: dict[tuple[int, int], StreamRuns[Home]] = {}
        self._order: list[tuple[int, int]] = []
        self._dirty = True
        self._lo = self._cumulative = np.zeros(0, np.int64)
        self._rows = 0

    def stream(self, shard: int, stream: int) -> StreamRuns[Home]:
        """The runs of a stream, made when new. Call `touch` after changing them."""
        key = (shard, stream)
        runs = self.streams.get(key)
        if runs is None:
            runs = self.streams[key] = StreamRuns[Home](shard=shard, stream=stream)
            insort(self._order, key)
        return runs

    def touch(self) -> None:
        """The runs or ends of some streams changed."""
        self._dirty = True

    def drop(self, home: Home) -> None:
        """A home is gone: its rows can no longer be drawn."""
        for runs in self.streams.values():
            runs.drop(home)
        self._dirty = True

    def counts(self) -> NDArray[np.int64]:
        """Cumulative legal starts in canonical order [number of streams]."""
        if self._dirty:
            lo_hi = [(self.streams[key].lo, self.streams[key].hi) for key in self._order]
            bounds = np.asarray(lo_hi, np.int64).reshape(-1, 2)
            self._lo = bounds[:, 0]
            live = bounds[:, 1] - self._lo
            self._rows = int(live.sum())
            self._cumulative = np.cumsum(np.maximum(live - (self.length - 1), 0))
            self._dirty = False
        return self._cumulative

    @property
    def total(self) -> int:
        """Number of legal starts."""
        cumulative = self.counts()
        return int(cumulative[-1]) if len(cumulative) else 0

    @property
    def rows(self) -> int:
        """Live rows of all streams."""
        self.counts()
        return self._rows

    @property
    def longest(self) -> int:
        """Live rows of the longest stream."""
        return max((runs.hi - runs.lo for runs in self.streams.values()), default=0)

    def resolve(self, draws: NDArray[np.int64]) -> list[tuple[StreamRuns[Home], int]]:
        """The stream and start position of each draw [B] in 0 .. total - 1."""
        cumulative = self.counts()
        which = np.searchsorted(cumulative, draws, side="right")
        before = np.where(which > 0, cumulative[which - 1], 0)
        starts = self._lo[which] + draws - before
        return [
            (self.streams[self._order[w]], s) for w, s in zip(which.tolist(), starts.tolist(), strict=True)
        ]
