"""Where episodes begin, and the draw space of starts whose window stays within one episode.

Borders are read from is_first, once per row, and kept by stream: positions are never reused and rows never
change, so what was scanned stays true whatever comes and goes around it. Letters as in `replay.starts`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from replay.batches import BatchBuffer
from replay.index import StartIndex, StreamRuns
from replay.rows import Home, RowsGone
from replay.starts import BLOCK_ROWS, Blocks, Picks, block_bounds
from system.specs import ArraySpec

SCAN_ROWS = 256
"""Rows read at a time from homes that cannot give is_first alone."""


@runtime_checkable
class FlagHome(Protocol):
    """A home that can read the one column that episodes need without all the others."""

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """is_first of rows first .. first + count - 1 [count]; None when it cannot after all."""
        ...


class Borders:
    """The is_first positions of one stream, and how many legal starts lie between them."""

    def __init__(self, span: int) -> None:
        self._span = span
        self._rows = np.zeros((2, 64), np.int64)
        self._size = 0
        self.scanned: list[tuple[int, int]] = []  # disjoint, ascending: positions looked at
        self.epoch = 0
        """Grows when borders move to other places in the arrays."""

    @property
    def at(self) -> NDArray[np.int64]:
        """Where episodes begin [K], ascending."""
        return self._rows[0, : self._size]

    @property
    def before(self) -> NDArray[np.int64]:
        """Legal starts in the whole episodes before each [K]."""
        return self._rows[1, : self._size]

    def missing(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """The parts of lo .. hi - 1 not scanned yet."""
        gaps: list[tuple[int, int]] = []
        for begin, end in self.scanned:
            if begin >= hi:
                break
            if end <= lo:
                continue
            if begin > lo:
                gaps.append((lo, begin))
            lo = max(lo, end)
        if lo < hi:
            gaps.append((lo, hi))
        return gaps

    def add(self, lo: int, hi: int, found: NDArray[np.int64]) -> None:
        """Positions lo .. hi - 1 were scanned: `found` [k] are the is_first ones."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.scanned, (lo, hi)]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self.scanned = merged
        if len(found) and self._size and found[0] <= self.at[-1]:
            found = np.union1d(self.at, found)
            self._size = 0
            self.epoch += 1
        self._append(found)

    def forget(self, lo: int) -> None:
        """Positions before `lo` will not be asked for again; costs something only once half is stale."""
        stale = int(np.searchsorted(self.at, lo))
        if 2 * stale > self._size > 1024:
            self._rows = self._rows[:, stale : self._size].copy()
            self._size -= stale
            self.scanned = [(max(lo, begin), end) for begin, end in self.scanned if end > lo]
            self.epoch += 1

    def _append(self, found: NDArray[np.int64]) -> None:
        old, new = self._size, self._size + len(found)
        if new == old:
            return
        if new > self._rows.shape[1]:
            grown = np.zeros((2, 2 * new), np.int64)
            grown[:, :old] = self._rows[:, :old]
            self._rows = grown
        self._size = new
        self.at[old:] = found
        begin = max(old, 1)
        legal = np.maximum(np.diff(self.at[begin - 1 :]) - (self._span - 1), 0)
        if old == 0:
            self.before[0] = 0
        self.before[begin:] = self.before[begin - 1] + np.cumsum(legal)


