"""Which rows a replay holds, whatever tier they are in: all segments of all shards, beside their owners.

Reads what is committed, nothing of what is live to a sampler: `audit` balances it. Between `ledger`, which
says what left a shard, and the homes of the tiers, which hold the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.admission import MAX_ACTOR, MAX_ENV, stream_of
from replay.catalog import Catalog
from replay.cold import ColdSegment
from replay.far import FarSegment
from replay.history import History
from replay.layout import StoredSegment, Tier
from replay.ledger import Ledger, read_ledger
from replay.raw import open_raw
from replay.rows import RowViews, SegmentHome
from system.errors import DeadlineError, IntegrityError, SchemaError
from system.experience import StreamId
from system.specs import TableSpec

ATTEMPTS = 20
"""Readings of a shard before giving up because its segments come and go faster than they can be read."""
DOUBTS, DOUBT_SECONDS = 6, 0.05
"""Readings of a living shard that does not balance before that is believed, and the time between them."""


class PlainHome(SegmentHome, Protocol):
    """A segment in any tier that shows the columns it has unpacked, narrow ones always."""

    @property
    def plain(self) -> Mapping[str, NDArray[Any]]:
        """Unpacked columns by name, each [S * T, ...]."""
        ...


OPENERS: Mapping[Tier, Callable[[Path, TableSpec], PlainHome]] = {
    "raw": open_raw,
    "cold": ColdSegment,
    "far": FarSegment,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """The committed rows of one slot: `count` rows of a stream from `position` on."""

    home: PlainHome
    table: TableSpec  # what they were written under
    stored: StoredSegment
    slot: int
    stream: StreamId
    position: int
    count: int

    @property
    def end(self) -> int:
        return self.position + self.count

    def column(self, name: str, lo: int, hi: int) -> NDArray[Any]:
        """Rows lo .. hi - 1 of a narrow column [n, ...]."""
        first = self.slot * self.home.slot_rows
        return self.home.plain[name][first + lo : first + hi]

    @property
    def whole_table(self) -> TableSpec:
        """The columns that `rows` gives: all but those in an object store, which are checked on their way."""
        if self.stored.tier != "far":
            return self.table
        here = {name: spec for name, spec in self.table.columns.items() if name in self.home.plain}
        return TableSpec(columns=here, overlay=self.table.overlay)

    def rows(self, lo: int, hi: int) -> dict[str, NDArray[Any]]:
        """Rows lo .. hi - 1 of all columns of `whole_table` [n, ...]. Raises: RowsGone."""
        specs = self.whole_table.all
        if all(name in self.home.plain for name in specs):
            return {name: self.column(name, lo, hi) for name in specs}
        columns = {name: np.empty((hi - lo, *spec.shape), spec.dtype) for name, spec in specs.items()}
        self.home.copy_rows(RowViews(columns), 0, self.slot * self.home.slot_rows + lo, hi - lo)
        return columns


@dataclass(slots=True, kw_only=True)
class ShardReading:
    """One reading of a shard directory. Made by `read_shard`."""

    name: str
    ledger: Ledger
    inserted: int  # the catalog's word, read before the rows
    runs: dict[StreamId, list[StoredRun]]  # own ones by stream, ascending position
    segments: dict[int, StoredSegment]  # own ones by number
    faults: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # where, what

    tops: dict[StreamId, int] = field(init=False)  # positions ever given out, by stream
    skipped: int = field(init=False)  # positions given out without a row
    unaccounted: int = field(init=False)  # rows neither here nor known to have left; negative: more have left

    def __post_init__(self) -> None:
        known = {stream_of(key): cursor.position for key, cursor in self.ledger.cursors.items()}
        forgotten = self.ledger.forgotten  # a stream without a past went on behind all it may have had
        unknown = [s for s, runs in self.runs.items() if s not in known and runs[0].position >= forgotten]
        self.skipped = self.ledger.skipped + forgotten * len(unknown)
        self.tops = known
        for stream, runs in self.runs.items():
            self.tops[stream] = max(known.get(stream, 0), *(run.end for run in runs))
        gone = sum(self.tops.values()) - sum(map(covered, self.runs.values()))
        self.unaccounted = gone - self.skipped - self.ledger.evicted_rows

    def gaps(self) -> Iterator[tuple[StreamId, int, int, bool]]:
        """(stream, first, end, whether the newest rows) of positions behind own rows that have none."""
        for stream, runs in sorted(self.runs.items()):
            at = runs[0].position
            for run in runs:
                if run.position > at:
                    yield stream, at, run.position, False
                at = max(at, run.end)
            if self.tops[stream] > at:
                yield stream, at, self.tops[stream], True


def covered(runs: Iterable[StoredRun]) -> int:
    """Positions that have a row; `runs` of one stream, ascending."""
    rows, at = 0, 0
    for run in runs:
        rows += max(0, run.end - max(at, run.position))
        at = max(at, run.end)
    return rows


def read_shard(directory: Path, index: int, history: History) -> ShardReading:
    """What a shard, alive or not, holds of its own rows, as of one instant.

    Raises: DeadlineError when it evicts faster than it can be read; PreflightError when files or an object
    store cannot be read.
    """
    for attempt in range(ATTEMPTS):
        before, wrong = read_ledger(directory)
        ledger = before or Ledger()
        try:
            inserted = Catalog(directory, writable=False)["inserted"]
        except FileNotFoundError:
            inserted = 0
        found = [s for s in layout.stored_segments(directory, index) if s.number > ledger.evicted_through]
        faults = [(f"{directory.name}/ledger.json", what) for what in wrong]
        chosen = choose(found)  # an interrupted eviction is finished by the owner when it reopens
        runs = open_runs(chosen.values(), history, faults)
        if runs is None or _balance(read_ledger(directory)[0]) != _balance(before):
            continue  # something left meanwhile: these books would not balance
        reading = ShardReading(
            name=directory.name, ledger=ledger, inserted=inserted, runs=by_stream(runs), segments=chosen,
            faults=faults,
        )  # fmt: skip
        if reading.unaccounted and attempt < DOUBTS and layout.lock_held(directory):
            time.sleep(DOUBT_SECONDS)  # a segment leaves its directory a moment before the ledger says so
            continue
        return reading
    raise DeadlineError(
        f"{directory} evicted segments during each of {ATTEMPTS} readings; audit it while actors rest"
    )


def read_adopted(
    root: Path, own: Mapping[int, ShardReading], history: History, faults: list[tuple[str, str]]
) -> dict[int, list[StoredRun]]:
    """Runs that shards hold of other shards' rows, by origin; `own` was read before.

    A segment on the move lies at two places; so it is found here or there, and counts once.
    Raises: as `read_shard`.
    """
    indices = layout.shard_indices(root)
    for _ in range(ATTEMPTS):
        found: dict[int, list[StoredSegment]] = {}
        for directory in (layout.shard_dir(root, index) for index in indices):
            for origin, place in layout.adopted_dirs(directory).items():
                here = own[origin].segments if origin in own else {}
                held = layout.stored_segments(place, origin)
                found.setdefault(origin, []).extend(s for s in held if s.number not in here)
        new = list[tuple[str, str]]()
        opened = {origin: open_runs(choose(held).values(), history, new) for origin, held in found.items()}
        runs = {origin: some for origin, some in opened.items() if some is not None}
        if len(runs) == len(opened):
            faults += new
            return runs
    raise DeadlineError(f"adopted segments under {root} went during each of {ATTEMPTS} readings; try again")


def choose(found: Iterable[StoredSegment]) -> dict[int, StoredSegment]:
    """One form of every segment by number: of the newest epoch, in the most local tier."""
    tiers = list(layout.SUFFIXES)
    order = sorted(found, key=lambda s: (s.number, -s.epoch, tiers.index(s.tier)))
    return {stored.number: stored for stored in reversed(order)}


def open_runs(
    found: Iterable[StoredSegment], history: History, faults: list[tuple[str, str]]
) -> list[StoredRun] | None:
    """The committed rows of segments, the newest first; None when one vanished. What is damaged is named.

    Newest slots first: an older one can only have grown since.
    """
    runs: list[StoredRun] = []
    for stored in sorted(found, key=lambda s: s.number, reverse=True):
        try:
            home, table = _open(stored, history)
            runs += list(_runs_of(stored, home, table))  # all or none
        except FileNotFoundError as error:
            if not stored.path.exists():
                return None
            faults.append((_place(stored), f"it lacks {error.filename}; `dreamfleet replay repair`"))
        except (IntegrityError, SchemaError) as error:
            faults.append((_place(stored), str(error)))
    return runs


def by_stream(runs: Iterable[StoredRun]) -> dict[StreamId, list[StoredRun]]:
    """Runs by stream, ascending position."""
    found: dict[StreamId, list[StoredRun]] = {}
    for run in sorted(runs, key=lambda run: run.position):
        found.setdefault(run.stream, []).append(run)
    return found


def _open(stored: StoredSegment, history: History) -> tuple[PlainHome, TableSpec]:
    home, table = _open_under(OPENERS[stored.tier], stored.path, history.tables)
    if home.replay_id != history.replay:
        raise SchemaError(
            f"it belongs to replay {home.replay_id or 'unknown'}, not to {history.replay}; it was moved "
            "here: bring it in with `dreamfleet replay import`"
        )
    return home, table


def _open_under(
    opener: Callable[[Path, TableSpec], PlainHome], path: Path, tables: Sequence[TableSpec]
) -> tuple[PlainHome, TableSpec]:
    *most, last = tables
    for table in most:
        try:
            return opener(path, table), table
        except SchemaError:
            continue
    return opener(path, last), last


def _runs_of(stored: StoredSegment, home: PlainHome, table: TableSpec) -> Iterator[StoredRun]:
    for slot in reversed(range(len(home.committed))):
        count = int(home.committed[slot])
        if not count:
            continue
        actor, env, start = home.slots[slot].tolist()
        if not (0 < count <= home.slot_rows and 0 <= actor < MAX_ACTOR and 0 <= env < MAX_ENV and start >= 0):
            raise IntegrityError(f"slot {slot} is impossible; `dreamfleet replay repair` takes it out")
        yield StoredRun(
            home=home, table=table, stored=stored, slot=slot, stream=StreamId(actor=actor, env=env),
            position=start, count=count,
        )  # fmt: skip


def _balance(ledger: Ledger | None) -> tuple[int, ...] | None:
    """What of a ledger changes when something leaves the shard."""
    if ledger is None:
        return None
    return ledger.epoch, ledger.evicted_rows, ledger.evicted_through, ledger.skipped, ledger.forgotten


def _place(stored: StoredSegment) -> str:
    return f"{stored.path.parent.name}/{stored.path.name}"
