"""The in-memory twin of shard and reader: same contracts, same rules, one process, nothing on disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.admission import Cursor, check_chunk, leaves_gap, rows_known, stream_key
from replay.batch_spec import BatchSpec
from replay.index import Run, StartIndex
from replay.limiter import RateLimiter
from replay.plans import Planner
from replay.reader import check_fits, check_ring, why_waiting
from replay.rows import MemoryHome
from replay.sampler import Sampler
from replay.selection import Sampling
from replay.write_back import apply
from system import experience
from system.errors import DeadlineError
from system.experience import Ack, Chunk, WriteBack
from system.specs import TableSpec

BLOCK_ROWS = 64


class _Block(MemoryHome):
    """The rows of one run."""

    def __init__(self, table: TableSpec) -> None:
        self.columns: dict[str, NDArray[Any]] = {
            name: np.zeros((BLOCK_ROWS, *spec.shape), spec.dtype) for name, spec in table.all.items()
        }
        super().__init__(self.columns, table.overlay)
        self.used = 0


class MemoryReplay:
    """ReplayWriter and ReplayReader over memory; safe for one learner thread and many actor threads."""

    def __init__(
        self,
        table: TableSpec,
        *,
        capacity_rows: int,
        seed: int,
        limiter: RateLimiter,
        batch: int = 0,
        length: int = 0,
        context: int = 0,
        spec: BatchSpec | None = None,
        sampling: Sampling | None = None,
        sources: Mapping[str, tuple[MemoryReplay, float]] | None = None,
        own_weight: float = 1.0,
        ring: int = 3,
    ) -> None:
        """Keep `capacity_rows` rows, sample as LocalReader does; `sources` must not change any more.

        Raises: ConfigError as LocalReader.
        """
        check_ring(ring)
        self._spec = spec = spec or BatchSpec(batch=batch, length=length, context=context)
        check_fits(capacity_rows, BLOCK_ROWS, spec.span)
        limiter.check_update(spec.rows)
        self.limiter = limiter
        self.dropped_write_backs = self.dropped_priorities = 0
        self._table = table
        self._capacity = capacity_rows
        self._index: StartIndex[_Block] = StartIndex(spec.span)
        indices = [(self._index, own_weight)]
        indices += [(other.index_for(spec.span), weight) for other, weight in (sources or {}).values()]
        self._planner = Planner(table.all, spec, indices, sampling=sampling or Sampling(), seed=seed)
        self._planner.look()
        self._sampler = Sampler(table.all, spec, self._planner, ring=ring)
        self._blocks: deque[tuple[int, _Block]] = deque()  # (stream key, block), oldest first
        self._tails: dict[int, Run[_Block]] = {}
        self._cursors: dict[int, Cursor] = {}
        self._incarnations: dict[int, int] = {}
        self._inserted = self._waiting = 0
        self._changed = threading.Condition()

    def append(self, chunks: list[Chunk], timeout: float) -> Ack:
        """As ReplayShard.append. Raises: RejectedError, DeadlineError."""
        deadline = time.monotonic() + timeout
        stored = dropped = 0
        for chunk in chunks:
            check_chunk(self._table, chunk)
            new = self._append_chunk(chunk, deadline)
            stored += new
            dropped += len(chunk) - new
        return Ack(committed=stored, duplicates=dropped)

    def sample(self, timeout: float) -> experience.Sequence:
        """As LocalReader.sample. Raises: DeadlineError."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._observe()
            while not self.limiter.can_train(self._spec.rows):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError(f"no batch for {timeout:.1f} s: {self._why_waiting()}")
                self._changed.wait(left)
                self._observe()
            sequence = self._sampler.draw()
            self.limiter.record(self._spec.rows)
            self._changed.notify_all()
            return sequence

    def write_back(self, rows: WriteBack) -> int:
        """As LocalReader.write_back. Raises: SchemaError."""
        with self._changed:
            done = apply(rows, self._planner, self._table, self._spec.step)
            self.dropped_write_backs += done.dropped
            self.dropped_priorities += done.stale
            return done.rows

    def index_for(self, length: int) -> StartIndex[_Block]:
        """The rows as they are now, for sequences of `length` rows of another reader."""
        index: StartIndex[_Block] = StartIndex(length)
        with self._changed:
            for runs in self._index.streams.values():
                for run in runs.runs:
                    count = run.end - run.start
                    index.add(runs.shard, runs.stream, run.start, run.home, run.first, count)
        return index

    def pump(self) -> None:
        """Nothing to send: appends look at the limiter themselves."""

    def counts(self) -> tuple[int, int]:
        """(lifetime rows inserted, live rows)."""
        with self._changed:
            return self._inserted, self._index.rows

    def state(self) -> dict[str, Any]:
        """Limiter and sampler as JSON values; the rows themselves are not part of it."""
        with self._changed:
            self._observe()
            return {"limiter": self.limiter.state(), "sampler": self._sampler.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        with self._changed:
            self._observe()
            self.limiter.load(state["limiter"])
            self._sampler.load(state["sampler"])
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing to release."""

    # ---- inside -----------------------------------------------------------------------------------

    def _append_chunk(self, chunk: Chunk, deadline: float) -> int:
        key, total, stored = stream_key(chunk.stream), len(chunk), 0
        with self._changed:
            while True:
                newest = self._incarnations.get(chunk.stream.actor, -1)
                known = rows_known(self._cursors.get(key), newest, chunk)
                if known == total:
                    return stored
                self._observe()
                room = min(total - known, self.limiter.insert_budget() - self._inserted)
                if room > 0 and chunk.continues and not known and leaves_gap(self._cursors.get(key), chunk):
                    self._skip(key)
                if room > 0:
                    stored += self._store(key, chunk, known, room)
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError(
                        f"{total - known} rows of {chunk.stream} held back: {self._inserted} rows inserted, "
                        f"{self.limiter.insert_budget()} allowed. The learner has to train first (train "
                        "ratio); send them again"
                    )
                self._waiting += total - known
                self._changed.wait(left)
                self._waiting -= total - known

    def _store(self, key: int, chunk: Chunk, start: int, room: int) -> int:
        """Store up to `room` rows from row `start` on, as many as fit one block; return how many."""
        cursor = self._cursors.get(key)
        position = cursor.position if cursor else 0
        run = self._tails.get(key)
        if run is None or run.home.used == BLOCK_ROWS:
            run = self._tails[key] = self._index.add(0, key, position, _Block(self._table), 0)
            self._blocks.append((key, run.home))
        block = run.home
        count = min(room, BLOCK_ROWS - block.used)
        for name, array in block.columns.items():
            array[block.used : block.used + count] = chunk.columns[name][start : start + count]
        block.used += count
        self._index.grow(run, position + count)
        after = Cursor.after(chunk.columns, start + count - 1, position + count)
        self._cursors[key] = after
        self._incarnations[chunk.stream.actor] = after.incarnation
        self._inserted += count
        while self._index.rows > self._capacity:
            self._evict_oldest()
        self._changed.notify_all()
        return count

    def _skip(self, key: int) -> None:
        """Leave a gap of one position, as the shards do."""
        self._tails.pop(key, None)
        cursor = self._cursors[key]
        self._cursors[key] = replace(cursor, position=cursor.position + 1, torn=True)

    def _evict_oldest(self) -> None:
        key, block = self._blocks.popleft()
        self._index.drop(block)
        tail = self._tails.get(key)
        if tail is not None and tail.home is block:
            del self._tails[key]

    def _observe(self) -> None:
        self.limiter.observe(self._inserted, self._index.rows, self._planner.starts)

    def _why_waiting(self) -> str:
        index = self._index
        return why_waiting(
            self.limiter,
            self._spec,
            streams=len(index.streams),
            longest=index.longest,
            waiting=self._waiting,
        )
