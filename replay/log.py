"""The segments of one shard as a log: rows go in at the end, whole segments leave at the beginning.

Single-threaded except for one background worker that makes the next segment ahead of need and deletes
evicted ones. The shard (`replay.shard`) calls it under its own lock; `replay.segment` is one segment.

A stream's rows lie in slots. Slots are given out in order, so a stream's later rows never lie in an
earlier segment, and its live rows are always one gapless range of positions. Any number of streams
may come and go: a stream that needs room takes the next free slot.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path

from replay import layout
from replay.admission import MAX_ACTOR, MAX_ENV, Cursor, stream_key, stream_of
from replay.catalog import Catalog
from replay.holes import release_unused
from replay.segment import Segment, SegmentFormat
from system.errors import DeadlineError, IntegrityError, PreflightError
from system.experience import Columns, StreamId

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """A live segment as its owner counts it; the maps are held only while it can still grow."""

    path: Path
    rows: int
    nbytes: int


@dataclass(slots=True)
class _Tail:
    """The slot a stream is filling."""

    segment: Segment
    slot: int
    start: int  # position of the slot's first row
    used: int


class SegmentLog:
    """Owner of the segments in one directory. At most one process may hold it (`layout.take_lock`)."""

    def __init__(self, directory: Path, fmt: SegmentFormat, capacity_rows: int) -> None:
        self._directory = directory
        self._format = fmt
        self._capacity = capacity_rows
        self._entries: dict[int, _Entry] = {}  # by segment number, ascending
        self._tails: dict[int, _Tail] = {}  # by stream key
        self._newest: Segment | None = None
        self._next_slot = 0
        self._evicted_rows = 0
        self._evicted_through = -1
        self._spare: Future[Segment] | None = None
        self.cursors: dict[int, Cursor] = {}
        self.rows = 0
        self.catalog = Catalog(directory, writable=True)
        self._recover()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segments")
        self._prepare_spare()

    @property
    def inserted(self) -> int:
        """Rows ever committed, through evictions and restarts."""
        return self._evicted_rows + self.rows

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def segments(self) -> int:
        return len(self._entries)

    def append(self, stream: StreamId, columns: Columns, start: int, stop: int, timeout: float) -> int:
        """Store rows start..stop of `columns` [T, ...], as many as fit one slot; return how many.

        The rows are stored when this returns: data first, the commit word last.
        Raises: PreflightError when no segment can be made; DeadlineError when that takes too long.
        """
        key = stream_key(stream)
        tail = self._tails.get(key)
        if tail is None or tail.used == self._format.geometry.rows:
            tail = self._open_slot(stream, key, timeout)
        count = min(stop - start, self._format.geometry.rows - tail.used)
        self._make_room(count)
        if key not in self._tails:  # its slot went with an evicted segment
            return self.append(stream, columns, start, stop, timeout)
        tail.segment.append(tail.slot, tail.used, columns, start, start + count)
        tail.used += count
        self._entries[tail.segment.number].rows += count
        self.rows += count
        self.cursors[key] = Cursor.after(columns, start + count - 1, tail.start + tail.used)
        self.catalog["inserted"] = self.inserted
        self.catalog["rows"] = self.rows
        return count

    def flush(self) -> None:
        """Write everything committed so far to the device. Segments that are full were not flushed before."""
        for number, entry in self._entries.items():
            mapped = self._newest if self._newest and self._newest.number == number else None
            (mapped or Segment.open(entry.path, self._format.table, writable=True)).flush()

    def close(self) -> None:
        """Stop the worker and drop the unused spare segment; the rows stay."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.cancel()
        self._worker.shutdown(wait=True)
        if spare is not None and not spare.cancelled() and spare.exception() is None:
            path = spare.result().path
            layout.remove((path, layout.overlay_path(path)))

    # ---- room -------------------------------------------------------------------------------------

    def _open_slot(self, stream: StreamId, key: int, timeout: float) -> _Tail:
        segment = self._newest
        if segment is None or self._next_slot == self._format.geometry.slots:
            segment = self._adopt_spare(timeout)
        cursor = self.cursors.get(key)
        tail = _Tail(segment, self._next_slot, cursor.position if cursor else 0, 0)
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
                f"no new replay segment within {timeout:.1f} s; the disk under {self._directory} is too slow"
            ) from error
        except PreflightError:
            self._spare = None  # tried anew at the next append
            raise
        segment.publish(self._directory)
        self._entries[segment.number] = _Entry(segment.path, 0, self._format.nbytes)
        self._newest, self._next_slot, self._spare = segment, 0, None
        self._prepare_spare()
        self.catalog["generation"] += 1
        return segment

    def _prepare_spare(self) -> None:
        newest = max(self._entries, default=self._evicted_through)
        self._spare = self._worker.submit(
            self._format.create, self._directory, newest + 1, self._epoch, newest
        )

    def _make_room(self, count: int) -> None:
        while self.rows + count > self._capacity and self._entries:
            self._evict(next(iter(self._entries)))

    def _evict(self, number: int) -> None:
        """Forget the oldest segment. The ledger goes first: a crash in between is finished at reopening."""
        entry = self._entries[number]
        self._save_ledger(self._evicted_rows + entry.rows, number)
        self._evicted_rows += entry.rows
        self._evicted_through = number
        del self._entries[number]
        self.rows -= entry.rows
        self._tails = {k: t for k, t in self._tails.items() if t.segment.number != number}
        if self._newest is not None and self._newest.number == number:
            self._newest = None
        doomed = layout.discard(self._directory, entry.path)
        self.catalog["generation"] += 1
        self.catalog["rows"] = self.rows
        self._worker.submit(layout.remove, doomed)
        log.info("segment evicted", extra={"segment": entry.path.name, "rows": entry.rows})

    # ---- life and death ---------------------------------------------------------------------------

    def _save_ledger(self, evicted_rows: int, evicted_through: int) -> None:
        cursors = {
            str(stream_of(key)): [key, c.position, c.incarnation, c.episode, c.step, int(c.is_last)]
            for key, c in self.cursors.items()
        }
        layout.write_json(
            self._directory / "ledger.json",
            {
                "format": layout.FORMAT,
                "epoch": self._epoch,
                "evicted_rows": evicted_rows,
                "evicted_through": evicted_through,
                "cursors": cursors,
            },
        )

    def _load_ledger(self) -> None:
        path = self._directory / "ledger.json"
        ledger = layout.read_json(path)
        self._epoch = 1
        if ledger is None:
            return
        try:
            self._epoch = int(ledger["epoch"]) + 1
            self._evicted_rows = int(ledger["evicted_rows"])
            self._evicted_through = int(ledger["evicted_through"])
            for key, position, incarnation, episode, step, is_last in ledger["cursors"].values():
                self.cursors[int(key)] = Cursor(
                    position=position,
                    incarnation=incarnation,
                    episode=episode,
                    step=step,
                    is_last=bool(is_last),
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{path} lacks what a ledger holds ({error!r}); move {self._directory} away "
                "to start an empty shard"
            ) from error

    def _recover(self) -> None:
        """Take over what an earlier life left: finish its evictions, believe its commit words."""
        layout.sweep(self._directory)
        self._load_ledger()
        for number, path in layout.segment_paths(self._directory).items():
            segment = Segment.open(path, self._format.table)
            committed = segment.committed.tolist()
            if number <= self._evicted_through or not any(committed):
                layout.remove(layout.discard(self._directory, path))
                continue
            for slot, used in enumerate(committed):
                self._recover_slot(segment, slot, used)
            release_unused(segment)  # its owner is dead; streams go on in segments of this epoch
            rows = sum(committed)
            self._entries[number] = _Entry(path, rows, self._format.nbytes)
            self.rows += rows
        self._save_ledger(self._evicted_rows, self._evicted_through)
        self.catalog["epoch"] = self._epoch
        self.catalog["inserted"] = self.inserted
        self.catalog["rows"] = self.rows
        self.catalog["waiting"] = 0
        self.catalog["generation"] += 1

    def _recover_slot(self, segment: Segment, slot: int, used: int) -> None:
        if used == 0:
            return
        actor, env, start = segment.slots[slot].tolist()
        sane = (
            0 < used <= segment.geometry.rows and 0 <= actor < MAX_ACTOR and 0 <= env < MAX_ENV and start >= 0
        )
        if not sane:
            raise IntegrityError(
                f"{segment.path} slot {slot} claims {used} rows of actor {actor} env {env} from position "
                f"{start}; the segment is damaged: move it and its overlay out of the shard and start again"
            )
        key = stream_key(StreamId(actor=actor, env=env))
        known = self.cursors.get(key)
        if known is None or start + used > known.position:
            columns = {name: array[slot] for name, array in segment.columns.items()}
            self.cursors[key] = Cursor.after(columns, used - 1, start + used)
