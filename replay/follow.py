"""One shard directory as a reader on this node sees it: its segments, their tier, how far they are filled.

The owner appends, seals, moves and evicts at any moment; the follower learns of it from the mapped catalog
and lists again. Between `view` (all shards) and the homes of the tiers (which copy rows).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.admission import MAX_ACTOR, MAX_ENV, stream_key
from replay.catalog import Catalog
from replay.index import Run, StartIndex
from replay.raw import open_raw
from replay.rows import Home
from system.errors import IntegrityError, PreflightError, SchemaError
from system.experience import StreamId
from system.metrics import Metrics
from system.specs import TableSpec

log = logging.getLogger(__name__)


class SegmentHome(Home, Protocol):
    """One segment in some tier; row r of slot s is row s * slot_rows + r of the home."""

    @property
    def slot_rows(self) -> int:
        """Rows of one slot (T)."""
        ...

    @property
    def slots(self) -> NDArray[np.int64]:
        """Actor, env and first position of each slot [S, 3]; -1 when free."""
        ...

    @property
    def committed(self) -> NDArray[np.int64]:
        """Complete rows of each slot [S]; grows under a mapped segment that is being filled."""
        ...

    @property
    def distant(self) -> bool:
        """As ShardView."""
        ...


OpenSegment = Callable[[Path, TableSpec], SegmentHome]
"""Opens a segment of one tier. Raises: FileNotFoundError when it is gone; IntegrityError, SchemaError,
PreflightError."""

OPENERS: Mapping[str, OpenSegment] = {".zarr": open_raw}
"""Openers by ending of the segment's name, the most local tier first: of two tiers the first one is read."""

_SEGMENT = re.compile(r"(\d{8}-e\d{4,})(\.[a-z.]+)")
_ADOPTED = re.compile(r"from-(\d{4,})")

Key = tuple[int, str]  # origin shard, number and epoch


def ending_of(path: Path) -> str:
    """What tells the tier of a segment: `.zarr` behind number and epoch; empty when it is no segment."""
    match = _SEGMENT.fullmatch(path.name)
    return match[2] if match else ""


def list_segments(
    directory: Path, origin: int, openers: Mapping[str, OpenSegment] = OPENERS
) -> dict[Key, Path]:
    """The published segments of a shard directory and those it adopted, each in its most local tier.

    Ascending by origin, number and epoch. Raises: FileNotFoundError without the directory.
    """
    tiers = list(openers)
    found: dict[Key, tuple[int, Path]] = {}
    for place, shard in [(directory, origin), *_adopted(directory)]:
        for path in place.iterdir():
            ending = ending_of(path)
            if ending not in openers:
                continue
            key, tier = (shard, path.name.removesuffix(ending)), tiers.index(ending)
            if key not in found or tier < found[key][0]:
                found[key] = (tier, path)
    return {key: path for key, (_, path) in sorted(found.items())}


def _adopted(directory: Path) -> list[tuple[Path, int]]:
    named = ((path, _ADOPTED.fullmatch(path.name)) for path in directory.iterdir())
    return [(path, int(match[1])) for path, match in named if match is not None]


class _Followed:
    """A segment and the rows of it that the index has."""

    def __init__(self, path: Path, origin: int, home: SegmentHome) -> None:
        self.path = path
        self.origin = origin
        self.home = home
        self.known = np.zeros(len(home.committed), np.int64)  # [S]
        self.runs: list[Run[Home] | None] = [None] * len(self.known)

    @property
    def full(self) -> bool:
        return bool((self.known == self.home.slot_rows).all())

    def read_counters(self, index: StartIndex[Home]) -> bool:
        """Tell the index of new rows; False when nothing changed."""
        now = self.home.committed.copy()  # one load of the counters; rows behind it are complete
        changed = np.flatnonzero(now != self.known)
        if not len(changed):
            return False
        for slot in changed.tolist():
            run = self.runs[slot]
            if run is None:
                run = self.runs[slot] = self._new_run(index, slot)
            index.grow(run, run.start + int(now[slot]))
        self.known = now
        return True

    def _new_run(self, index: StartIndex[Home], slot: int) -> Run[Home]:
        actor, env, start = self.home.slots[slot].tolist()
        stream = stream_key(StreamId(actor=actor, env=env))
        return index.add(self.origin, stream, start, self.home, slot * self.home.slot_rows)


