"""The draw space: all legal starts of an index, numbered in canonical order (shard, stream, position).

Selectors draw numbers 0 .. total - 1 or blocks of them; here the numbers become places. `replay.episodes` has
the same over starts whose window stays within one episode. Letters: F fragments, E blocks, n draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from replay.index import StartIndex
from replay.rows import HomeT

BLOCK_ROWS = 64
"""Rows that share one priority: positions 64 k .. 64 k + 63 of a stream."""


class Picks(NamedTuple):
    """Drawn starts. Made by selectors, taken by the sampler; a number >= 0 is never reused as a position."""

    shard: NDArray[np.int64]  # [n]
    stream: NDArray[np.int64]  # [n]
    start: NDArray[np.int64]  # [n]
    weight: NDArray[np.float64]  # [n], importance weights before they are normalised


class Blocks(NamedTuple):
    """The live blocks in canonical order. A fragment holds `number` of them from block number `first` on."""

    shard: NDArray[np.int64]  # [F]
    stream: NDArray[np.int64]  # [F]
    first: NDArray[np.int64]  # [F]
    number: NDArray[np.int64]  # [F]
    legal: NDArray[np.int64]  # [E], legal starts in each block


class Starts(Protocol):
    """What a selector knows of the rows."""

    @property
    def index(self) -> StartIndex[Any]: ...
    @property
    def total(self) -> int: ...
    def counts(self) -> NDArray[np.int64]: ...  # cumulative legal starts of the fragments [F]
    def pick(self, draws: NDArray[np.int64]) -> Picks: ...
    def blocks(self) -> Blocks: ...
    def following(self, shard: int, stream: int, position: int) -> tuple[int | None, int]:
        """(first legal start from `position` on, itself), or (None, where to look from later)."""
        ...


def block_bounds(lo: NDArray[np.int64], hi: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first block, number of blocks) [F] that the live rows lo .. hi - 1 touch."""
    first = lo // BLOCK_ROWS
    return first, np.where(hi > lo, (hi - 1) // BLOCK_ROWS - first + 1, 0)


class PlainStarts:
    """Every start whose window is live; episodes do not matter."""

    def __init__(self, index: StartIndex[HomeT]) -> None:
        self.index = index

    @property
    def total(self) -> int:
        """Number of legal starts."""
        return self.index.total

    def counts(self) -> NDArray[np.int64]:
        """Cumulative legal starts of the fragments [F]."""
        return self.index.counts()

    def pick(self, draws: NDArray[np.int64]) -> Picks:
        """The places of draws [n] in 0 .. total - 1."""
        cumulative = self.index.counts()
        fragments = self.index.fragments()
        which = np.searchsorted(cumulative, draws, side="right")
        before = np.where(which > 0, cumulative[which - 1], 0)
        start = fragments.lo[which] + draws - before
        return Picks(fragments.shard[which], fragments.stream[which], start, np.ones(len(draws)))

    def blocks(self) -> Blocks:
        """All live blocks; those at the end of a fragment have rows but no legal start yet."""
        shard, stream, lo, hi = self.index.fragments()
        first, count = block_bounds(lo, hi)
        end = np.maximum(hi - self.index.length + 1, lo)  # [F], behind the last legal start
        offset = np.cumsum(count) - count  # [F]
        legal = np.full(int(count.sum()), BLOCK_ROWS, np.int64)
        for back in range(self.index.length // BLOCK_ROWS + 2):  # only the last blocks are not full
            here = np.flatnonzero(count > back)
            block = first[here] + count[here] - 1 - back
            legal[offset[here] + count[here] - 1 - back] = np.clip(
                end[here] - block * BLOCK_ROWS, 0, BLOCK_ROWS
            )
        here = np.flatnonzero(count)
        legal[offset[here]] = np.maximum(np.minimum((first[here] + 1) * BLOCK_ROWS, end[here]) - lo[here], 0)
        return Blocks(shard.copy(), stream.copy(), first, count, legal)

    def following(self, shard: int, stream: int, position: int) -> tuple[int | None, int]:
        """As Starts."""
        runs = self.index.streams.get((shard, stream))
        for lo, hi in runs.bounds if runs is not None else ():
            start = max(lo, position)
            if start + self.index.length <= hi:
                return start, start
        return None, position
