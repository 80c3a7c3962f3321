"""A cut: which rows of a table existed at one instant, small enough to live inside a checkpoint.

Taken by the learner from the shards' files alone, while they append and evict. `replay.pins` keeps what a
cut names on disk, `replay.restore` brings a table back to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replay import layout, seal
from replay.segment import data_path
from system.errors import IntegrityError, PreflightError

ATTEMPTS = 16
"""Looks at a shard that evicts meanwhile; each costs a directory listing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCut:
    """One shard of a cut. Made by `take_cut`, taken by pins, restore and the learner's report.

    `segments` maps a segment's path inside the shard directory to the committed rows of its slots [S].
    """

    ledger: Mapping[str, Any]  # ledger.json as it stood: what was evicted, cursors, epoch
    segments: Mapping[str, tuple[int, ...]]

    @property
    def inserted(self) -> int:
        """Lifetime rows at the cut; those of adopted segments count where they were inserted."""
        own = (sum(rows) for name, rows in self.segments.items() if "/" not in name)
        return int(self.ledger.get("evicted_rows", 0)) + sum(own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The committed vector of a whole table. Made by `take_cut`, kept in the learner's checkpoint."""

    shards: Mapping[int, ShardCut]

    @property
    def inserted(self) -> int:
        """Lifetime rows of all shards at the cut."""
        return sum(shard.inserted for shard in self.shards.values())

    @property
    def rows(self) -> int:
        """Rows that could be drawn at the cut."""
        return sum(sum(map(sum, shard.segments.values())) for shard in self.shards.values())

    def to_json(self) -> dict[str, Any]:
        return {
            str(index): {
                "ledger": dict(shard.ledger),
                "segments": {name: list(rows) for name, rows in shard.segments.items()},
            }
            for index, shard in self.shards.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cut:
        """Raises: IntegrityError when `value` is no cut."""
        try:
            shards = {
                int(index): ShardCut(
                    ledger=dict(about["ledger"]),
                    segments={str(k): tuple(map(int, v)) for k, v in about["segments"].items()},
                )
                for index, about in value.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"the checkpoint's replay cut is none ({error!r}); resume with --set replay.resume=keep"
            ) from error
        return cls(shards=shards)


class SegmentGone(Exception):
    """A segment was evicted or changed its tier while it was looked at: look again."""


def take_cut(root: Path) -> Cut:
    """The committed vector of every shard under `root`, now.

    Each shard is consistent in itself: its segments and what its ledger calls evicted make up all rows.
    Raises: IntegrityError for a damaged ledger, PreflightError when a shard never stands still.
    """
    return Cut(shards={i: _take_shard(layout.shard_dir(root, i)) for i in layout.shard_indices(root)})


def _take_shard(directory: Path) -> ShardCut:
    for _ in range(ATTEMPTS):
        # The ledger is written before its segment goes; unchanged over the listing, the two agree. It is
        # read first because cursors newer than the rows of a cut would claim rows that do not exist.
        ledger = read_ledger(directory)
        try:
            segments = {
                name: committed
                for name, found in published(directory)
                if not is_evicted(ledger, name) and any(committed := read_committed(found.path))
            }
        except SegmentGone:
            continue
        if evictions(read_ledger(directory)) == evictions(ledger):
            return ShardCut(ledger=ledger, segments=segments)
    raise PreflightError(
        f"replay shard {directory} evicted during each of {ATTEMPTS} looks at it; raise the replay capacity"
    )


def read_ledger(directory: Path) -> dict[str, Any]:
    """The ledger of a shard as it stands on disk, from its copy when it is damaged; empty without one.

    Raises: IntegrityError when both are damaged.
    """
    try:
        return layout.read_json(directory / "ledger.json") or {}
    except IntegrityError:
        return layout.read_json(directory / "ledger.copy.json") or {}


def published(directory: Path) -> Iterator[tuple[str, layout.StoredSegment]]:
    """Segments of a shard directory and those it adopted, each in its most local tier, by path inside it.

    Nothing when there is no such directory.
    """
    try:
        places = {int(directory.name[6:]): directory, **layout.adopted_dirs(directory)}
        for origin, place in places.items():
            seen: set[str] = set()
            for segment in layout.stored_segments(place, origin):
                if segment.stem not in seen:
                    seen.add(segment.stem)
                    yield str(segment.path.relative_to(directory)), segment
    except FileNotFoundError:
        return


def segment_key(segment: Path) -> str:
    """What a segment is called wherever it lies and in whichever tier: shard of origin, number and epoch."""
    origin = int(segment.parent.name.rsplit("-", 1)[1])
    return f"{origin:04d}-{segment.name.split('.')[0]}"


def is_raw(segment: Path) -> bool:
    """Whether a published segment lies in the raw tier, by its name."""
    return segment.name == layout.tier_path(segment, "raw").name


def read_committed(segment: Path) -> tuple[int, ...]:
    """Complete rows of each slot [S] of a segment in any tier. Raises: SegmentGone, IntegrityError."""
    try:
        if not is_raw(segment):
            return seal.read_manifest(segment).committed
        raw = data_path(segment, "committed", 1).read_bytes()
    except FileNotFoundError as error:
        raise SegmentGone(segment) from error
    return tuple(np.frombuffer(raw[: len(raw) // 8 * 8], "<i8").tolist())


def is_evicted(ledger: Mapping[str, Any], name: str) -> bool:
    """Whether the ledger says that a segment of the shard's own is evicted, though it may still lie there."""
    return "/" not in name and int(name[:8]) <= int(ledger.get("evicted_through", -1))


def evictions(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ledger changes when segments leave."""
    return {key: value for key, value in ledger.items() if key.startswith("evicted")}
