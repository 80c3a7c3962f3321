"""When a sealed segment leaves the raw form: the newest stay, older ones are compressed, the oldest go far.

Stages of `replay.upkeep`, which calls them on the shard's background thread, publishes what they make and
discards what it replaces. `cold` and `far` know the forms.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from replay import layout, seal
from replay.cold import plan_codecs, write_cold
from replay.cut import segment_key
from replay.far import FarShelf, write_far
from replay.layout import StoredSegment
from replay.ledger import read_ledger
from replay.object_store import StoreError, open_store
from replay.pins import pinned_keys
from replay.quarantine import quarantined, report_damage
from replay.segment import Segment
from replay.upkeep import Stage
from system.errors import ConfigError, IntegrityError
from system.specs import TableSpec

log = logging.getLogger(__name__)
RETRY_SECONDS = 30.0
"""How long the object store is left alone after it failed."""


class ColdStage:
    """Compresses sealed segments when that pays; a Stage."""

    name = "cold"

    def __init__(self, table: TableSpec, cold_after: int) -> None:
        """The newest `cold_after` sealed segments stay raw."""
        self._table = table
        self._cold_after = cold_after
        self._stays: set[Path] = set()  # tried: does not shrink, or is damaged

    def pick(self, sealed: Sequence[StoredSegment]) -> StoredSegment | None:
        """The oldest raw segment behind the newest ones."""
        self._stays &= {segment.path for segment in sealed}
        for segment in older_than(sealed, self._cold_after):
            if segment.tier == "raw" and segment.path not in self._stays:
                return segment
        return None

    def work(self, segment: StoredSegment, scratch: Path) -> tuple[Path, layout.Tier] | None:
        """As Stage."""
        raw = _open_sound(segment, self._table, self._stays)
        plan = plan_codecs(raw)
        if "packed" not in plan.values():
            self._stays.add(segment.path)
            return None
        scratch.mkdir(exist_ok=True)
        draft = scratch / layout.tier_path(segment.path, "cold").name
        return write_cold(raw, raw.table, plan, draft), "cold"


class FarStage:
    """Moves the oldest segments into an object store, and deletes there what was evicted here; a Stage."""

    name = "far"

    def __init__(self, directory: Path, shard: int, table: TableSpec, url: str, far_after: int) -> None:
        """The newest `far_after` sealed segments of shard `shard` in `directory` stay on this disk.

        Raises: ConfigError when `url` names no object store.
        """
        self._directory = directory
        self._shard = shard
        self._table = table
        self._store = open_store(url)
        self._far_after = far_after
        self._shelf: FarShelf | None = None
        self._there: set[str] = set()  # names in the catalog
        self._stays: set[Path] = set()
        self._not_before = 0.0

    def pick(self, sealed: Sequence[StoredSegment]) -> StoredSegment | None:
        """The oldest segment on this disk behind the newest ones."""
        self._stays &= {segment.path for segment in sealed}
        if time.monotonic() < self._not_before:
            return None
        try:
            held = {f"{self._shard:04d}-{path.name.split('.')[0]}" for path in quarantined(self._directory)}
            self._delete_evicted(held | {segment_key(segment.path) for segment in sealed})
        except (StoreError, IntegrityError) as error:
            self._not_before = time.monotonic() + RETRY_SECONDS
            log.warning("object store not swept", extra={"url": self._store.url, "why": str(error)})
            return None
        for segment in older_than(sealed, self._far_after):
            if segment.tier != "far" and segment.path not in self._stays:
                return segment
        return None

    def work(self, segment: StoredSegment, scratch: Path) -> tuple[Path, layout.Tier] | None:
        """As Stage: uploaded and read back, then in the catalog, then the manifest that replaces it here."""
        shelf, name = self._open_shelf(), segment_key(segment.path)
        scratch.mkdir(exist_ok=True)
        cold, temporary = segment.path, segment.tier == "raw"
        if temporary:  # what does not shrink, or is not to be compressed on this disk
            raw = _open_sound(segment, self._table, self._stays)
            cold = scratch / layout.tier_path(segment.path, "cold").name
            write_cold(raw, raw.table, plan_codecs(raw), cold)
        try:
            manifest = shelf.upload(cold, name)
            draft = scratch / layout.tier_path(segment.path, "far").name
            schemas = {table.digest: table for table in _schemas(segment.path, self._table)}
            write_far(cold, manifest, schemas[manifest.schema], draft)
        finally:
            if temporary:
                layout.remove((cold,))
        shelf.publish({name: sum(manifest.committed)})
        self._there.add(name)
        kept = layout.kept_path(segment.path)
        layout.remove((kept,))
        layout.kept_path(draft).rename(kept)  # of use only with the manifest, which is published next
        return draft, "far"

    def _open_shelf(self) -> FarShelf:
        """The shelf of this life of the shard, swept of what an earlier one left. Raises: StoreError."""
        if self._shelf is None:
            ledger, _ = read_ledger(self._directory)
            shelf = FarShelf(self._store, self._shard, ledger.epoch if ledger else 0)
            swept = shelf.sweep()
            if swept:
                log.info("unfinished uploads deleted", extra={"segments": len(swept)})
            self._there = set(shelf.catalog().segments)
            self._shelf = shelf
        return self._shelf

    def _delete_evicted(self, live: set[str]) -> None:
        shelf = self._open_shelf()
        if (gone := self._there - live) and (gone := gone - pinned_keys(self._directory.parent)):
            shelf.remove(gone)
            self._there -= gone
            log.info("far segments deleted", extra={"segments": len(gone)})


def older_than(sealed: Sequence[StoredSegment], newest: int) -> Sequence[StoredSegment]:
    """All but the `newest` last ones."""
    return sealed[: max(0, len(sealed) - newest)]


def stages_of(
    directory: Path,
    shard: int,
    table: TableSpec,
    *,
    compress: bool,
    cold_after: int,
    far: str | None,
    far_after: int,
) -> list[Stage]:
    """The stages of one shard. Raises: ConfigError for a URL or numbers that cannot be."""
    stages: list[Stage] = []
    if compress:
        stages.append(ColdStage(table, cold_after))
    if far is not None:
        if compress and far_after < cold_after:
            raise ConfigError(f"replay.far_after ({far_after}) must be >= replay.cold_after ({cold_after})")
        stages.append(FarStage(directory, shard, table, far, far_after))
    return stages


def _open_sound(segment: StoredSegment, table: TableSpec, damaged: set[Path]) -> Segment:
    """Map a raw segment whose files are as its manifest says. Raises: IntegrityError otherwise."""
    if found := seal.verify(segment.path):
        damaged.add(segment.path)
        report_damage(segment.path, found[0].what)
        raise IntegrityError(f"{segment.path} is damaged ({found[0].what}); the next scrub takes it out")
    return Segment.open(segment.path, *_schemas(segment.path, table))


def _schemas(segment: Path, table: TableSpec) -> tuple[TableSpec, ...]:
    """All schemas of the table that a published segment lies in; `table` where there is none."""
    for root in segment.parents[1:3]:  # adopted segments lie a directory deeper
        if (root / "table.json").exists():
            return layout.read_history(root).tables
    return (table,)
