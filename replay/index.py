"""Where sequences may start: the live ranges of all streams, and the arithmetic from a start to its rows.

Pure bookkeeping over positions; knows neither files nor Zarr. Between `view` (which finds the runs) and
`selectors` (which draw from the counts). Letters: F fragments.

A *run* is consecutive rows of one stream in one home. Runs that meet make a *fragment*; a stream whose
middle is missing (quarantined, not yet verified) has several, and no sequence spans the gap.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

HomeT = TypeVar("HomeT")


class Piece(NamedTuple, Generic[HomeT]):
    """Consecutive rows of one run: rows first .. first + rows - 1 inside its home."""

    home: HomeT
    first: int
    rows: int


class Fragments(NamedTuple):
    """The gapless live ranges lo .. hi - 1 in canonical order (shard, stream, lo); all int64 [F]."""

    shard: NDArray[np.int64]
    stream: NDArray[np.int64]
    lo: NDArray[np.int64]
    hi: NDArray[np.int64]


@dataclass(slots=True, kw_only=True, eq=False)
class Run(Generic[HomeT]):
    """Positions start .. end - 1 of a stream, in `home` from row `first` on. Changed by the index only."""

    stream: StreamRuns[HomeT]
    start: int
    end: int
    home: HomeT
    first: int


@dataclass(slots=True, kw_only=True, eq=False)
class StreamRuns(Generic[HomeT]):
    """The live rows of one stream.

    Where two runs overlap (a copy of rows that are here already), the one that begins later counts, from
    its start on: rows are identical wherever they lie.
    """

    shard: int
    stream: int
    runs: list[Run[HomeT]] = field(default_factory=list[Run[HomeT]])  # by start
    starts: list[int] = field(default_factory=list[int])
    _bounds: list[tuple[int, int]] | None = None
    _top: int = 0  # where the rows known so far end, live or not

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(lo, hi) of every fragment, ascending."""
        if self._bounds is None:
            self._bounds = self._join()
        return self._bounds

    @property
    def lo(self) -> int:
        """The first live position; `hi` without any."""
        return self.bounds[0][0] if self.bounds else self._top

    @property
    def hi(self) -> int:
        """The position behind the last live one; without any, behind the last that was known."""
        return self.bounds[-1][1] if self.bounds else self._top

    def overlap(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The live parts (lo, hi) of positions begin .. end - 1."""
        for lo, hi in self.bounds:
            if max(lo, begin) < min(hi, end):
                yield max(lo, begin), min(hi, end)

    def pieces(self, position: int, length: int) -> Iterator[Piece[HomeT]]:
        """The rows position .. position + length - 1, which must be live, in order."""
        at = bisect_right(self.starts, position) - 1
        while length > 0:
            assert 0 <= at < len(self.runs), (self.bounds, position, length)
            run = self.runs[at]
            count = min(length, self._end(at) - position)
            assert run.start <= position, (self.bounds, position, length)
            if count > 0:  # not hidden by a run that begins there too
                yield Piece(run.home, run.first + position - run.start, count)
                position += count
                length -= count
            at += 1

    def _end(self, at: int) -> int:
        end = self.runs[at].end
        return min(end, self.starts[at + 1]) if at + 1 < len(self.starts) else end

    # What follows is for the index, which must know of every change.

    def insert(self, run: Run[HomeT]) -> None:
        """Runs without rows stay out: they would hide those of another run with the same start."""
        if run.start < run.end:
            at = bisect_right(self.starts, run.start)
            self.starts.insert(at, run.start)
            self.runs.insert(at, run)
            self._bounds = None
            self._top = max(self._top, run.end)

    def remove(self, gone: set[int]) -> None:
        """Forget the runs with these ids."""
        self.runs = [run for run in self.runs if id(run) not in gone]
        self.starts = [run.start for run in self.runs]
        self._bounds = None

    def grow(self, run: Run[HomeT], end: int) -> None:
        bounds, before = self._bounds, run.end
        run.end = end
        if before == run.start:
            self.insert(run)
        elif end == run.start:
            self.remove({id(run)})
        elif bounds and run is self.runs[-1] and bounds[-1][1] == before:
            bounds[-1] = (bounds[-1][0], end)  # most rows come at the end of a stream
        else:
            self._bounds = None
        self._top = max(self._top, end)

    def _join(self) -> list[tuple[int, int]]:
        bounds: list[tuple[int, int]] = []
        for at, start in enumerate(self.starts):
            end = self._end(at)
            if end <= start:
                continue
            if bounds and bounds[-1][1] == start:
                bounds[-1] = (bounds[-1][0], end)
            else:
                bounds.append((start, end))
        return bounds


class StartIndex(Generic[HomeT]):
    """All fragments in canonical order (shard, stream, lo), and how many legal starts each has.

    A start is legal when `length` rows from it on are live without a gap. The order depends only on what
    is live, so that equal data and equal random numbers give equal batches. Not safe for several threads.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.streams: dict[tuple[int, int], StreamRuns[HomeT]] = {}
        self.version = 0
        """Grows with every change of the live rows."""
        self._order: list[tuple[int, int]] = []
        self._homes: dict[int, list[Run[HomeT]]] = {}  # by id of the home
        self._changed: dict[tuple[int, int], StreamRuns[HomeT]] = {}
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # first fragment of a stream, how many
        self._owners: list[StreamRuns[HomeT]] = []  # [F]
        self._fragments = Fragments(*(np.zeros(0, np.int64) for _ in Fragments._fields))
        self._cumulative = np.zeros(0, np.int64)
        self._rows = 0

    # ---- what is live -----------------------------------------------------------------------------

    def stream(self, shard: int, stream: int) -> StreamRuns[HomeT]:
        """The runs of a stream, made when new."""
        key = (shard, stream)
        runs = self.streams.get(key)
        if runs is None:
            runs = self.streams[key] = StreamRuns[HomeT](shard=shard, stream=stream)
            insort(self._order, key)
            self._touch(runs)
        return runs

    def add(self, shard: int, stream: int, start: int, home: HomeT, first: int, count: int = 0) -> Run[HomeT]:
        """`count` rows from position `start` on lie in `home` from row `first` on; runs come in any order."""
        runs = self.stream(shard, stream)
        run = Run(stream=runs, start=start, end=start + count, home=home, first=first)
        runs.insert(run)
        self._homes.setdefault(id(home), []).append(run)
        self._touch(runs)
        return run

    def grow(self, run: Run[HomeT], end: int) -> None:
        """The rows of a run now reach to position `end` - 1, more or fewer than before."""
        run.stream.grow(run, max(end, run.start))
        self._touch(run.stream)

    def trim(self, run: Run[HomeT], start: int) -> None:
        """The rows of a run before position `start` are gone."""
        if start <= run.start:
            return
        runs = run.stream
        runs.remove({id(run)})
        run.first += start - run.start
        run.start, run.end = start, max(start, run.end)
        runs.insert(run)
        self._touch(runs)

    def remove(self, run: Run[HomeT]) -> None:
        """The rows of one run are gone; its home may hold others."""
        held = self._homes[id(run.home)]
        held[:] = [other for other in held if other is not run]
        if not held:
            del self._homes[id(run.home)]
        run.stream.remove({id(run)})
        self._touch(run.stream)

    def drop(self, home: HomeT) -> None:
        """A home is gone: its rows can no longer be drawn."""
        gone = self._homes.pop(id(home), [])
        ids = {id(run) for run in gone}
        for runs in {id(run.stream): run.stream for run in gone}.values():
            runs.remove(ids)
            self._touch(runs)

    def _touch(self, runs: StreamRuns[HomeT]) -> None:
        self._changed[runs.shard, runs.stream] = runs
        self.version += 1

    # ---- drawing ----------------------------------------------------------------------------------

    def counts(self) -> NDArray[np.int64]:
        """Cumulative legal starts in canonical order [F]."""
        if self._changed:
            self._settle()
        return self._cumulative

    def fragments(self) -> Fragments:
        """The live ranges, as `counts`. Views that the next change overwrites: copy what must last."""
        self.counts()
        return self._fragments

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
        """Live rows of the longest fragment."""
        lo, hi = self.fragments()[2:]
        return int((hi - lo).max()) if len(lo) else 0

    def resolve(self, draws: NDArray[np.int64]) -> list[tuple[StreamRuns[HomeT], int]]:
        """The stream and start position of each draw [B] in 0 .. total - 1."""
        cumulative = self.counts()
        which = np.searchsorted(cumulative, draws, side="right")
        before = np.where(which > 0, cumulative[which - 1], 0)
        starts = self._fragments.lo[which] + draws - before
        return [(self._owners[w], s) for w, s in zip(which.tolist(), starts.tolist(), strict=True)]

    def _settle(self) -> None:
        """Bring the arrays up to date: in place while no fragment came or went."""
        same = all(
            key in self._places and self._places[key][1] == len(runs.bounds)
            for key, runs in self._changed.items()
        )
        if not same:
            self._rebuild()
        else:
            for key, runs in self._changed.items():
                at, count = self._places[key]
                if count:
                    self._fragments.lo[at : at + count] = [lo for lo, _ in runs.bounds]
                    self._fragments.hi[at : at + count] = [hi for _, hi in runs.bounds]
        self._changed.clear()
        live = self._fragments.hi - self._fragments.lo
        self._rows = int(live.sum())
        self._cumulative = np.cumsum(np.maximum(live - (self.length - 1), 0))

    def _rebuild(self) -> None:
        self._places.clear()
        self._owners = []
        bounds: list[tuple[int, int, int, int]] = []
        for key in self._order:
            runs = self.streams[key]
            self._places[key] = (len(bounds), len(runs.bounds))
            bounds += [(*key, lo, hi) for lo, hi in runs.bounds]
            self._owners += [runs] * len(runs.bounds)
        table = np.asarray(bounds, np.int64).reshape(-1, 4)
        self._fragments = Fragments(*(np.ascontiguousarray(column) for column in table.T))
