"""The read side of a table: follows its shards and knows which rows are live, in one `StartIndex`.

Needs no shard process: on this node it follows directories and mapped counters (`replay.catalog`), and
tolerates eviction, damage and changes of tier under it. `replay.sampler` decides what to copy, homes copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from replay import layout
from replay.evolve import evolving
from replay.follow import OPENERS, MappedShard
from replay.index import StartIndex
from replay.rows import Home
from replay.schema import check_readable
from replay.segment import allow_many_files
from replay.vetting import Vetting
from system.errors import SchemaError
from system.metrics import Metrics
from system.specs import TableSpec

log = logging.getLogger(__name__)

FRESH_NANOSECONDS = 50_000_000
"""A directory changed so recently may change again without a new time stamp."""
RELIST_SECONDS = 1.0
"""Longest time between two looks for shards: a catalog that was made anew does not change the root."""


class ShardView(Protocol):
    """What a table's reader knows of one shard."""

    @property
    def index(self) -> int:
        """Number of the shard."""
        ...

    @property
    def alive(self) -> bool:
        """Somebody owns the shard and may append. A dead one's rows may still be readable."""
        ...

    @property
    def distant(self) -> bool:
        """Copies may wait for a disk or the network: plan batches ahead and call `will_need`."""
        ...

    @property
    def inserted(self) -> int:
        """Lifetime rows."""
        ...

    @property
    def waiting(self) -> int:
        """Rows that appends hold back for want of credit."""
        ...

    @property
    def rows(self) -> int:
        """Rows that can be drawn here now."""
        ...

    def capacity(self) -> tuple[int, int] | None:
        """(capacity, segment) rows, None until the shard has said so."""
        ...

    def refresh(self, index: StartIndex[Home]) -> None:
        """Bring what `index` holds of this shard up to date. Damage is skipped, counted and logged."""
        ...

    def release(self, index: StartIndex[Home]) -> None:
        """Take everything of this shard out of `index` and let go of it."""
        ...


class TableView:
    """All live rows of a table, as `index`. Not safe for several threads."""

    def __init__(
        self,
        root: Path,
        table: TableSpec,
        length: int,
        *,
        remotes: Iterable[ShardView] = (),
        stored: TableSpec | None = None,
        foreign: bool = False,
        evolve: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """Follow the shards under `root` and `remotes` for sequences of `length` rows.

        A shard that lies under `root` is read there, even if `remotes` has it too. `stored` is the
        schema on disk where rows are read under another. A `foreign` table must exist and may have any schema
        that can be read as `table` (`replay.schema`); its overlays read as zeros and are never written.
        `evolve` as for `layout.open_table`.
        Raises: SchemaError, IntegrityError or PreflightError as `layout.open_table`.
        """
        if foreign:
            history = layout.read_history(root)
            stored, self._replay_id = history.table, history.replay
            for found in history.tables:
                check_readable(root, found, history.filled(table))
        else:
            self._replay_id = layout.open_table(root, stored or table, evolve=evolve)
        self._openers = evolving(OPENERS, root, foreign=foreign)
        allow_many_files()
        self.root = root
        self.table = table
        self.index: StartIndex[Home] = StartIndex(length)
        self._metrics = metrics
        self._evolved = stored is not None and stored.digest != table.digest
        self._remotes: list[ShardView] = []
        self._vetting = Vetting()
        self._mapped: dict[int, MappedShard] = {}
        self._root_mtime, self._relist_at = -1, 0.0
        self._views: list[ShardView] = []
        for shard in remotes:
            self.attach(shard)
        self.refresh()

    def refresh(self) -> None:
        """Learn of new shards, segments and rows; forget evicted ones. Microseconds when nothing changed."""
        try:
            mtime = self.root.stat().st_mtime_ns
        except FileNotFoundError:
            mtime = 0
        now = time.monotonic()
        if mtime != self._root_mtime or now >= self._relist_at:
            self._relist_at = now + RELIST_SECONDS
            settled = self._list_shards() and time.time_ns() - mtime > FRESH_NANOSECONDS
            self._root_mtime = mtime if settled else -1
        for shard in self._views:
            shard.refresh(self.index)

    @property
    def views(self) -> list[ShardView]:
        """The shards found so far, by number."""
        return self._views

    @property
    def shards(self) -> int:
        """How many shards were found so far."""
        return len(self._views)

    @property
    def distant(self) -> bool:
        """See ShardView."""
        return any(shard.distant for shard in self._views)

    @property
    def unvetted(self) -> int:
        """Segments on this node that wait for their checksums to be looked at."""
        return sum(shard.unvetted for shard in self._mapped.values())

    def settle(self, timeout: float) -> bool:
        """Wait until everything found so far was vetted and take it in; False when that took longer."""
        settled = self._vetting.settle(timeout)
        self.refresh()
        return settled

    def attach(self, shard: ShardView) -> None:
        """Follow one more shard that lies elsewhere.

        Raises: SchemaError when rows are read under another schema.
        """
        if self._evolved:
            raise SchemaError(
                f"shard {shard.index} lies on another node and its rows cannot be read under another "
                "schema; run the learner where the replay is, or leave out sources without actions"
            )
        self._remotes.append(shard)
        self._root_mtime = -1

    def release(self) -> None:
        """Let go of everything."""
        self._vetting.stop()
        for shard in self._views:
            shard.release(self.index)
        self._mapped.clear()
        self._views = []
        self.index = StartIndex(self.index.length)
        self._root_mtime = -1

    def inserted(self, shards: int) -> list[int]:
        """Lifetime rows of shards 0 .. shards - 1, 0 where there is none yet; followed by all others'."""
        return _words({shard.index: shard.inserted for shard in self._views}, shards)

    def waiting(self, shards: int) -> list[int]:
        """Rows that appends hold back for want of credit, as `inserted`."""
        return _words({shard.index: shard.waiting for shard in self._views}, shards)

    def capacities(self) -> list[tuple[int, int]]:
        """(capacity, segment) rows of every shard that has said so."""
        return [known for shard in self._views if (known := shard.capacity()) is not None]

    def _list_shards(self) -> bool:
        """Follow the shard directories there are; False when one was being made and must be tried again."""
        complete = True
        found = layout.shard_indices(self.root)
        for number in [n for n, shard in self._mapped.items() if n not in found or shard.replaced()]:
            self._mapped.pop(number).release(self.index)
            log.warning("replay shard directory gone", extra={"shard": number})
        for number in found:
            if number not in self._mapped:
                try:
                    directory = layout.shard_dir(self.root, number)
                    self._mapped[number] = MappedShard(
                        directory,
                        number,
                        self.table,
                        self._vetting,
                        replay_id=self._replay_id,
                        openers=self._openers,
                        metrics=self._metrics,
                    )
                except FileNotFoundError:  # being made right now
                    complete = False
        remote = []
        for shard in self._remotes:
            if shard.index in self._mapped:
                shard.release(self.index)
            else:
                remote.append(shard)
        self._views = sorted([*self._mapped.values(), *remote], key=lambda shard: shard.index)
        return complete


def _words(here: dict[int, int], shards: int) -> list[int]:
    first = [here.pop(index, 0) for index in range(shards)]
    return first + [here[index] for index in sorted(here)]
