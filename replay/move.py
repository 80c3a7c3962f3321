"""Sealed segments change hands between shards of one table: rebalancing, and taking over a dead shard.

The taker makes a complete, checked copy (hard links where it can) and publishes it by one rename into its
`from-<origin>` directory; only then does the giver evict its own, ledger first. A kill at any point leaves
one form or both, never none; readers know rows by (origin, stream, position), so two count once. Lifetime
rows stay with the shard they were appended to: a move changes no limiter. Segments in an object store stay.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from replay import layout, seal
from replay.cold import sync, sync_tree
from replay.layout import StoredSegment
from replay.recovery import Entry, bytes_on_disk
from system.errors import ConfigError, IntegrityError, PreflightError, SchemaError

log = logging.getLogger(__name__)


class Taker(Protocol):
    """A shard that takes segments over; `replay.shard.ReplayShard` is one."""

    index: int

    def adopt(self, segment: Path) -> int: ...


class Giver(Protocol):
    """A shard that lets segments go; `replay.shard.ReplayShard` is one."""

    def sealed(self) -> list[StoredSegment]: ...
    def let_go(self, origin: int, stem: str) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One segment from one shard to another. Made by `plan_moves`, taken by `move`."""

    source: int
    target: int
    segment: StoredSegment
    nbytes: int


def plan_moves(
    held: Mapping[int, Sequence[tuple[StoredSegment, int]]],
    room: Mapping[int, int],
    *,
    tolerance: float = 0.1,
) -> list[Move]:
    """Moves after which no two shards differ by more than `tolerance` of the mean, as far as segments allow.

    `held` has the segments of each shard with their bytes, oldest first; they leave in that order. `room`
    bytes at most arrive at each.
    """
    left = {shard: [pair for pair in pairs if pair[0].tier != "far"] for shard, pairs in held.items()}
    load = {shard: sum(nbytes for _, nbytes in pairs) for shard, pairs in held.items()}
    room = dict(room)
    mean = sum(load.values()) / max(1, len(load))
    moves: list[Move] = []
    while len(load) > 1:
        source = max((s for s in load if left[s]), key=lambda s: load[s], default=None)
        if source is None:
            break
        segment, nbytes = left[source][0]
        fitting = [s for s in load if s not in (source, segment.origin) and room.get(s, 0) >= nbytes]
        target = min(fitting, key=lambda s: load[s], default=None)
        if target is None or load[source] - load[target] <= max(tolerance * mean, nbytes):
            break
        moves.append(Move(source=source, target=target, segment=segment, nbytes=nbytes))
        left[source].pop(0)
        load[source] -= nbytes
        load[target] += nbytes
        room[target] -= nbytes
    return moves


def move(source: Giver, target: Taker, segment: StoredSegment) -> int:
    """Move one segment; return its rows. Repeat it after a failure: what was done is not done again.

    Raises: as `copy_in`; ConfigError when it is not the oldest of its giver.
    """
    target.adopt(segment.path)
    return source.let_go(segment.origin, segment.stem)


def move_all(source: Giver, target: Taker, room_rows: int) -> int:
    """Move the oldest sealed segments, up to `room_rows` rows; return the rows moved.

    Rows that `target` itself once gave away stay where they are, and can be read there.
    """
    moved = 0
    for segment in source.sealed():
        if segment.origin == target.index:
            continue
        rows = sum(seal.read_manifest(segment.path).committed)
        if segment.tier == "far" or moved + rows > room_rows:
            break
        moved += move(source, target, segment)
    return moved


def copy_in(source: Path, directory: Path, shard: int, schemas: Collection[str], replay: str) -> Entry | None:
    """Publish a checked copy of the segment at `source` in `directory` of shard `shard`; None when it has it.

    `schemas`: digests of those that its table has had.

    Raises: FileNotFoundError when it is gone or not sealed; IntegrityError when it is damaged; SchemaError
    when it is another table's; ConfigError when it cannot be taken; PreflightError when the disk refuses.
    """
    manifest = seal.read_manifest(source)
    if manifest.tier == "far":
        raise ConfigError(f"{source} lies in an object store and must stay with its shard")
    if manifest.schema not in schemas or manifest.replay != replay:
        raise SchemaError(f"{source} belongs to another table; import it with `dreamfleet replay import`")
    if manifest.origin == shard:
        raise ConfigError(f"{source} holds rows of shard {shard} itself; it must stay elsewhere")
    place = adopted_dir(directory, manifest.origin)
    scratch, final = place / layout.SCRATCH, place / source.name
    layout.make_dir(scratch)
    if any(stored.stem == manifest.name for stored in layout.stored_segments(place, manifest.origin)):
        return None
    draft = scratch / source.name
    layout.remove((draft, layout.overlay_path(draft)))
    try:
        for path, target in ((layout.overlay_path(source), layout.overlay_path(draft)), (source, draft)):
            if path.exists():
                shutil.copytree(path, target, copy_function=_link_or_copy)
                sync_tree(target)
        if damage := seal.verify(draft):
            raise IntegrityError(f"{source} is damaged ({damage[0].what}); it stays where it is")
        if layout.overlay_path(draft).exists():
            layout.overlay_path(draft).rename(layout.overlay_path(final))
        draft.rename(final)
        sync(place)
    except FileNotFoundError:
        raise  # evicted or in another tier meanwhile
    except (OSError, shutil.Error) as error:
        raise PreflightError(f"cannot copy {source} to {place} ({error}); free disk space") from error
    finally:
        layout.remove((draft, layout.overlay_path(draft)))
    stored = StoredSegment(
        path=final, number=manifest.number, epoch=manifest.epoch, tier=manifest.tier, origin=manifest.origin
    )
    log.info("segment adopted", extra={"segment": str(final), "rows": sum(manifest.committed)})
    return Entry(
        stored=stored,
        rows=sum(manifest.committed),
        nbytes=bytes_on_disk(final),
        committed=manifest.committed,
        sealed=True,
        verified=True,
        born=float(manifest.extra.get("born", 0.0)),
    )


def adopted_dir(directory: Path, origin: int) -> Path:
    """Where a shard keeps what it took over of shard `origin`."""
    return directory / f"from-{origin:04d}"


def holders(root: Path, origin: int, stem: str) -> list[int]:
    """Shards that have adopted a segment, ascending."""
    found: list[int] = []
    for shard in layout.shard_indices(root):
        place = adopted_dir(layout.shard_dir(root, shard), origin)
        if place.is_dir() and any(s.stem == stem for s in layout.stored_segments(place, origin)):
            found.append(shard)
    return found


def was_moved(root: Path, shard: int, origin: int, stem: str) -> bool:
    """Whether a kill cut off a move of this segment away from `shard`: then it lets go at opening.

    Of two shards that both adopted it the higher one keeps it, so that never both let go.
    """
    others = [holder for holder in holders(root, origin, stem) if holder != shard]
    return bool(others) and (shard == origin or max(others) > shard)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)
