"""Balances the books of a replay from its files alone: every row stored once, none missing, none torn.

Reads all committed rows of all segments in all tiers (`replay.census`), beside shards that go on appending,
a block at a time. Knows nothing of those who sent the rows: `deploy.audit` sets these books against what the
actors say was acknowledged. Rows that left and whose ledger says so are not missing: evicted ones, damaged
ones, and positions that were passed over because rows of a stream are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.admission import check_chunk
from replay.census import ShardReading, StoredRun, by_stream, covered, read_adopted, read_shard
from replay.ledger import Ledger
from replay.rows import RowsGone
from replay.segment import allow_many_files
from system.errors import RejectedError
from system.experience import Chunk, StreamId

IDENTITY = ("incarnation", "episode", "step")
FLAGS = ("is_first", "is_last")
BLOCK_NBYTES, BLOCK_ROWS = 16 << 20, 1 << 15
"""Rows that are looked at together: as many as fit both."""
NEVER = 1 << 31
"""An incarnation that no actor reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One entry that does not balance. Made by `audit_replay` and `deploy.audit`."""

    kind: str  # missing | doubled | torn | order | version | ledger | damaged | lost
    where: str
    what: str
    rows: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayBooks:
    """What a replay holds. Made by `audit_replay`."""

    shards: int
    segments: int
    inserted: int  # rows ever committed
    live: int  # rows read
    evicted: int  # inserted and not here any more, damaged ones included
    damaged: int  # of evicted: those that damage took, as the ledgers know
    rows: Mapping[tuple[StreamId, int], int]  # live, by stream and incarnation
    positions: Mapping[StreamId, int]  # rows ever committed, by stream
    whole_from: Mapping[StreamId, int]  # the first incarnation of which nothing was evicted
    findings: tuple[Finding, ...]

    def rows_of(self, kind: str) -> int:
        """Rows that findings of this kind are about."""
        return sum(finding.rows for finding in self.findings if finding.kind == kind)


def audit_replay(root: Path) -> ReplayBooks:
    """Read every committed row and balance it. Faults of the rows become findings.

    The contents of rows in an object store stay there: only their narrow columns, kept here, are looked at.
    Raises: SchemaError, IntegrityError when there is no readable table; DeadlineError when a shard evicts
    faster than it can be read; PreflightError when something cannot be opened now.
    """
    history = layout.read_history(root)
    allow_many_files()
    shards = {i: read_shard(layout.shard_dir(root, i), i, history) for i in layout.shard_indices(root)}
    faults = [fault for shard in shards.values() for fault in shard.faults]
    adopted = {k: by_stream(runs) for k, runs in read_adopted(root, shards, history, faults).items()}
    findings = [_fault(where, what) for where, what in faults]
    books = _Books()
    for origin in sorted(shards.keys() | adopted.keys()):
        shard = shards.get(origin) or _nothing(origin)
        findings += _check_ledger(shard)
        books.add(shard, adopted.get(origin, {}))
    for stream in sorted(books.homes):
        findings += books.check(stream)
    return ReplayBooks(
        shards=len(shards),
        segments=len(books.seen),
        inserted=books.inserted,
        live=books.live,
        evicted=books.inserted - books.live,
        damaged=sum(shard.ledger.lost_rows for shard in shards.values()),
        rows=books.rows,
        positions=books.positions,
        whole_from=books.whole_from,
        findings=tuple(findings),
    )


def _fault(where: str, what: str) -> Finding:
    return Finding(kind="ledger" if where.endswith("ledger.json") else "damaged", where=where, what=what)


def _finding(kind: str, shard: str, stream: StreamId | None, what: str, rows: int = 1) -> Finding:
    return Finding(kind=kind, where=shard if stream is None else f"{shard} {stream}", what=what, rows=rows)


def _nothing(index: int) -> ShardReading:
    """A shard of which nothing is left but what others adopted."""
    name = layout.shard_dir(Path(), index).name
    return ShardReading(name=name, ledger=Ledger(), inserted=0, runs={}, segments={})


# ---- positions ------------------------------------------------------------------------------------


def _check_ledger(shard: ShardReading) -> Iterator[Finding]:
    """What is not here is what the ledger says has left; the gaps tell where more is missing."""
    ever = sum(shard.tops.values()) - shard.skipped
    if ever < shard.inserted:
        what = f"the catalog says {shard.inserted} rows were inserted, the streams have had {ever}"
        yield _finding("missing", shard.name, None, what, shard.inserted - ever)
    left = shard.unaccounted
    for stream, first, end, newest in sorted(shard.gaps(), key=lambda gap: gap[1] - gap[2]):
        if left <= 0:
            break
        what = f"positions {first} and {end} do not meet"
        if newest:
            what = f"the ledger knows {end} rows, the newest here is {first - 1}"
        rows = min(left, end - first)
        left -= rows
        yield _finding("missing", shard.name, stream, what, rows)
    if left:
        out = shard.ledger.evicted_rows
        what = f"the ledger says {out} rows have left, but {out + left} are not here"
        yield _finding("ledger", shard.name, None, what, abs(left))


def _whole_from(shard: ShardReading, stream: StreamId, runs: list[StoredRun]) -> int:
    """See ReplayBooks. An incarnation whose first row is gone does not begin at episode 0 step 0."""
    top = max([shard.tops.get(stream, 0), *(run.end for run in runs)])
    at, whole = 0, 0
    for run in runs:
        if run.position > at and not (at and run.position == at + 1 and shard.skipped):
            incarnation, episode, step = (int(run.column(name, 0, 1)[0]) for name in IDENTITY)
            whole = incarnation if episode == 0 and step == 0 else incarnation + 1
        at = max(at, run.end)
    return whole if top <= at + bool(at and shard.skipped) else NEVER


class _Books:
    """The rows of all streams, by the shard they were first stored in."""

    def __init__(self) -> None:
        self.homes: dict[StreamId, list[tuple[str, list[StoredRun]]]] = {}
        self.rows: dict[tuple[StreamId, int], int] = {}
        self.positions: dict[StreamId, int] = {}
        self.whole_from: dict[StreamId, int] = {}
        self.seen: set[Path] = set()
        self.inserted = self.live = 0

    def add(self, shard: ShardReading, adopted: Mapping[StreamId, list[StoredRun]]) -> None:
        """Take up a shard and the rows of it that others hold."""
        self.inserted -= shard.skipped
        self.seen |= {stored.path for stored in shard.segments.values()}
        for stream in shard.tops.keys() | adopted.keys():
            runs = [*adopted.get(stream, []), *shard.runs.get(stream, [])]
            runs.sort(key=lambda run: run.position)
            self.seen |= {run.stored.path for run in runs}
            top = max([shard.tops.get(stream, 0), *(run.end for run in runs)])
            self.positions[stream] = self.positions.get(stream, 0) + top
            self.inserted += top
            self.live += covered(runs)
            self.homes.setdefault(stream, []).append((shard.name, runs))
            whole = _whole_from(shard, stream, runs)
            self.whole_from[stream] = max(self.whole_from.get(stream, 0), whole)

    def check(self, stream: StreamId) -> Iterator[Finding]:
        """Read all rows of one stream. An actor may have moved, but no row is stored at two shards."""
        spans: list[NDArray[np.int64]] = []
        within = 0
        for shard, runs in self.homes[stream]:
            walk = _Walk(shard, stream)
            for run in runs:
                yield from walk.read(run)
            for life, size in walk.lives.items():
                self.rows[stream, life] = self.rows.get((stream, life), 0) + size
            spans.append(walk.spans)
            doubled = _doubled(walk.spans)
            within += doubled
            if doubled:
                what = f"{doubled} of {walk.count} identities are stored more than once"
                yield _finding("doubled", shard, stream, what, doubled)
        if len(spans) > 1 and (doubled := _doubled(np.concatenate(spans)) - within):
            places = " and ".join(name for name, runs in self.homes[stream] if runs)
            yield _finding("doubled", places, stream, f"{doubled} rows are stored at both", doubled)


# ---- rows -----------------------------------------------------------------------------------------


class _Walk:
    """One reading of a stream's rows at one shard, in order, a block at a time."""

    def __init__(self, shard: str, stream: StreamId) -> None:
        self._shard, self._stream = shard, stream
        self._end = -1  # position behind the newest row
        self._last: dict[str, NDArray[Any]] | None = None  # the newest row, each [1]
        self._spans: list[NDArray[np.int64]] = []
        self.lives: dict[int, int] = {}  # rows by incarnation
        self.count = 0

    @property
    def spans(self) -> NDArray[np.int64]:
        """Rows that follow each other in an episode: incarnation, episode, first and last step [K, 4]."""
        return np.concatenate([np.zeros((0, 4), np.int64), *self._spans])

    def read(self, run: StoredRun) -> Iterator[Finding]:
        """Identities, versions and contents of the rows of one slot."""
        if self._last is not None and run.position < self._end:
            rows = min(self._end, run.end) - run.position
            what = f"positions {self._end} and {run.position} do not meet"
            yield _finding("doubled", self._shard, self._stream, what, rows)
        behind = run.position != self._end
        block = max(1, min(BLOCK_ROWS, BLOCK_NBYTES // run.whole_table.row_nbytes))
        for lo in range(0, run.count, block):
            hi = min(run.count, lo + block)
            yield from self._identities(run, lo, hi, behind=behind and lo == 0)
            yield from self._contents(run, lo, hi)
        self._end = max(self._end, run.end)

    def _identities(self, run: StoredRun, lo: int, hi: int, *, behind: bool) -> Iterator[Finding]:
        names = (*IDENTITY, *FLAGS, "policy_version")
        rows = {name: run.column(name, lo, hi) for name in names}  # each [n]
        lives, sizes = np.unique(rows["incarnation"], return_counts=True)
        for life, size in zip(lives.tolist(), sizes.tolist(), strict=True):
            self.lives[life] = self.lives.get(life, 0) + size
        self.count += hi - lo
        self._spans.append(_spans(rows))
        first = self._last is None
        if self._last is not None:  # the newest row before these, then these
            rows = {name: np.concatenate([self._last[name], values]) for name, values in rows.items()}
        self._last = {name: values[-1:].copy() for name, values in rows.items()}
        for kind, what, count in _check_order(rows, behind=behind and not first):
            yield _finding(kind, self._shard, self._stream, what, count)
        back = np.flatnonzero(np.diff(rows["policy_version"]) < 0)
        if len(back):
            what = f"policy_version goes back at {_name(rows, int(back[0]) + 1)}"
            yield _finding("version", self._shard, self._stream, what, len(back))

    def _contents(self, run: StoredRun, lo: int, hi: int) -> Iterator[Finding]:
        """The stored rows would be admitted again: dtypes, ranges, finite values, flags."""
        where = f"{run.stored.path.name} slot {run.slot} rows"
        try:
            rows = run.rows(lo, hi)
        except RowsGone as error:
            if run.stored.path.exists():  # else it was evicted meanwhile
                yield _finding("damaged", self._shard, self._stream, f"{where} {lo}..{hi - 1}: {error}")
            return
        same = rows["incarnation"][1:] == rows["incarnation"][:-1]
        cuts = np.flatnonzero(~(_follows(rows) & same)) + 1  # other faults of order have their own findings
        for begin, end in pairwise([0, *cuts.tolist(), hi - lo]):
            columns = {name: values[begin:end] for name, values in rows.items()}
            try:
                check_chunk(run.whole_table, Chunk(stream=self._stream, columns=columns))
            except RejectedError as error:
                what = f"{where} {lo + begin}..{lo + end - 1}: {error}"
                yield _finding("torn", self._shard, self._stream, what, end - begin)


def _going_on(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether row t + 1 is the next of the same episode [T - 1]."""
    incarnation, episode, step = (rows[name].astype(np.int64) for name in IDENTITY)
    same = (incarnation[1:] == incarnation[:-1]) & (episode[1:] == episode[:-1])
    return same & (step[1:] == step[:-1] + 1)


def _follows(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether row t + 1 is a legal successor of row t [T - 1]."""
    incarnation, episode, step = (rows[name].astype(np.int64) for name in IDENTITY)
    ended = rows["is_last"][:-1]
    same = incarnation[1:] == incarnation[:-1]
    following = same & ended & (episode[1:] == episode[:-1] + 1) & (step[1:] == 0)
    reborn = (incarnation[1:] > incarnation[:-1]) & (step[1:] == 0)
    return (_going_on(rows) & ~ended) | following | reborn


def _spans(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """As _Walk.spans, of these rows [T]."""
    cuts = np.flatnonzero(~_going_on(rows))
    first, last = np.r_[0, cuts + 1], np.r_[cuts, len(rows["step"]) - 1]
    incarnation, episode, step = (rows[name].astype(np.int64) for name in IDENTITY)
    return np.stack([incarnation[first], episode[first], step[first], step[last]], axis=1)


def _doubled(spans: NDArray[np.int64]) -> int:
    """How many rows of `spans` [K, 4] there are beyond the first of each identity."""
    if not len(spans):
        return 0
    life, episode, lo, hi = spans[np.lexsort(spans.T[2::-1])].T  # by incarnation, episode, first step
    new = np.r_[False, (np.diff(life) != 0) | (np.diff(episode) != 0)]
    base = np.cumsum(new) << 40  # keeps episodes apart in one running maximum
    before = np.r_[-1, np.maximum.accumulate(hi + base)[:-1]] - base
    known = np.maximum(lo - 1, before)  # steps up to here are counted
    return int((hi - lo + 1 - np.maximum(0, hi - known)).sum())


def _check_order(rows: Mapping[str, NDArray[Any]], *, behind: bool) -> Iterator[tuple[str, str, int]]:
    """(kind, what, rows) for each place where the identities of a stream do not follow each other.

    A second row `behind` a gap of positions must only be a later one than the first.
    """
    for row in np.flatnonzero(~_follows(rows)).tolist():
        before, after = (tuple(int(rows[name][t]) for name in IDENTITY) for t in (row, row + 1))
        if behind and row == 0 and after > before:
            continue
        what = f"{_name(rows, row)} is followed by {_name(rows, row + 1)}"
        if after > before and after[0] == before[0]:
            skipped = after[2] - before[2] - 1 if after[1] == before[1] else 1
            yield "missing", what, max(1, skipped)
        elif after != before:
            yield "order", what, 1


def _name(rows: Mapping[str, NDArray[Any]], row: int) -> str:
    return "incarnation {} episode {} step {}".format(*(int(rows[name][row]) for name in IDENTITY))
