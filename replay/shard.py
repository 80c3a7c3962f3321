"""One replay shard: takes chunks, refuses what is wrong, drops what is known, waits for credit, commits.

A plain class for one process; `replay.service` puts it on the wire, `deploy` puts it in a Ray actor.
It is not on the read path: readers map its segments themselves (`replay.reader`), even while it is down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from replay import layout
from replay.admission import check_chunk, leaves_gap, rows_known, stream_key
from replay.credits import UNLIMITED
from replay.geometry import Geometry, choose_geometry
from replay.layout import StoredSegment
from replay.log import SegmentLog
from replay.move import copy_in, holders, was_moved
from replay.segment import SegmentFormat, allow_many_files
from replay.upkeep import Durability, Stage, Upkeep, flush
from system.errors import ConfigError, DeadlineError, IntegrityError, PreflightError, RejectedError
from system.experience import Ack, Chunk
from system.metrics import Metrics
from system.specs import TableSpec

log = logging.getLogger(__name__)
OPENING_SECONDS = 2.0
"""Time an opening waits for its segments to be verified; larger replays go on in the background."""
RETRY_SECONDS = 0.2
"""How often a held-back append looks again at a full disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """Made by a shard, taken by the driver, the sampler and the dashboard."""

    index: int = 0
    inserted: int = 0  # rows ever committed, through evictions and restarts
    rows: int = 0  # rows that can be sampled
    nbytes: int = 0  # on disk
    segments: int = 0
    streams: int = 0
    duplicates: int = 0  # rows dropped since this process opened the shard
    rejected: int = 0  # rows refused since then
    evicted: int = 0  # rows ever evicted
    waiting: int = 0  # rows held back right now for want of credit
    granted: int = 0  # `inserted` may reach this
    wait_seconds: float = 0.0  # time appends spent waiting for credit or disk
    epoch: int = 0  # lives of this shard
    incarnations: Mapping[int, int] = field(default_factory=dict[int, int])  # highest seen, by actor


class ShardControl(Protocol):
    """How the limiter's owner reaches a shard; calls return promptly or raise a DreamfleetError."""

    def grant(self, max_inserted: int) -> None: ...
    def stats(self) -> ShardStats: ...