class _Fragment:
    """The legal starts of one gapless range lo .. hi - 1: in its head, its whole episodes, and its tail."""

    def __init__(self, borders: Borders, lo: int, hi: int, span: int) -> None:
        self.borders, self.lo, self.hi, self.epoch = borders, lo, hi, borders.epoch
        at = borders.at
        self.first = int(np.searchsorted(at, lo, side="right"))  # the first border behind lo
        self.last = int(np.searchsorted(at, hi, side="left")) - 1  # the last border before hi
        if self.last < self.first:
            self.head, self.whole, self.tail = max(0, hi - lo - span + 1), 0, 0
        else:
            self.head = max(0, int(at[self.first]) - lo - span + 1)
            self.whole = int(borders.before[self.last] - borders.before[self.first])
            self.tail = max(0, hi - int(at[self.last]) - span + 1)

    @property
    def total(self) -> int:
        return self.head + self.whole + self.tail

    @property
    def newest(self) -> int:
        """Where the newest episode begins, as far as it is here."""
        return self.lo if self.last < self.first else int(self.borders.at[self.last])

    def place(self, draw: int) -> int:
        """The position of legal start number `draw`."""
        if draw < self.head:
            return self.lo + draw
        draw -= self.head
        at, before = self.borders.at, self.borders.before
        if draw >= self.whole:
            return int(at[self.last]) + draw - self.whole
        draw += int(before[self.first])
        episode = int(np.searchsorted(before, draw, side="right")) - 1
        return int(at[episode]) + draw - int(before[episode])

    def end(self, position: int) -> int:
        """The position behind the last known row of the episode that `position` lies in."""
        at = self.borders.at
        following = int(np.searchsorted(at, position, side="right"))
        return min(int(at[following]), self.hi) if following < len(at) else self.hi

    def count_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Legal starts before each of `positions` [n], which lie in lo .. hi."""
        if self.last < self.first:
            return np.clip(positions - self.lo, 0, self.head)
        at, before = self.borders.at, self.borders.before
        episode = np.clip(np.searchsorted(at, positions, side="right") - 1, self.first, self.last)
        room = np.full(len(positions), self.tail, np.int64)
        closed = episode < self.last
        room[closed] = before[episode[closed] + 1] - before[episode[closed]]
        inside = self.head + before[episode] - before[self.first]
        inside += np.clip(positions - at[episode], 0, room)
        return np.where(positions < at[self.first], np.clip(positions - self.lo, 0, self.head), inside)


class EpisodeStarts:
    """Every start whose window lies in one episode. Follows the index it is made for."""

    def __init__(self, index: StartIndex[Home], specs: dict[str, ArraySpec]) -> None:
        self.index = index
        self._specs = specs
        self._scratch: BatchBuffer | None = None
        self._borders: dict[tuple[int, int], Borders] = {}
        self._fragments: list[_Fragment] = []
        self._places: dict[tuple[int, int], list[_Fragment]] = {}
        self._cumulative = np.zeros(0, np.int64)
        self._version = -1

    @property
    def total(self) -> int:
        """Number of legal starts."""
        cumulative = self.counts()
        return int(cumulative[-1]) if len(cumulative) else 0

    def counts(self) -> NDArray[np.int64]:
        """Cumulative legal starts of the fragments [F]."""
        if self.index.version != self._version:
            self._version = self.index.version
            self._follow()
        return self._cumulative

    def pick(self, draws: NDArray[np.int64]) -> Picks:
        """The places of draws [n] in 0 .. total - 1."""
        cumulative = self.counts()
        fragments = self.index.fragments()
        which = np.searchsorted(cumulative, draws, side="right")
        before = np.where(which > 0, cumulative[which - 1], 0)
        rank = (draws - before).tolist()
        start = [self._fragments[f].place(r) for f, r in zip(which.tolist(), rank, strict=True)]
        return Picks(
            fragments.shard[which], fragments.stream[which], np.asarray(start, np.int64), np.ones(len(draws))
        )

    def blocks(self) -> Blocks:
        """All live blocks; many have no legal start when episodes are short."""
        self.counts()
        shard, stream, lo, hi = self.index.fragments()
        first, count = block_bounds(lo, hi)
        parts = [np.zeros(0, np.int64)]
        for fragment, begin, number in zip(self._fragments, first.tolist(), count.tolist(), strict=True):
            edges = np.arange(begin, begin + number + 1, dtype=np.int64) * BLOCK_ROWS
            parts.append(np.diff(fragment.count_before(np.clip(edges, fragment.lo, fragment.hi))))
        return Blocks(shard.copy(), stream.copy(), first, count, np.concatenate(parts))

    def following(self, shard: int, stream: int, position: int) -> tuple[int | None, int]:
        """As Starts: what an episode is too short for is passed over; an open end is waited for."""
        self.counts()
        for fragment in self._places.get((shard, stream), ()):
            if fragment.hi <= position:
                continue
            position = max(position, fragment.lo)
            rank = int(fragment.count_before(np.asarray([position], np.int64))[0])
            if rank < fragment.total:
                start = fragment.place(rank)
                return start, start
            position = max(position, fragment.newest)
        return None, position

    def end(self, shard: int, stream: int, position: int) -> int | None:
        """The position behind the newest known row of the episode at `position`; None when it is gone."""
        self.counts()
        for fragment in self._places.get((shard, stream), ()):
            if fragment.lo <= position < fragment.hi:
                return fragment.end(position)
        return None

    def begins(self, shard: int, stream: int, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether an episode begins behind positions[i] and up to positions[i + 1]; [n - 1]."""
        self.counts()
        borders = self._borders.get((shard, stream))
        if borders is None:
            return np.zeros(len(positions) - 1, np.bool_)
        return np.diff(np.searchsorted(borders.at, positions, side="right")) > 0

    # ---- following the index ----------------------------------------------------------------------

    def _follow(self) -> None:
        span = self.index.length
        shard, stream, lo, hi = (column.tolist() for column in self.index.fragments())
        ranges = list(zip(zip(shard, stream, strict=True), lo, hi, strict=True))
        whole = [self._scan(key, begin, end) for key, begin, end in ranges]
        old, self._fragments, self._places = self._places, [], {}
        for (key, begin, end), sound in zip(ranges, whole, strict=True):
            borders = self._borders[key]
            fragment = next((f for f in old.get(key, ()) if (f.lo, f.hi) == (begin, end)), None)
            if not sound:
                fragment = _Fragment(Borders(span), begin, begin, span)
            elif fragment is None or fragment.borders is not borders or fragment.epoch != borders.epoch:
                fragment = _Fragment(borders, begin, end, span)
            self._fragments.append(fragment)
            self._places.setdefault(key, []).append(fragment)
        for key in self._borders.keys() - self._places.keys():
            del self._borders[key]
        self._cumulative = np.cumsum([f.total for f in self._fragments], dtype=np.int64)

    def _scan(self, key: tuple[int, int], lo: int, hi: int) -> bool:
        """Find the borders in lo .. hi - 1; False when its rows are gone: the view will notice."""
        borders = self._borders.get(key)
        if borders is None:
            borders = self._borders[key] = Borders(self.index.length)
        runs = self.index.streams[key]
        try:
            for begin, end in borders.missing(lo, hi):
                borders.add(begin, end, self._read(runs, begin, end))
        except RowsGone:
            self._version = -1  # try again next time
            return False
        borders.forget(runs.lo)
        return True

    def _read(self, runs: StreamRuns[Home], begin: int, end: int) -> NDArray[np.int64]:
        """The is_first positions of begin .. end - 1."""
        flags = np.zeros(end - begin, np.bool_)
        at = 0
        for home, first, count in runs.pieces(begin, end - begin):
            found = home.first_flags(first, count) if isinstance(home, FlagHome) else None
            flags[at : at + count] = self._copy_flags(home, first, count) if found is None else found
            at += count
        return np.flatnonzero(flags) + begin

    def _copy_flags(self, home: Home, first: int, count: int) -> NDArray[np.bool_]:
        if self._scratch is None:
            self._scratch = BatchBuffer(self._specs, 1, SCAN_ROWS)
        flags = np.zeros(count, np.bool_)
        for at in range(0, count, SCAN_ROWS):
            some = min(SCAN_ROWS, count - at)
            home.copy_rows(self._scratch.sequences[0], 0, first + at, some)
            flags[at : at + some] = self._scratch.columns["is_first"][0, :some]
        return flags
