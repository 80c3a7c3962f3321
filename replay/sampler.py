"""Draws batches for the learner and governs the pace.

One LocalReader lives in the learner process of a node. It is the only owner of the limiter: shards
insert as far as its grants allow, it trains as far as the ledger allows, both sides wait with a deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from replay import selection
from replay.batches import BatchRing, mark_borders
from replay.limiter import RateLimiter, split_budget
from replay.reader import TableReader
from replay.shard import ShardControl
from system import experience
from system.errors import ConfigError, DeadlineError, DreamfleetError
from system.experience import SequenceIds, WriteBack
from system.metrics import Metrics
from system.seeds import generator
from system.specs import TableSpec

log = logging.getLogger(__name__)
GRANT_SECONDS = 0.02
POLL_SECONDS = 0.001
DEAD_SECONDS = 1.0
"""How long a shard that failed to answer is left alone."""


def check_fits(capacity_rows: int, segment_rows: int, length: int) -> None:
    """Check that a shard can hold a sequence of `length` rows (context included) while it evicts.

    Raises: ConfigError otherwise.
    """
    sure = capacity_rows - segment_rows
    if length > sure:
        raise ConfigError(
            f"sequence length with context ({length}) must be <= capacity_rows - segment_rows of each shard "
            f"({capacity_rows} - {segment_rows} = {sure}); shorten the sequences or raise the replay capacity"
        )


class GrantSplitter:
    """Sends each shard its part of the insert budget; one that does not answer is left alone a second."""

    def __init__(self, controls: Sequence[ShardControl]) -> None:
        self._controls = list(controls)
        self._sent = [-1] * len(self._controls)
        self._dead_until = [0.0] * len(self._controls)
        self.failures = 0

    @property
    def size(self) -> int:
        return len(self._controls)

    def send(self, budget: int, inserted: Sequence[int], waiting: Sequence[int], now: float) -> None:
        """Grant so that all shards together may reach `budget`; `inserted` may name shards beyond ours."""
        elsewhere = sum(inserted[self.size :])
        alive = [now >= until for until in self._dead_until]
        grants = split_budget(budget - elsewhere, inserted[: self.size], waiting[: self.size], alive)
        order = sorted(range(self.size), key=lambda k: grants[k] - self._sent[k])  # take back before giving
        for k in order:
            # Sent again once a second at least: a restarted shard has forgotten its grant.
            if alive[k] and grants[k] != self._sent[k]:
                self._send_one(k, grants[k], now)

    def forget(self) -> None:
        """Send every grant anew next time."""
        self._sent = [-1] * self.size

    def _send_one(self, k: int, grant: int, now: float) -> None:
        try:
            self._controls[k].grant(grant)
        except DreamfleetError as error:
            self.failures += 1
            self._sent[k] = -1
            self._dead_until[k] = now + DEAD_SECONDS
            log.warning("shard does not take grants", extra={"shard": k, "cause": str(error)})
        else:
            self._sent[k] = grant


class LocalReader:
    """ReplayReader over the shards of this node. `controls[k]` reaches shard k."""

    def __init__(
        self,
        root: Path,
        table: TableSpec,
        *,
        batch: int,
        length: int,
        context: int,
        seed: int,
        limiter: RateLimiter,
        controls: Sequence[ShardControl],
        ring: int = 3,
        metrics: Metrics | None = None,
    ) -> None:
        """Sample `batch` sequences of context + length rows; a batch stays valid for `ring` - 1 more draws.

        Raises: ConfigError when the limiter could deadlock with this batch or a shard is too small for it;
        SchemaError, IntegrityError, PreflightError as `layout.open_table`.
        """
        if batch < 1 or length < 1 or context < 0 or ring < 1:
            raise ConfigError(
                f"batch ({batch}), length ({length}) and ring ({ring}) must be >= 1, context ({context}) >= 0"
            )
        limiter.check_update(batch * length)
        self.limiter = limiter
        self._batch, self._context = batch, context
        self._update_rows = batch * length
        self._time = context + length
        self._rng = generator(seed, "replay", "sample")
        self._reader = TableReader(root, table, self._time)
        self._ring = BatchRing(table.all, batch, self._time, ring)
        self._grants = GrantSplitter(controls)
        self._next_grant = self._next_forget = 0.0
        self._checked_shards = 0
        self._metrics = metrics
        self.dropped_write_backs = 0
        self._observe()

    def sample(self, timeout: float) -> experience.Sequence:
        """One batch as soon as the limiter allows. Raises: DeadlineError saying who waits for whom."""
        begin = now = time.monotonic()
        self._observe()
        while not (self._reader.index.total and self.limiter.can_train(self._update_rows)):
            now = time.monotonic()
            if now - begin >= timeout:
                self._waited(now - begin)
                raise DeadlineError(self._why_waiting(now - begin))
            self._grant_if_due(now)
            time.sleep(min(POLL_SECONDS, timeout))
            self._observe()
        if now > begin:
            self._waited(time.monotonic() - begin)
        sequence = self._draw()
        self.limiter.record(self._update_rows)
        now = time.monotonic()
        self._grant_if_due(now)
        if self._metrics is not None:
            self._metrics["learner_sample_seconds"].observe(now - begin)
            self._metrics["learner_train_ratio"].set(self.limiter.held_ratio)
            self._metrics["learner_train_ratio_target"].set(self.limiter.train_ratio)
        return sequence

    def pump(self) -> None:
        """Send grants without sampling; call it while the learner is busy with something else."""
        self._observe()
        self._grant_if_due(time.monotonic())

    def write_back(self, rows: WriteBack) -> int:
        """Overwrite overlay columns of sampled rows; rows evicted meanwhile are dropped and counted.

        Returns the rows written. Raises: SchemaError for other columns, shapes or dtypes.
        """
        self._reader.refresh()
        written, dropped = self._reader.write_back(rows)
        self.dropped_write_backs += dropped
        if self._metrics is not None:
            self._metrics.labels("learner_write_back_rows_total", outcome="written").inc(written)
            self._metrics.labels("learner_write_back_rows_total", outcome="evicted").inc(dropped)
        return written

    def counts(self) -> tuple[int, int]:
        """(lifetime rows inserted, live rows) over all shards."""
        self._observe()
        return self.limiter.inserted, self.limiter.live

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs for the same batches to follow, as JSON values."""
        self._observe()
        return {
            "limiter": self.limiter.state(),
            "rng": self._rng.bit_generator.state,
            "shards": self._reader.inserted(self._grants.size),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state beside the replay as it is now (see `RateLimiter.load`)."""
        self._reader.refresh()
        inserted = sum(self._reader.inserted(self._grants.size))
        self.limiter.load(state["limiter"], inserted, self._reader.index.rows)
        self._rng.bit_generator.state = state["rng"]
        self._grants.forget()

    def close(self) -> None:
        """Let go of buffers and maps; batches handed out stay readable while they are referenced."""
        self._reader.release()

    # ---- inside -----------------------------------------------------------------------------------

    def _draw(self) -> experience.Sequence:
        index = self._reader.index
        drawn = index.resolve(selection.uniform(self._rng, index.total, self._batch))
        buffer = self._ring.take()
        for row, (runs, position) in enumerate(drawn):
            self._reader.copy(buffer, row, runs, position)
        columns = buffer.columns
        mark_borders(columns["is_first"], columns["is_last"])
        ids = SequenceIds(
            shard=np.asarray([runs.shard for runs, _ in drawn], np.int32),
            stream=np.asarray([runs.stream for runs, _ in drawn], np.int32),
            start=np.asarray([position for _, position in drawn], np.int64),
        )
        return experience.Sequence(columns=dict(columns), ids=ids, context=self._context)

    def _observe(self) -> None:
        self._reader.refresh()
        if self._reader.shards != self._checked_shards:
            self._check_capacity()
        self.limiter.observe(sum(self._reader.inserted(self._grants.size)), self._reader.index.rows)

    def _check_capacity(self) -> None:
        found = self._reader.capacities()
        for capacity_rows, segment_rows in found:
            check_fits(capacity_rows, segment_rows, self._time)
        if len(found) < max(self._reader.shards, self._grants.size):
            return  # more shards are coming
        total = sum(capacity for capacity, _ in found)
        if found and self.limiter.min_rows > total:
            raise ConfigError(
                f"min_rows ({self.limiter.min_rows}) must be <= the replay capacity of all shards ({total}); "
                "lower min_rows or raise the capacity"
            )
        self._checked_shards = self._reader.shards

    def _grant_if_due(self, now: float) -> None:
        if now < self._next_grant:
            return
        self._next_grant = now + GRANT_SECONDS
        if now >= self._next_forget:
            self._next_forget = now + DEAD_SECONDS
            self._grants.forget()
        budget = self.limiter.insert_budget()
        if not self._reader.index.total:
            # Rows are there but no stream holds a whole sequence yet: the prefill goes on.
            budget = max(budget, self.limiter.inserted + self.limiter.tolerance_rows)
        self._grants.send(
            budget, self._reader.inserted(self._grants.size), self._reader.waiting(self._grants.size), now
        )

    def _waited(self, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics["learner_sample_wait_seconds_total"].inc(seconds)

    def _why_waiting(self, seconds: float) -> str:
        limiter, index = self.limiter, self._reader.index
        if limiter.live < limiter.min_rows or not limiter.prefilled:
            cause = (
                f"the prefill ({limiter.live} live rows of {limiter.min_rows}, "
                f"{limiter.inserted} inserted of {limiter.prefill_rows})"
            )
        elif not index.total:
            cause = (
                f"a stream with {self._time} consecutive live rows (the longest of {len(index.streams)} has "
                f"{index.longest}; raise the capacity when that does not grow)"
            )
        else:
            cause = (
                f"new rows (train ratio {limiter.held_ratio:.2f} of {limiter.train_ratio:g}, "
                f"{-limiter.error:.0f} trained rows ahead)"
            )
        waiting = sum(self._reader.waiting(self._grants.size))
        return (
            f"no batch for {seconds:.1f} s: the learner waits for {cause}; appends hold back {waiting} rows, "
            f"{limiter.inserted} of {limiter.insert_budget()} allowed rows inserted, "
            f"{self._grants.failures} grants failed. Check that actors run and reach their shards"
        )
