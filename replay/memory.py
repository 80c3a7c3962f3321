"""The in-memory twin of shard and reader: same contracts, same rules, one process, nothing on disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.admission import Cursor, check_chunk, rows_known, stream_key
from replay.index import Run, StartIndex
from replay.limiter import RateLimiter
from replay.reader import check_batch, check_fits, why_waiting
from replay.rows import MemoryHome, write_overlay
from replay.sampler import Sampler
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
        batch: int,
        length: int,
        context: int,
        seed: int,
        limiter: RateLimiter,
        ring: int = 3,
    ) -> None:
        """Keep `capacity_rows` rows, sample as LocalReader does. Raises: ConfigError as LocalReader."""
        check_batch(batch, length, context, ring)
        check_fits(capacity_rows, BLOCK_ROWS, context + length)
        limiter.check_update(batch * length)
        self.limiter = limiter
        self.dropped_write_backs = 0
        self._table = table
        self._capacity = capacity_rows
        self._update_rows = batch * length
        self._time = context + length
        self._sampler = Sampler(
            table.all, batch=batch, time=self._time, context=context, ring=ring, seed=seed
        )
        self._index: StartIndex[_Block] = StartIndex(self._time)
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
            while not self.limiter.can_train(self._update_rows):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError(f"no batch for {timeout:.1f} s: {self._why_waiting()}")
                self._changed.wait(left)
                self._observe()
            sequence = self._sampler.draw(self._index)
            self.limiter.record(self._update_rows)
            self._changed.notify_all()
            return sequence

    def write_back(self, rows: WriteBack) -> int:
        """As LocalReader.write_back. Raises: SchemaError."""
        with self._changed:
            written, dropped = write_overlay(self._table, self._index, rows)
            self.dropped_write_backs += dropped
            return written

    def pump(self) -> None:
        """Nothing to send: appends look at the limiter themselves."""

    def counts(self) -> tuple[int, int]:
        """(lifetime rows inserted, live rows)."""
        with self._changed:
            return self._inserted, self._index.rows

    def state(self) -> dict[str, Any]:
        """Limiter and generator as JSON values; the rows themselves are not part of it."""
        with self._changed:
            self._observe()
            return {"limiter": self.limiter.state(), "rng": self._sampler.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        with self._changed:
            self._observe()
            self.limiter.load(state["limiter"])
            self._sampler.load(state["rng"])
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

    def _evict_oldest(self) -> None:
        key, block = self._blocks.popleft()
        self._index.drop(block)
        tail = self._tails.get(key)
        if tail is not None and tail.home is block:
            del self._tails[key]

    def _observe(self) -> None:
        self.limiter.observe(self._inserted, self._index.rows, self._index.total)

    def _why_waiting(self) -> str:
        index = self._index
        return why_waiting(
            self.limiter,
            streams=len(index.streams),
            longest=index.longest,
            time=self._time,
            waiting=self._waiting,
        )