class MappedShard:
    """A ShardView of a directory on this node. Needs no process behind it."""

    def __init__(
        self,
        directory: Path,
        index: int,
        table: TableSpec,
        *,
        openers: Mapping[str, OpenSegment] = OPENERS,
        metrics: Metrics | None = None,
    ) -> None:
        """Follow shard `index`. Raises: FileNotFoundError while it is being made."""
        self.index = index
        self.distant = False
        self._directory = directory
        self._inode = directory.stat().st_ino
        self._table = table
        self._openers = openers
        self._metrics = metrics
        self._catalog = Catalog(directory, writable=False)
        self._generation = -1
        self._segments: dict[Key, _Followed] = {}  # oldest first
        self._growing: list[_Followed] = []  # those with a slot that is not full
        self._skipped: dict[Path, str] = {}  # segments that cannot be read, and why

    @property
    def alive(self) -> bool:
        """As ShardView."""
        return True

    @property
    def inserted(self) -> int:
        """As ShardView."""
        return self._catalog["inserted"]

    @property
    def waiting(self) -> int:
        """As ShardView."""
        return self._catalog["waiting"]

    @property
    def rows(self) -> int:
        """As ShardView."""
        return sum(int(followed.known.sum()) for followed in self._segments.values())

    def capacity(self) -> tuple[int, int] | None:
        """As ShardView."""
        about = layout.read_json(self._directory / "shard.json")
        if about is None:
            return None
        return int(about["capacity_rows"]), int(about["slots"]) * int(about["rows"])

    def replaced(self) -> bool:
        """Whether the directory is another one than at first."""
        try:
            return self._directory.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def refresh(self, index: StartIndex[Home]) -> None:
        """As ShardView."""
        generation = self._catalog["generation"]
        if generation != self._generation and self._list(index):
            self._generation = generation
        grown = [followed.read_counters(index) for followed in self._growing]
        if any(grown):
            self._growing = [followed for followed in self._growing if not followed.full]

    def release(self, index: StartIndex[Home]) -> None:
        """As ShardView."""
        for followed in self._segments.values():
            index.drop(followed.home)
        self._segments.clear()
        self._growing.clear()
        self._generation = -1

    def _list(self, index: StartIndex[Home]) -> bool:
        """Open what is new, drop what is gone; False when the listing was overtaken and must be repeated."""
        try:
            paths = list_segments(self._directory, self.index, self._openers)
        except FileNotFoundError:
            return False
        self._skipped = {path: why for path, why in self._skipped.items() if path in paths.values()}
        settled = True
        for key in [key for key in self._segments if key not in paths]:
            index.drop(self._segments.pop(key).home)
        for key, path in paths.items():
            before = self._segments.get(key)
            if path in self._skipped or (before is not None and before.path == path):
                continue
            try:
                followed = _Followed(path, key[0], self._open(path))
            except FileNotFoundError:  # evicted or moved between listing and opening
                settled = False
                continue
            except (IntegrityError, SchemaError, PreflightError) as error:
                self._skip(path, error)
                continue
            if before is not None:  # now in another tier
                index.drop(before.home)
            self._segments[key] = followed
        self._growing = [followed for followed in self._segments.values() if not followed.full]
        return settled

    def _open(self, path: Path) -> SegmentHome:
        """Raises as OpenSegment, and IntegrityError for counters that cannot be."""
        home = self._openers[ending_of(path)](path, self._table)
        used = home.committed > 0
        names, counts = home.slots[used], home.committed[used]
        if len(names):
            actor, env, start = names.T
            sane = (actor >= 0) & (actor < MAX_ACTOR) & (env >= 0) & (env < MAX_ENV) & (start >= 0)
            if not (sane & (counts <= home.slot_rows)).all():
                raise IntegrityError(f"{path} has impossible slots; `dreamfleet replay repair` takes it out")
        return home

    def _skip(self, path: Path, error: Exception) -> None:
        """Damage costs the segment, never the training: its owner quarantines it."""
        reason = {IntegrityError: "damaged", SchemaError: "schema"}.get(type(error), "unreadable")
        self._skipped[path] = str(error)
        log.warning("replay segment skipped", extra={"segment": str(path), "why": str(error)})
        if self._metrics is not None:
            self._metrics.labels("replay_segments_skipped_total", reason=reason).inc()
