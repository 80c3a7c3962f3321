"""The learner's side of replay on its node: when a batch may be drawn, and what that lets actors insert.

Shards insert as far as the grants of its governor allow, the learner trains as far as the ledger allows, and
both sides wait with a deadline. `replay.view` knows what is where, `replay.sampler` draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from replay.credits import GrantTaker
from replay.governor import Governor
from replay.limiter import RateLimiter
from replay.rows import Home, write_overlay
from replay.sampler import Sampler
from replay.view import TableView
from system import experience
from system.errors import ConfigError, DeadlineError
from system.experience import WriteBack
from system.metrics import Metrics
from system.specs import TableSpec

POLL_SECONDS = 0.001


def check_batch(batch: int, length: int, context: int, ring: int) -> None:
    """Raises: ConfigError for a batch that is none."""
    if batch < 1 or length < 1 or context < 0 or ring < 1:
        raise ConfigError(
            f"batch ({batch}), length ({length}) and ring ({ring}) must be >= 1, context ({context}) >= 0"
        )


def check_fits(capacity_rows: int, segment_rows: int, time: int) -> None:
    """Check that a shard can hold a sequence of `time` rows (context included) while it evicts.

    Raises: ConfigError otherwise.
    """
    sure = capacity_rows - segment_rows
    if time > sure:
        raise ConfigError(
            f"sequence length with context ({time}) must be <= capacity_rows - segment_rows of each shard "
            f"({capacity_rows} - {segment_rows} = {sure}); shorten the sequences or raise the replay capacity"
        )


def why_waiting(limiter: RateLimiter, *, streams: int, longest: int, time: int, waiting: int) -> str:
    """Who waits for whom, in one sentence for a DeadlineError."""
    if limiter.live < limiter.min_rows or not limiter.prefilled:
        cause = (
            f"the prefill ({limiter.live} live rows of {limiter.min_rows}, "
            f"{limiter.inserted} inserted of {limiter.prefill_rows})"
        )
    elif not limiter.starts:
        cause = (
            f"a stream with {time} consecutive live rows (the longest of {streams} has {longest}; "
            "raise the capacity when that does not grow)"
        )
    else:
        cause = (
            f"new rows (train ratio {limiter.held_ratio:.2f} of {limiter.train_ratio:g}, "
            f"{-limiter.error:.0f} trained rows ahead)"
        )
    return (
        f"the learner waits for {cause}; appends hold back {waiting} rows, {limiter.inserted} of "
        f"{limiter.insert_budget()} allowed rows inserted. Check that actors run and reach their shards"
    )


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
        controls: Sequence[GrantTaker],
        ring: int = 3,
        before_overwrite: Callable[[Home, int, int], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Sample `batch` sequences of context + length rows; the `ring`-th draw after a batch overwrites it.

        Raises: ConfigError when the limiter could deadlock with this batch or a shard is too small for it;
        SchemaError, IntegrityError, PreflightError as `layout.open_table`.
        """
        check_batch(batch, length, context, ring)
        limiter.check_update(batch * length)
        self.limiter = limiter
        self.dropped_write_backs = 0
        self._before_overwrite = before_overwrite  # e.g. PinStore.before
        self._update_rows = batch * length
        self._time = context + length
        self._view = TableView(root, table, self._time)
        self._sampler = Sampler(
            table.all, batch=batch, time=self._time, context=context, ring=ring, seed=seed
        )
        self.governor = Governor(limiter, controls, metrics=metrics)
        self._checked_shards = 0
        self._metrics = metrics
        self._observe()

    def sample(self, timeout: float) -> experience.Sequence:
        """One batch as soon as the limiter allows. Raises: DeadlineError saying who waits for whom."""
        begin = now = time.monotonic()
        self._observe()
        while not self.limiter.can_train(self._update_rows):
            now = time.monotonic()
            if now - begin >= timeout:
                self._waited(now - begin)
                raise DeadlineError(f"no batch for {now - begin:.1f} s: {self._why_waiting()}")
            self.governor.pump(now)
            time.sleep(min(POLL_SECONDS, timeout))
            self._observe(stalled=True)
        if now > begin:
            self._waited(now - begin)
        started = time.monotonic()
        sequence = self._sampler.draw(self._view.index)
        self.limiter.record(self._update_rows)
        now = time.monotonic()
        self.governor.pump(now)
        if self._metrics is not None:
            self._metrics["learner_sample_seconds"].observe(now - started)
        return sequence

    def pump(self) -> None:
        """Send grants without sampling; call it while the learner is busy with something else."""
        self._observe()
        self.governor.pump(time.monotonic())

    def write_back(self, rows: WriteBack) -> int:
        """Overwrite overlay columns of sampled rows; rows evicted meanwhile are dropped and counted.

        Returns the rows written. Raises: SchemaError for other columns, shapes or dtypes.
        """
        self._view.refresh()
        written, dropped = write_overlay(
            self._view.table, self._view.index, rows, before=self._before_overwrite
        )
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
            **self.governor.state(),
            "rng": self._sampler.state(),
            "inserted": self._view.inserted(len(self.governor.grants.shards)),  # by shard
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state beside the replay as it is now (see `RateLimiter.load`)."""
        self._observe()
        self.governor.load(state)
        self._sampler.load(state["rng"])

    def close(self) -> None:
        """Let go of the maps; batches handed out stay readable while they are referenced."""
        self._view.release()

    # ---- inside -----------------------------------------------------------------------------------

    def _observe(self, *, stalled: bool = False) -> None:
        self._view.refresh()
        if self._view.shards != self._checked_shards:
            self._check_capacity()
        index = self._view.index
        self.governor.observe(time.monotonic(), self._view.views, index.rows, index.total, stalled=stalled)

    def _check_capacity(self) -> None:
        found = self._view.capacities()
        for capacity_rows, segment_rows in found:
            check_fits(capacity_rows, segment_rows, self._time)
        total = sum(capacity for capacity, _ in found)
        if len(found) >= max(1, len(self.governor.grants.shards)) and self.limiter.min_rows > total:
            raise ConfigError(
                f"min_rows ({self.limiter.min_rows}) must be <= the replay capacity of all shards ({total}); "
                "lower min_rows or raise the capacity"
            )
        self._checked_shards = len(found)

    def _waited(self, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics["learner_sample_wait_seconds_total"].inc(seconds)

    def _why_waiting(self) -> str:
        index = self._view.index
        return (
            why_waiting(
                self.limiter,
                streams=len(index.streams),
                longest=index.longest,
                time=self._time,
                waiting=self.governor.waiting_rows,
            )
            + f"; {self.governor.grants.failures} grants failed"
        )
