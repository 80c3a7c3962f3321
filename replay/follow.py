"""One shard directory as a reader on this node sees it: its segments, their tier, how far they are filled.

The owner appends, seals, moves and evicts at any moment; the follower learns of it from the mapped catalog
and lists again. Between `view` (all shards) and the homes of the tiers (which copy rows).
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replay import layout, seal
from replay.catalog import Catalog
from replay.cold import ColdSegment
from replay.far import FarSegment
from replay.followed import Followed, named
from replay.index import StartIndex
from replay.quarantine import report_damage
from replay.raw import open_raw
from replay.rows import Home, SegmentHome
from replay.vetting import Verdict, Vetting, judge
from replay.vouching import read_verified
from system.errors import IntegrityError, PreflightError, SchemaError
from system.metrics import Metrics
from system.specs import TableSpec

log = logging.getLogger(__name__)

AT_ONCE_NBYTES = 16 << 20
"""Rows that a listing checks itself, some milliseconds' worth; more wait for the vetting thread."""
ALIVE_SECONDS = 1.0
"""How long an answer to `alive` is believed."""
DISTANT_SECONDS, DISTANT_SHARE, LOOKS = 1.0, 0.1, 64
"""How long an answer to `distant` is believed; True beyond this share of about so many segments looked at."""

AGAIN_SECONDS = 60.0
"""When a segment that the system would not read is tried again."""

OpenSegment = Callable[[Path, TableSpec], SegmentHome]
"""Opens a segment of one tier. Raises: FileNotFoundError when it is gone; IntegrityError, SchemaError,
PreflightError."""

OPENERS: Mapping[str, OpenSegment] = {
    ".zarr": open_raw,
    ".cold.zarr": ColdSegment,
    ".far.json": FarSegment,
}
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


def _vet(home: SegmentHome, trusted: bool) -> NDArray[np.int64]:
    home.mend()
    return home.committed.copy() if trusted else home.good_rows()


