"""The segments of one shard as a log: rows go in at the end, whole segments leave at the beginning.

Single-threaded except for one background worker that makes the next segment ahead of need and deletes
evicted ones. The shard (`replay.shard`) calls it under its own lock, and so does `replay.upkeep`, which seals
what no longer grows; `replay.segment` is one segment, `replay.recovery` what an earlier life left.

A stream's rows lie in slots. Slots are given out in order, so a stream's later rows never lie in an
earlier segment. Any number of streams may come and go: a stream that needs room takes the next free slot, one
that falls silent loses its slot when the log has moved on, so that its segment can be sealed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from pathlib import Path

from replay import layout
from replay.admission import Cursor, stream_key
from replay.catalog import Catalog
from replay.geometry import CHUNK_ROWS
from replay.layout import StoredSegment
from replay.ledger import keep_reserve, save_ledger
from replay.quarantine import quarantine
from replay.recovery import Entry, bytes_on_disk, recover
from replay.segment import Segment, SegmentFormat
from replay.vouching import write_verified
from system.errors import DeadlineError, PreflightError
from system.experience import Columns, StreamId
from system.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tail:
    """The slot a stream is filling."""

    segment: Segment
    slot: int
    start: int  # position of the slot's first row
    used: int
    touched: int  # lifetime rows of the shard at its newest append


class SegmentLog:
    """Owner of the segments in one directory. At most one process may hold it (`layout.take_lock`)."""

    def __init__(
        self,
        directory: Path,
        index: int,
        fmt: SegmentFormat,
        *,
        capacity_rows: int,
        capacity_bytes: int | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Raises: PreflightError when the directory cannot be used."""
        self.directory = directory
        self.format = fmt
        self._index = index
        self._capacity = capacity_rows
        self._capacity_bytes = capacity_bytes
        self._metrics = metrics
        self._tails: dict[int, _Tail] = {}  # by stream key
        self._newest: Segment | None = None
        self._next_slot = 0
        self._spare: Future[Segment] | None = None
        self._dirty: dict[int, Segment] = {}  # written since the last flush, by number
        found = recover(directory, index, fmt, metrics)
        self.losses = found.losses
        self.ledger = found.ledger
        self.cursors = found.ledger.cursors
        self._entries = found.entries  # the shard's own, by number, ascending
        self._adopted = found.adopted  # oldest first
        self._own_rows = sum(entry.rows for entry in found.entries.values())
        self.lost_rows = 0  # found damaged or gone since the opening
        self.catalog = Catalog(directory, writable=True)
        self._balance(found.unknown_rows)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segments")
        self._prepare_spare()

    @property
    def inserted(self) -> int:
        """Rows ever committed, through evictions, losses and restarts."""
        return self.ledger.evicted_rows + self._own_rows

    @property
    def rows(self) -> int:
        """Rows that can be sampled, adopted ones included."""
        return self._own_rows + sum(entry.rows for entry in self._adopted)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries())

    @property
    def segments(self) -> int:
        return len(self._entries) + len(self._adopted)

    def entries(self) -> Iterator[Entry]:
        """All segments, the oldest first, adopted ones before the shard's own."""
        yield from self._adopted
        yield from self._entries.values()

    def append(self, stream: StreamId, columns: Columns, start: int, stop: int, timeout: float) -> int:
        """Store rows start..stop of `columns` [T, ...], as many as fit one slot; return how many.

        The rows are stored when this returns: data first, the commit word last.
        Raises: PreflightError when no segment can be made; DeadlineError when that takes too long.
        """
        key, most = stream_key(stream), self.format.geometry.rows
        self._make_room(min(stop - start, most))  # first of all: on a full disk it frees what a slot needs
        tail = self._tails.get(key)
        if tail is None:
            tail = self._open_slot(stream, key, timeout)
        count = min(stop - start, most - tail.used)
        tail.segment.append(tail.slot, tail.used, columns, start, start + count)
        tail.used += count
        self._entries[tail.segment.number].rows += count
        self._own_rows += count
        tail.touched = self.inserted
        self._dirty[tail.segment.number] = tail.segment
        self.cursors[key] = Cursor.after(columns, start + count - 1, tail.start + tail.used)
        if tail.used == most:
            del self._tails[key]
        self.catalog["inserted"] = self.inserted
        self.catalog["rows"] = self.rows
        return count

    def skip(self, key: int) -> None:
        """Leave a gap of one position: what comes next in this stream is no successor of its newest row."""
        self._tails.pop(key, None)
        cursor = self.cursors[key]
        self.cursors[key] = replace(cursor, position=cursor.position + 1, torn=True)
        self.ledger.skipped += 1
        save_ledger(self.directory, self.ledger)

    def cursor(self, key: int) -> Cursor | None:
        """The newest row of a stream; torn for one whose past may have been lost, None for a new one."""
        known = self.cursors.get(key)
        if known is None and self.ledger.forgotten:
            return Cursor.unknown(self.ledger.forgotten)
        return known

    def take_dirty(self) -> list[Segment]:
        """Segments written since the last call; flushing them makes everything acknowledged durable."""
        dirty, self._dirty = list(self._dirty.values()), {}
        return dirty

    def frozen(self) -> Entry | None:
        """The oldest segment that no longer grows and is not sealed."""
        growing = {tail.segment.number for tail in self._tails.values()}
        if self._newest is not None and self._next_slot < self.format.geometry.slots:
            growing.add(self._newest.number)
        for entry in self.entries():
            if not entry.sealed and (
                entry.stored.origin != self._index or entry.stored.number not in growing
            ):
                return entry
        return None

    def find(self, origin: int, stem: str) -> Entry | None:
        """The segment of this name; of the shard's own only the oldest, which alone may leave by itself."""
        own = next(iter(self._entries.values()), None)
        for entry in [*self._adopted, *([own] if own else [])]:
            if (entry.stored.origin, entry.stored.stem) == (origin, stem):
                return entry
        return None

    def holds(self, entry: Entry) -> bool:
        """Whether a segment is still in the log, and in the form it had."""
        return any(other is entry for other in self.entries())

    def replace(self, entry: Entry, draft: Path, tier: layout.Tier) -> None:
        """Publish another form of a sealed segment, complete in the scratch directory; discard the old."""
        old = entry.path
        new = layout.tier_path(old, tier)
        draft.rename(new)
        doomed = layout.discard(old.parent, old, overlay=False)
        entry.stored = StoredSegment(
            path=new, number=entry.stored.number, epoch=entry.stored.epoch, tier=tier,
            origin=entry.stored.origin,
        )  # fmt: skip
        entry.segment, entry.nbytes = None, bytes_on_disk(new)
        self.changed()
        self._worker.submit(layout.remove, doomed)
        log.info("segment changed tier", extra={"segment": new.name, "bytes": entry.nbytes})

    def lose(self, entry: Entry, reason: str, what: str) -> None:
        """Put a damaged segment into quarantine; its streams go on behind it."""
        quarantine(entry.path.parent, entry.path, reason, what, self._metrics)
        if entry.stored.origin == self._index:
            self.ledger.lost_rows += entry.rows
        self._count_lost(entry.rows)
        self.release(entry)

    def adopt(self, entry: Entry) -> None:
        """Take over a published sealed segment of another shard."""
        self._adopted.append(entry)
        self.changed()

    def release(self, entry: Entry) -> None:
        """Let go of any segment, e.g. one that another shard adopted: its rows count as evicted here."""
        if entry.stored.origin == self._index:
            self.ledger.evicted_rows += entry.rows
            self._own_rows -= entry.rows
            del self._entries[entry.stored.number]
        else:
            self._adopted.remove(entry)
        self._drop(entry)
        save_ledger(self.directory, self.ledger)

    def changed(self) -> None:
        """The set of segments is another one: readers list again."""
        self.catalog["rows"] = self.rows
        self.catalog["generation"] += 1

    def vouch(self) -> None:
        """Write down which segments are verified or were filled in this life, and where streams are."""
        names = [str(e.path.relative_to(self.directory)) for e in self.entries() if e.verified]
        write_verified(self.directory, self.ledger.epoch, names)
        save_ledger(self.directory, self.ledger)

    def close(self) -> None:
        """Stop the worker and drop the unused spare segment; the rows stay."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.cancel()
        self._worker.shutdown(wait=True)
        if spare is not None and not spare.cancelled() and spare.exception() is None:
            path = spare.result().path
            layout.remove((path, layout.overlay_path(path)))
        with contextlib.suppress(PreflightError):  # a disk that is full: the segments tell as much
            save_ledger(self.directory, self.ledger)

    # ---- room -------------------------------------------------------------------------------------

    def _open_slot(self, stream: StreamId, key: int, timeout: float) -> _Tail:
        segment = self._newest
        if segment is None or self._next_slot == self.format.geometry.slots:
            segment = self._adopt_spare(timeout)
        cursor = self.cursor(key)
        if cursor is not None and key not in self.cursors:
            self.ledger.skipped += cursor.position
        tail = _Tail(segment, self._next_slot, cursor.position if cursor else 0, 0, self.inserted)
        segment.slots[tail.slot] = (stream.actor, stream.env, tail.start)
        self._next_slot += 1
        self._tails[key] = tail
        self.catalog["streams"] = len(self._tails)
        return tail

    def _adopt_spare(self, timeout: float) -> Segment:
        if self._spare is None:
            self._prepare_spare()
        spare = self._spare
        assert spare is not None
        try:
            segment = spare.result(timeout)
        except FutureTimeout as error:
            raise DeadlineError(
                f"no new replay segment within {timeout:.1f} s; the disk under {self.directory} is too slow"
            ) from error
        except PreflightError:
            self._spare = None  # tried anew at the next append
            raise
        segment.publish(self.directory)
        stored = StoredSegment(
            path=segment.path, number=segment.number, epoch=self.ledger.epoch, tier="raw", origin=self._index
        )
        self._entries[segment.number] = Entry(
            stored=stored, rows=0, nbytes=self.format.nbytes, committed=(), segment=segment, verified=True,
            born=time.time(),
        )  # fmt: skip
        self._newest, self._next_slot, self._spare = segment, 0, None
        self._close_silent()
        self._prepare_spare()
        self.changed()
        return segment

    def _close_silent(self) -> None:
        """Take the slots of streams that fell silent while the log moved on by segments.

        Rows of others since its newest append tell silence from a long round of many streams.
        """
        patience = 2 * self.format.geometry.total + 2 * CHUNK_ROWS * len(self._tails)
        oldest = self.inserted - patience
        self._tails = {k: t for k, t in self._tails.items() if t.touched >= oldest}

    def _prepare_spare(self) -> None:
        newest = max(self._entries, default=self.ledger.evicted_through)
        newest = max(newest, self.ledger.evicted_through)
        self._spare = self._worker.submit(
            self.format.create, self.directory, newest + 1, self.ledger.epoch, newest
        )

    # ---- eviction ---------------------------------------------------------------------------------

    def clear(self) -> None:
        """Evict everything."""
        while (entry := self._oldest()) is not None:
            self.evict(entry)

    def evict_older(self, born: float) -> None:
        """Evict sealed segments whose first row is older than the Unix time `born`."""
        while (entry := self._oldest()) is not None and entry.sealed and entry.born < born:
            self.evict(entry)

    def _make_room(self, count: int) -> None:
        while (entry := self._oldest()) is not None and self._over(count):
            if (
                entry.segment is not None
                and entry.segment is self._newest
                and self.rows + count <= self._capacity
            ):
                return  # bytes alone never take the segment that is being filled
            self.evict(entry)

    def _over(self, count: int) -> bool:
        if self.rows + count > self._capacity:
            return True
        return self._capacity_bytes is not None and self.nbytes > self._capacity_bytes

    def _oldest(self) -> Entry | None:
        heads = [*self._adopted[:1], *(self._entries[n] for n in list(self._entries)[:1])]
        return min(heads, key=lambda entry: entry.born, default=None)

    def evict(self, entry: Entry) -> None:
        """Forget the oldest segment. The ledger goes first: a crash in between is finished at reopening."""
        if entry.stored.origin == self._index:
            before = self.ledger.evicted_rows, self.ledger.evicted_through
            self.ledger.evicted_rows += entry.rows
            self.ledger.evicted_through = entry.stored.number
            try:
                save_ledger(self.directory, self.ledger)
            except PreflightError:
                self.ledger.evicted_rows, self.ledger.evicted_through = before
                raise
            self._own_rows -= entry.rows
            del self._entries[entry.stored.number]
        else:
            self._adopted.remove(entry)
        self._drop(entry)
        log.info("segment evicted", extra={"segment": entry.path.name, "rows": entry.rows})

    def _drop(self, entry: Entry) -> None:
        if entry.stored.origin == self._index:
            number = entry.stored.number
            self._tails = {k: t for k, t in self._tails.items() if t.segment.number != number}
            self._dirty.pop(number, None)
            if self._newest is not None and self._newest.number == number:
                self._newest = None
        doomed = layout.discard(entry.path.parent, entry.path)
        self.changed()
        self._worker.submit(layout.remove, doomed)
        self._worker.submit(keep_reserve, self.directory)

    # ---- opening ----------------------------------------------------------------------------------

    def _balance(self, unknown_rows: int) -> None:
        """Set what left against what is here: positions only grow, so they tell the rows ever committed.

        Up to `unknown_rows` more lay in segments of which nothing is known; the counter of readers may tell.
        """
        ledger = self.ledger
        inserted = sum(cursor.position for cursor in self.cursors.values()) - ledger.skipped
        counted = self.catalog["inserted"] - inserted
        if 0 < counted <= unknown_rows:
            inserted += counted
            ledger.skipped -= counted
        lost = inserted - ledger.evicted_rows - self._own_rows
        if lost > 0:
            ledger.evicted_rows += lost
            ledger.lost_rows += lost if self.losses else 0
            if self.losses:
                self._count_lost(lost)
        elif ledger.lost_rows:  # a repair brought rows back
            back = min(-lost, ledger.lost_rows)
            ledger.evicted_rows -= back
            ledger.lost_rows -= back
        save_ledger(self.directory, ledger)
        keep_reserve(self.directory)
        if not 0 <= self.catalog["generation"] < 1 << 62:
            self.catalog["generation"] = 0
        self.catalog["epoch"] = ledger.epoch
        self.catalog["inserted"] = self.inserted
        self.catalog["waiting"] = 0
        self.changed()

    def _count_lost(self, rows: int) -> None:
        self.lost_rows += rows
        if self._metrics is not None:
            self._metrics["replay_rows_lost_total"].inc(rows)
