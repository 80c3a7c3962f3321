"""The read side of a table on this node: maps the segments of all shards and knows which rows are live.

Needs no shard process: it follows the directory and the mapped counters (`replay.catalog`), tolerates
eviction under it. `replay.sampler` decides what to copy, `replay.rows` copies.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from replay import layout
from replay.admission import stream_key
from replay.catalog import Catalog
from replay.index import StartIndex, StreamRuns
from replay.rows import RowViews
from replay.segment import Segment, allow_many_files
from system.experience import StreamId
from system.specs import TableSpec

log = logging.getLogger(__name__)


class MappedSegment:
    """A segment as the view sees it: flat views [S * T, ...], and the rows known so far."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        arrays = {**segment.columns, **segment.overlay}
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in arrays.items()}
        self.views = RowViews(flat)
        self.overlay = {name: flat[name] for name in segment.overlay}
        slots = segment.geometry.slots
        self.known = np.zeros(slots, np.int64)  # [S] rows of each slot the index has
        self.runs: list[StreamRuns[MappedSegment] | None] = [None] * slots
        self.starts = [0] * slots


class _MappedShard:
    """One shard directory: its catalog and the segments mapped from it."""

    def __init__(self, directory: Path, index: int) -> None:
        self.directory = directory
        self.index = index
        self.catalog = Catalog(directory, writable=False)
        self.generation = -1
        self.segments: dict[str, MappedSegment] = {}  # by directory name, oldest first
        self.growing: list[MappedSegment] = []  # those with a slot that is not full


class TableView:
    """All live rows of a table, as `index`: a StartIndex whose blocks are mapped segments."""

    def __init__(self, root: Path, table: TableSpec, length: int) -> None:
        """Follow the table at `root` for sequences of `length` rows.

        Raises: SchemaError, IntegrityError or PreflightError as `layout.open_table`.
        """
        layout.open_table(root, table)
        allow_many_files()
        self.root = root
        self.table = table
        self.index: StartIndex[MappedSegment] = StartIndex(length)
        self._shards: dict[int, _MappedShard] = {}
        self._root_mtime = -1
        self.refresh()

    def refresh(self) -> None:
        """Learn of new shards, segments and rows; forget evicted ones. Microseconds when nothing changed.

        Raises: IntegrityError when a segment is damaged.
        """
        mtime = self.root.stat().st_mtime_ns
        if mtime != self._root_mtime:
            complete = True
            for index in layout.shard_indices(self.root):
                if index not in self._shards:
                    try:
                        self._shards[index] = _MappedShard(layout.shard_dir(self.root, index), index)
                    except FileNotFoundError:  # being made right now
                        complete = False
            self._root_mtime = mtime if complete else -1
        for shard in self._shards.values():
            generation = shard.catalog["generation"]
            if generation != shard.generation and self._list_segments(shard):
                shard.generation = generation
            for mapped in shard.growing:
                self._read_counters(shard, mapped)

    @property
    def shards(self) -> int:
        """Shards found so far."""
        return len(self._shards)

    def release(self) -> None:
        """Let go of all maps."""
        self._shards.clear()
        self.index = StartIndex(self.index.length)
        self._root_mtime = -1

    def inserted(self, shards: int) -> list[int]:
        """Lifetime rows of shards 0 .. shards - 1, 0 where there is none yet; followed by all others'."""
        return self._words("inserted", shards)

    def waiting(self, shards: int) -> list[int]:
        """Rows that appends hold back for want of credit, as `inserted`."""
        return self._words("waiting", shards)

    def _words(self, word: str, shards: int) -> list[int]:
        here = {index: shard.catalog[word] for index, shard in self._shards.items()}
        first = [here.pop(index, 0) for index in range(shards)]
        return first + [here[index] for index in sorted(here)]

    def capacities(self) -> list[tuple[int, int]]:
        """(capacity, segment) rows of every shard that has said so."""
        found: list[tuple[int, int]] = []
        for shard in self._shards.values():
            about = layout.read_json(shard.directory / "shard.json")
            if about is not None:
                found.append((int(about["capacity_rows"]), int(about["slots"]) * int(about["rows"])))
        return found

    # ---- following the writers --------------------------------------------------------------------

    def _list_segments(self, shard: _MappedShard) -> bool:
        """Map what is new, drop what is gone; False when the listing was overtaken and must be repeated."""
        paths = {path.name: path for path in layout.segment_paths(shard.directory).values()}
        settled = True
        for name in [name for name in shard.segments if name not in paths]:
            self.index.drop(shard.segments.pop(name))
        for name, path in paths.items():
            if name in shard.segments:
                continue
            try:
                segment = Segment.open(path, self.table)
            except FileNotFoundError:  # evicted between listing and opening
                settled = False
                continue
            shard.segments[name] = MappedSegment(segment)
        shard.growing = [m for m in shard.segments.values() if (m.known < m.segment.geometry.rows).any()]
        return settled

    def _read_counters(self, shard: _MappedShard, mapped: MappedSegment) -> None:
        now = mapped.segment.committed.copy()  # one load of the counters; rows behind it are complete
        changed = np.flatnonzero(now != mapped.known)
        if not len(changed):
            return
        for slot in changed.tolist():
            runs = mapped.runs[slot]
            if runs is None:
                runs = self._new_run(shard, mapped, slot)
            runs.hi = max(runs.hi, mapped.starts[slot] + int(now[slot]))
        mapped.known = now
        self.index.touch()
        if (now == mapped.segment.geometry.rows).all():
            shard.growing = [other for other in shard.growing if other is not mapped]

    def _new_run(self, shard: _MappedShard, mapped: MappedSegment, slot: int) -> StreamRuns[MappedSegment]:
        actor, env, start = mapped.segment.slots[slot].tolist()
        runs = self.index.stream(shard.index, stream_key(StreamId(actor=actor, env=env)))
        runs.add(start, mapped, slot * mapped.segment.geometry.rows)
        mapped.runs[slot], mapped.starts[slot] = runs, start
        return runs