class MappedShard:
    """A ShardView of a directory on this node. Needs no process behind it."""

    def __init__(
        self,
        directory: Path,
        index: int,
        table: TableSpec,
        vetting: Vetting,
        *,
        replay_id: str,
        openers: Mapping[str, OpenSegment] = OPENERS,
        metrics: Metrics | None = None,
    ) -> None:
        """Follow shard `index` of replay `replay_id`. Raises: FileNotFoundError while it is being made."""
        self.index = index
        self._directory = directory
        self._table = table
        self._vetting = vetting
        self._replay_id = replay_id
        self._openers = openers
        self._metrics = metrics
        self._catalog = Catalog(directory, writable=False)
        if not self._catalog["generation"] and layout.lock_held(directory):
            raise FileNotFoundError(directory)  # its owner is opening it and has counted nothing so far
        self._inode = (directory / "catalog.bin").stat().st_ino  # nobody else gets it while it is mapped
        self._generation = -1
        self._segments: dict[Key, Followed] = {}
        self._growing: list[Followed] = []  # those with a slot that is not full
        self._suspects: dict[Key, tuple[Followed, NDArray[np.int64], Verdict]] = {}  # rows seen [S]
        self._skipped: set[Path] = set()  # damaged ones
        self._again_at = math.inf  # when those that could not be read are tried again
        self._alive, self._alive_until = True, 0.0
        self._distant, self._distant_until, self._looks = False, 0.0, 0

    @property
    def alive(self) -> bool:
        """As ShardView."""
        now = time.monotonic()
        if now >= self._alive_until:
            self._alive, self._alive_until = layout.lock_held(self._directory), now + ALIVE_SECONDS
        return self._alive

    @property
    def distant(self) -> bool:
        """As ShardView; looked at now and then, because residents of the page cache change."""
        now = time.monotonic()
        if now >= self._distant_until:
            homes = [followed.home for followed in self._segments.values()]
            looked = homes[self._looks % (len(homes) // LOOKS + 1) :: len(homes) // LOOKS + 1]
            away = sum(home.distant for home in looked)
            self._distant, self._distant_until = away > DISTANT_SHARE * len(looked), now + DISTANT_SECONDS
            self._looks += 1
        return self._distant

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

    @property
    def unvetted(self) -> int:
        """Segments that are not read yet because their checksums wait to be looked at."""
        return len(self._suspects)

    def capacity(self) -> tuple[int, int] | None:
        """As ShardView."""
        try:
            about = layout.read_json(self._directory / "shard.json")
            if about is None:
                return None
            return int(about["capacity_rows"]), int(about["slots"]) * int(about["rows"])
        except (IntegrityError, KeyError, TypeError, ValueError) as error:
            log.warning("shard.json unreadable", extra={"shard": self.index, "why": repr(error)})
            return None

    def replaced(self) -> bool:
        """Whether the directory is another one than at first."""
        try:
            return (self._directory / "catalog.bin").stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def refresh(self, index: StartIndex[Home]) -> None:
        """As ShardView."""
        if time.monotonic() >= self._again_at:
            self._generation, self._again_at = -1, math.inf
        generation = self._catalog["generation"]
        listed = generation != self._generation
        if listed and self._list(index):
            self._generation = generation
        if self._suspects:
            self._take_verdicts()
        grown = [followed.read_counters(index) for followed in self._growing]
        if listed or any(grown):
            self._growing = [followed for followed in self._growing if not followed.complete]

    def release(self, index: StartIndex[Home]) -> None:
        """As ShardView."""
        for followed in self._segments.values():
            index.drop(followed.home)
        self._segments.clear()
        self._growing.clear()
        self._suspects.clear()
        self._generation = -1

    # ---- which segments there are -----------------------------------------------------------------

    def _list(self, index: StartIndex[Home]) -> bool:
        """Open what is new, drop what is gone; False when the listing was overtaken and must be repeated."""
        try:
            paths = list_segments(self._directory, self.index, self._openers)
        except FileNotFoundError:
            return False
        self._skipped &= set(paths.values())
        settled = True
        for key in [key for key in self._segments if key not in paths]:
            index.drop(self._segments.pop(key).home)
        self._suspects = {key: one for key, one in self._suspects.items() if paths.get(key) == one[0].path}
        vouched = read_verified(self._directory)
        budget = AT_ONCE_NBYTES
        for key, path in reversed(paths.items()):
            before = self._segments.get(key)
            if path in self._skipped or key in self._suspects or (before is not None and before.path == path):
                continue
            try:
                followed = Followed(path, key[0], self._open(path), metrics=self._metrics)
            except FileNotFoundError as error:
                if path.exists():
                    self._skip(
                        path, IntegrityError(f"{path} lacks {error.filename}; `dreamfleet replay repair`")
                    )
                else:  # evicted or moved between listing and opening
                    settled = False
                continue
            except (IntegrityError, SchemaError, PreflightError, OSError) as error:
                self._skip(path, error)
                continue
            if before is not None:  # now in another tier
                followed.limit = before.limit
                index.drop(before.home)
            else:
                trusted = vouched is not None and str(path.relative_to(self._directory)) in vouched
                budget -= self._suspect(key, followed, trusted, budget)
                continue
            self._segments[key] = followed
        for followed in self._segments.values():
            if not followed.complete:
                followed.sealed = seal.is_sealed(followed.path)
        self._growing = list(self._segments.values())  # all once: a new owner may have cut rows off
        return settled

    def _open(self, path: Path) -> SegmentHome:
        """Raises as OpenSegment, SchemaError for another replay's, IntegrityError for impossible counters."""
        home = self._openers[ending_of(path)](path, self._table)
        if home.replay_id != self._replay_id:
            raise SchemaError(
                f"{path} belongs to replay {home.replay_id or 'unknown'}, not to {self._replay_id}; it was "
                "moved here: bring it in with `dreamfleet replay import`"
            )
        counts = home.committed
        if not ((counts == 0) | (named(home) & (counts > 0) & (counts <= home.slot_rows))).all():
            raise IntegrityError(f"{path} has impossible slots; `dreamfleet replay repair` takes it out")
        return home

    def _suspect(self, key: Key, followed: Followed, trusted: bool, budget: int) -> int:
        """Have a segment vetted: at once within `budget` bytes, in the background otherwise; return bytes.

        Of a `trusted` one only the overlay, which its owner does not look after.
        """
        seen = followed.home.committed.copy()
        specs = self._table.overlay if trusted else self._table.all
        nbytes = int(seen.sum()) * sum(spec.nbytes for spec in specs.values())
        work = functools.partial(_vet, followed.home, trusted)
        if nbytes == 0:  # seen from its first row on
            verdict = Verdict()
            verdict.good, verdict.done = seen, True
        elif nbytes <= budget:
            verdict = judge(work, Verdict())
        else:
            nbytes, verdict = 0, self._vetting.submit(int(followed.path.name[:8]), work)
        self._suspects[key] = (followed, seen, verdict)
        return nbytes

    def _take_verdicts(self) -> None:
        """Read what was found sound, leave out what was not."""
        for key, (followed, seen, verdict) in list(self._suspects.items()):
            if not verdict.done:
                continue
            del self._suspects[key]
            if isinstance(verdict.error, FileNotFoundError):  # gone or moved meanwhile
                self._generation = -1
            elif isinstance(verdict.error, (IntegrityError, PreflightError, OSError)):
                self._skip(followed.path, verdict.error)
            elif verdict.error is not None:
                raise verdict.error
            else:
                assert verdict.good is not None
                lost = followed.believe(verdict.good, seen)
                if lost:
                    self._count("replay_rows_skipped_total", lost)
                    what = {"segment": str(followed.path), "rows": lost}
                    log.warning("replay rows skipped: their checksums fail", extra=what)
                followed.sealed = seal.is_sealed(followed.path)
                self._segments[key] = followed
                self._growing.append(followed)

    def _skip(self, path: Path, error: Exception) -> None:
        """Damage costs the segment, never the training: its owner quarantines it."""
        reason = {IntegrityError: "damaged", SchemaError: "schema"}.get(type(error), "unreadable")
        if reason == "unreadable":  # what the system refused now may be granted later
            self._again_at = min(self._again_at, time.monotonic() + AGAIN_SECONDS)
        else:
            self._skipped.add(path)
        if reason == "damaged" and self.alive:
            report_damage(path, str(error))
        log.warning("replay segment skipped", extra={"segment": str(path), "why": str(error)})
        self._count("replay_segments_skipped_total", 1, reason=reason)

    def _count(self, name: str, amount: int, **labels: str) -> None:
        if self._metrics is not None:
            counter = self._metrics.labels(name, **labels) if labels else self._metrics[name]
            counter.inc(amount)