class ReplayShard:
    """Owner of one shard directory. Implements ReplayWriter and ShardControl; safe for many threads."""

    def __init__(
        self,
        root: Path,
        index: int,
        table: TableSpec,
        *,
        capacity_rows: int,
        segment_rows: int | None = None,
        capacity_bytes: int | None = None,
        max_age_seconds: float | None = None,
        durability: Durability = "process",
        flush_seconds: float = 10.0,
        scrub_seconds: float = 0.0,
        stages: Sequence[Stage] = (),
        initial_grant: int = UNLIMITED,
        evolve: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """Open or create shard `index` of the table at `root`.

        `capacity_rows` live rows, `capacity_bytes` on disk and segments up to `max_age_seconds` are kept, the
        oldest segments leave first; `initial_grant` lifetime rows may be inserted before the first `grant`,
        i.e. this shard's part of the prefill. `stages` work over sealed segments; `durability` says what
        acknowledged rows survive (`replay.upkeep`); `evolve` as for `layout.open_table`. Damage that an
        earlier life left costs rows, not the shard: it is quarantined, counted and logged.

        Raises: ConfigError, SchemaError, PreflightError, each naming what to do; IntegrityError when
        table.json is damaged.
        """
        geometry = choose_geometry(table.row_nbytes, capacity_rows, segment_rows)
        fmt = _open_format(root, table, geometry, evolve=evolve)
        layout.make_dir(directory := layout.shard_dir(root, index))
        self.index = index
        self.table = fmt.table
        self.directory = directory
        self.capacity_rows = capacity_rows
        self._lock_file = layout.take_lock(directory)
        try:
            self._log = _open_log(directory, index, fmt, capacity_rows, capacity_bytes, metrics)
        except BaseException:
            self._lock_file.close()
            raise
        self._metrics = metrics
        self._changed = threading.Condition()
        self._adopting = threading.Lock()
        self._flush_acks = durability == "flush"
        self._granted = initial_grant
        self._duplicates = self._rejected = self._waiting = 0
        self._wait_seconds = 0.0
        self._closed = False
        self._evicted = self._log.ledger.evicted_rows
        self._incarnations: dict[int, int] = {}
        for key, cursor in self._log.cursors.items():
            self._saw(key >> 16, cursor.incarnation)
        self._export()
        self._upkeep = Upkeep(
            self._log, self._changed, stages=stages, max_age_seconds=max_age_seconds,
            scrub_seconds=scrub_seconds, durability=durability, flush_seconds=flush_seconds,
        )  # fmt: skip
        self._upkeep.settle(OPENING_SECONDS)

    def append(self, chunks: list[Chunk], timeout: float, *, sound: bool = False) -> Ack:
        """Commit the rows that are new, in order; return when they survive the death of any process.

        `sound`: the chunks have passed `admission.all_sound` and need no check of their own. A refused or
        late call may have committed some leading rows: send all again, they are dropped as duplicates.

        Raises: RejectedError, DeadlineError, PreflightError (disk full until the deadline).
        """
        begin = time.monotonic()
        deadline = begin + timeout
        stored = dropped = 0
        for chunk in chunks:
            try:
                if not sound:
                    check_chunk(self.table, chunk)
                new = self._append_chunk(chunk, deadline)
            except RejectedError as error:
                self.count_rejected(_rows_of(chunk), error)
                raise
            stored += new
            dropped += len(chunk) - new
        if self._flush_acks:
            flush(self._log, self._changed)
        if self._metrics is not None:
            self._metrics["replay_append_seconds"].observe(time.monotonic() - begin)
        return Ack(committed=stored, duplicates=dropped)

    def grant(self, max_inserted: int) -> None:
        """Let lifetime insertions reach `max_inserted`; a smaller value takes unused credit back."""
        with self._changed:
            self._granted = max_inserted
            self._changed.notify_all()

    def stats(self) -> ShardStats:
        with self._changed:
            return ShardStats(
                index=self.index,
                inserted=self._log.inserted,
                rows=self._log.rows,
                nbytes=self._log.nbytes,
                segments=self._log.segments,
                streams=len(self._log.cursors),
                duplicates=self._duplicates,
                rejected=self._rejected,
                evicted=self._log.ledger.evicted_rows,
                waiting=self._waiting,
                granted=self._granted,
                wait_seconds=self._wait_seconds,
                epoch=self._log.catalog["epoch"],
                incarnations=dict(self._incarnations),
            )

    def flush(self) -> None:
        """Bring everything acknowledged to the device: survives power loss when this returns."""
        flush(self._log, self._changed)

    def settle(self, timeout: float) -> bool:
        """Wait until all background work is done: verified, sealed, staged. False when that takes longer."""
        return self._upkeep.settle(timeout)

    def scrub(self) -> None:
        """Verify everything at rest again, in the background."""
        self._upkeep.scrub_now()

    @property
    def lost_rows(self) -> int:
        """Acknowledged rows that this opening of the shard found damaged or gone."""
        with self._changed:
            return self._log.lost_rows

    def sealed(self) -> list[StoredSegment]:
        """The sealed segments, the oldest first."""
        with self._changed:
            return [entry.stored for entry in self._log.entries() if entry.sealed]

    def adopt(self, segment: Path) -> int:
        """Take over a sealed segment of another shard by a checked copy; return its rows, 0 if it is here.

        Raises: as `move.copy_in`.
        """
        with self._adopting:
            replay_id = self._log.format.replay_id
            schemas = {table.digest for table in self._log.format.tables}
            entry = copy_in(segment, self.directory, self.index, schemas, replay_id)
            if entry is None:
                return 0
            with self._changed:
                self._require_open()
                self._log.adopt(entry)
                self._log.vouch()
                self._log.changed()
                self._export()
            return entry.rows

    def let_go(self, origin: int, stem: str) -> int:
        """Evict a segment that another shard has adopted; return its rows.

        Raises: ConfigError when it is not the oldest here; IntegrityError when nobody else holds it.
        """
        with self._changed:
            entry = self._log.find(origin, stem)
            if entry is None:
                raise ConfigError(f"segment {stem} must be the oldest of shard {self.index} to be let go")
            if not {*holders(self.directory.parent, origin, stem)} - {self.index}:
                raise IntegrityError(f"segment {stem} of shard {origin} must be held by another shard first")
            self._log.evict(entry)
            self._export()
            return entry.rows

    def clear(self) -> None:
        """Evict all rows; streams go on where they are, positions and lifetime counts with them."""
        with self._changed:
            self._log.clear()
            self._export()

    def close(self) -> None:
        """Wake waiting appends with DeadlineError and release the shard. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._upkeep.stop()
        with self._changed:
            self._log.close()
        self._lock_file.close()

    # ---- one chunk --------------------------------------------------------------------------------

    def _append_chunk(self, chunk: Chunk, deadline: float) -> int:
        """Commit the new rows of a checked chunk, as credit allows; return how many were new."""
        key, total = stream_key(chunk.stream), len(chunk)
        stored = 0
        with self._changed:
            while True:
                self._require_open()
                # Looked up each round: while this append waited, another one may have sent the same rows.
                known = self._known(chunk, key)
                if known == total:
                    self._duplicates += total - stored
                    self._count("replay_rows_duplicate_total", total - stored)
                    return stored
                room = min(total - known, self._granted - self._log.inserted)
                if room <= 0:
                    self._wait_credit(chunk, total - known, deadline)
                    continue
                if chunk.continues and not known and leaves_gap(self._log.cursors.get(key), chunk):
                    self._log.skip(key)
                remaining = max(deadline - time.monotonic(), 0.0)
                try:
                    count = self._log.append(
                        chunk.stream, chunk.columns, known, known + room, max(remaining, 1.0)
                    )
                except PreflightError as error:
                    self._wait_disk(error, deadline)
                    continue
                stored += count
                self._saw(chunk.stream.actor, self._log.cursors[key].incarnation)
                self._count("replay_rows_inserted_total", count)
                self._export()

    def _known(self, chunk: Chunk, key: int) -> int:
        newest = self._incarnations.get(chunk.stream.actor, -1)
        return rows_known(self._log.cursor(key), newest, chunk)

    def _wait_credit(self, chunk: Chunk, rows: int, deadline: float) -> None:
        begin = time.monotonic()
        if begin >= deadline:
            raise DeadlineError(
                f"shard {self.index} held {rows} rows of {chunk.stream} back: "
                f"{self._log.inserted} rows inserted, "
                f"{self._granted} granted. The learner has to train first (train ratio); send them again"
            )
        self._waiting += rows
        self._log.catalog["waiting"] = self._waiting
        self._log.catalog["inserted"] = self._log.inserted  # what damaged it would hold credit back for good
        try:
            self._changed.wait(deadline - begin)
        finally:
            self._waiting -= rows
            self._log.catalog["waiting"] = self._waiting
            self._waited(time.monotonic() - begin)

    def _wait_disk(self, error: PreflightError, deadline: float) -> None:
        begin = time.monotonic()
        if begin >= deadline:
            raise error
        log.warning("append held back by the disk", extra={"shard": self.index, "cause": str(error)})
        self._changed.wait(min(RETRY_SECONDS, deadline - begin))
        self._waited(time.monotonic() - begin)

    def _waited(self, seconds: float) -> None:
        self._wait_seconds += seconds
        self._count("replay_insert_wait_seconds_total", seconds)

    def _require_open(self) -> None:
        if self._closed:
            raise DeadlineError(f"shard {self.index} is closing; send the rows again once it is back")

    def _saw(self, actor: int, incarnation: int) -> None:
        self._incarnations[actor] = max(self._incarnations.get(actor, -1), incarnation)

    # ---- counters ---------------------------------------------------------------------------------

    def count_rejected(self, rows: int, error: RejectedError) -> None:
        """Count rows that were refused; the service counts here what it could not even decode."""
        with self._changed:
            self._rejected += rows
        if self._metrics is not None:
            self._metrics.labels("replay_rows_rejected_total", reason=error.reason).inc(rows)
        log.warning("rows rejected", extra={"shard": self.index, "reason": error.reason, "why": str(error)})

    def _count(self, name: str, amount: float) -> None:
        if self._metrics is not None and amount:
            self._metrics[name].inc(amount)

    def _export(self) -> None:
        evicted = self._log.ledger.evicted_rows
        self._count("replay_rows_evicted_total", evicted - self._evicted)
        self._evicted = evicted
        if self._metrics is None:
            return
        self._metrics["replay_rows"].set(self._log.rows)
        self._metrics["replay_bytes"].set(self._log.nbytes)
        self._metrics["replay_segments"].set(self._log.segments)


def _open_format(root: Path, table: TableSpec, geometry: Geometry, *, evolve: bool) -> SegmentFormat:
    """Open or make the table; what its segments look like from now on, and looked like before."""
    layout.open_table(root, table, evolve=evolve)
    history = layout.read_history(root)
    former = [other for other in history.tables if other.digest != table.digest]
    return SegmentFormat(history.filled(table), geometry, history.replay, former)


def _open_log(
    directory: Path,
    index: int,
    fmt: SegmentFormat,
    capacity_rows: int,
    capacity_bytes: int | None,
    metrics: Metrics | None,
) -> SegmentLog:
    """Take over the directory of a shard; moves that a kill cut off are finished."""
    allow_many_files()
    about = {"format": layout.FORMAT, "index": index, "capacity_rows": capacity_rows}
    about |= {"slots": fmt.geometry.slots, "rows": fmt.geometry.rows}
    layout.write_json(directory / "shard.json", about)
    segments = SegmentLog(
        directory, index, fmt, capacity_rows=capacity_rows, capacity_bytes=capacity_bytes, metrics=metrics
    )
    for entry in list(segments.entries()):
        name = entry.stored.origin, entry.stored.stem
        if segments.find(*name) is entry and was_moved(directory.parent, index, *name):
            segments.evict(entry)
    return segments


def _rows_of(chunk: Chunk) -> int:
    """Rows of a chunk that may be malformed."""
    reward = chunk.columns.get("reward")
    return int(reward.shape[0]) if reward is not None and reward.ndim else 1
