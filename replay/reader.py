"""The learner's side of replay on its node: when a batch may be drawn, and what that lets actors insert.

Shards insert as far as the grants of its governor allow, the learner trains as far as the ledger allows, and
both sides wait with a deadline. `replay.view` knows what is where, `replay.sampler` draws.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from replay import layout
from replay.batch_spec import BatchSpec
from replay.credits import GrantTaker
from replay.governor import Governor
from replay.limiter import RateLimiter
from replay.plans import Planner
from replay.rows import Home
from replay.sampler import Sampler
from replay.schema import masked
from replay.selection import Sampling
from replay.view import ShardView, TableView
from replay.write_back import apply
from system import experience
from system.errors import ConfigError, DeadlineError, SchemaError
from system.experience import WriteBack
from system.metrics import Metrics
from system.specs import TableSpec

log = logging.getLogger(__name__)

POLL_SECONDS = 0.001
ONLINE_SECONDS, SETTLE_POLL_SECONDS = 600.0, 0.05
"""How long `load` waits for rows to be checked when some of them are owed to the online selector."""
AHEAD = 4
"""Batches planned ahead where copies may wait for a disk or the network."""


def check_ring(ring: int) -> None:
    """Raises: ConfigError for a ring without a batch."""
    if ring < 1:
        raise ConfigError(f"ring ({ring}) must be >= 1; 3 lets one batch be copied while one is in use")


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


def why_waiting(limiter: RateLimiter, spec: BatchSpec, *, streams: int, longest: int, waiting: int) -> str:
    """Who waits for whom, in one sentence for a DeadlineError."""
    if limiter.live < limiter.min_rows or not limiter.prefilled:
        cause = (
            f"the prefill ({limiter.live} live rows of {limiter.min_rows}, "
            f"{limiter.inserted} inserted of {limiter.prefill_rows})"
        )
    elif not limiter.starts:
        what = "a stream" if spec.cross_episodes else "an episode"
        cause = (
            f"{what} with {spec.span} consecutive live rows (the longest of {streams} streams has {longest}; "
            "raise the capacity when that does not grow, or shorten the sequences)"
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


def source_tables(sources: Mapping[str, tuple[Path, float]]) -> list[TableSpec]:
    """The schemas of other tables by name. Raises: ConfigError naming the one that is none."""
    found: list[TableSpec] = []
    for name, (root, _) in sources.items():
        if not (root / "table.json").is_file():
            raise ConfigError(
                f"replay source {name} ({root}) must hold a table.json; make it with "
                "`dreamfleet replay import` or mend the path"
            )
        found.append(layout.read_table(root)[0])
    return found


def open_source(name: str, root: Path, table: TableSpec, spec: BatchSpec) -> TableView:
    """Follow another table, read only. Raises: SchemaError naming why it cannot be read as `table`."""
    try:
        return TableView(root, table, spec.span, foreign=True)
    except SchemaError as error:
        raise SchemaError(f"replay source {name}: {error}") from error


class LocalReader:
    """ReplayReader over the shards of this node. `controls[k]` reaches shard k."""

    def __init__(
        self,
        root: Path,
        table: TableSpec,
        *,
        seed: int,
        limiter: RateLimiter,
        controls: Sequence[GrantTaker],
        batch: int = 0,
        length: int = 0,
        context: int = 0,
        spec: BatchSpec | None = None,
        sampling: Sampling | None = None,
        sources: Mapping[str, tuple[Path, float]] | None = None,
        own_weight: float = 1.0,
        remotes: Iterable[ShardView] = (),
        ring: int = 3,
        evolve: bool = False,
        before_overwrite: Callable[[Home, int, int], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Sample batches of `spec`, or plainly `batch` sequences of context + length rows.

        The `ring`-th draw after a batch overwrites it. `sources` are other tables (root, weight) that can be
        read as `table` (`replay.schema`), mixed into every batch beside the run's own rows of weight
        `own_weight`; source k of a sequence is the k-th of them, 0 the run's own. When some of their rows
        have no actions, sequences have an `action_mask` [B, T]. `remotes` are shards on other nodes.
        `evolve` as for `layout.open_table`.

        Raises: ConfigError when the limiter could deadlock with this batch or a shard is too small for it;
        SchemaError, IntegrityError, PreflightError as `layout.open_table`.
        """
        check_ring(ring)
        self._spec = spec = spec or BatchSpec(batch=batch, length=length, context=context)
        limiter.check_update(spec.rows)
        self.limiter = limiter
        self.dropped_write_backs = self.dropped_priorities = 0
        self._before_overwrite = before_overwrite  # e.g. PinStore.before
        stored, table = table, masked(table, source_tables(sources or {}))
        self._view = TableView(
            root, table, spec.span, stored=stored, remotes=remotes, evolve=evolve, metrics=metrics
        )
        self._others = [open_source(name, path, table, spec) for name, (path, _) in (sources or {}).items()]
        indices = [(self._view.index, own_weight)]
        weights = [weight for _, weight in (sources or {}).values()]
        indices += [(view.index, weight) for view, weight in zip(self._others, weights, strict=True)]
        self._planner = Planner(table.all, spec, indices, sampling=sampling or Sampling(), seed=seed)
        self._sampler = Sampler(table.all, spec, self._planner, ring=ring)
        self.governor = Governor(limiter, controls, metrics=metrics)
        self._checked_shards = 0
        self._metrics = metrics
        self._observe()
        self._planner.look()

    def sample(self, timeout: float) -> experience.Sequence:
        """One batch as soon as the limiter allows. Raises: DeadlineError saying who waits for whom."""
        begin = now = time.monotonic()
        self._observe()
        while not self.limiter.can_train(self._spec.rows):
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
        failed = self._sampler.redraws
        sequence = self._sampler.draw(AHEAD if self._distant else 0)
        self.limiter.record(self._spec.rows)
        now = time.monotonic()
        self.governor.pump(now)
        if self._metrics is not None:
            self._metrics["learner_sample_seconds"].observe(now - started)
            self._metrics["learner_redrawn_sequences_total"].inc(self._sampler.redraws - failed)
        return sequence

    def pump(self) -> None:
        """Send grants without sampling; call it while the learner is busy with something else."""
        self._observe()
        self.governor.pump(time.monotonic())

    def write_back(self, rows: WriteBack) -> int:
        """Overwrite overlay columns and priorities of sampled rows; what is evicted is dropped and counted.

        Returns the rows written. Raises: SchemaError for other columns, shapes or dtypes.
        """
        self._refresh()
        table, step = self._view.table, self._spec.step
        done = apply(rows, self._planner, table, step, before=self._before_overwrite)
        self.dropped_write_backs += done.dropped
        self.dropped_priorities += done.stale
        if self._metrics is not None:
            done.export(self._metrics)
        return done.rows

    def counts(self) -> tuple[int, int]:
        """(lifetime rows inserted, live rows) over all shards."""
        self._observe()
        return self.limiter.inserted, self.limiter.live

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs for the same batches to follow, as JSON values."""
        self._observe()
        return {
            **self.governor.state(),
            "sampler": self._sampler.state(),
            "inserted": self._view.inserted(len(self.governor.grants.shards)),  # by shard
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state beside the replay as it is now (see `RateLimiter.load`).

        With an online selector this waits until every row has been checked: windows of rows that come late
        would pass for evicted, and later rows than theirs for the next ones.
        """
        self._observe()
        view = self._view
        self.governor.load(state, unseen=view.unvetted > 0 or len(view.capacities()) < view.shards)
        if any("online" in pool.selectors for pool in self._planner.pools):
            self._settle_online()
        self._sampler.load(state["sampler"])

    def settle(self, timeout: float) -> bool:
        """Wait until all rows there are have been checked and can be drawn; False when that took longer."""
        return self._view.settle(timeout)

    def close(self) -> None:
        """Let go of the maps; batches handed out stay readable while they are referenced."""
        for view in (self._view, *self._others):
            view.release()

    # ---- inside -----------------------------------------------------------------------------------

    @property
    def _distant(self) -> bool:
        return self._view.distant or any(view.distant for view in self._others)

    def _refresh(self) -> None:
        self._view.refresh()
        for view in self._others:
            view.refresh()

    def _observe(self, *, stalled: bool = False) -> None:
        self._refresh()
        if self._view.shards != self._checked_shards:
            self._check_capacity()
        rows, starts = self._view.index.rows, self._planner.starts
        self.governor.observe(time.monotonic(), self._view.views, rows, starts, stalled=stalled)

    def _settle_online(self) -> None:
        """Wait until all rows have been checked, while shards get their credit; give up in the end."""
        begin = time.monotonic()
        while waiting := [view for view in (self._view, *self._others) if view.unvetted]:
            if time.monotonic() - begin >= ONLINE_SECONDS:
                what = {"segments": sum(view.unvetted for view in waiting)}
                log.warning("rows not checked in time: online sampling passes over some", extra=what)
                return
            waiting[0].settle(SETTLE_POLL_SECONDS)
            self.pump()

    def _check_capacity(self) -> None:
        found = self._view.capacities()
        for capacity_rows, segment_rows in found:
            check_fits(capacity_rows, segment_rows, self._spec.span)
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
                self._spec,
                streams=len(index.streams),
                longest=index.longest,
                waiting=self.governor.waiting_rows,
            )
            + f"; {self.governor.grants.failures} grants failed"
        )
