"""Segments in an object store: what a shard keeps there, and the home that samples from it.

<url>/shard-0001/0001-00000012-e0003.cold.zarr/...  files of a cold segment, a Zarr group as it is
<url>/shard-0001/catalog-00000042.json          which segments count: never changed, the highest one is true
<shard>/00000012-e0003.far.json                 manifest, URL and chunk indices of one such segment
<shard>/00000012-e0003.kept/<column>            its narrow columns, and the overlay beside it, stay local

A store has no rename, so a segment counts once the catalog names it. Wide columns are read by ranges of
64-row chunks (`replay.read_ahead`), each checked before it reaches a batch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from replay import layout, seal
from replay.chunk_codec import SCRATCH, Bytes
from replay.chunked import TieredRows, WideColumn, read_index
from replay.cold import About, sync, sync_tree
from replay.cut import segment_key
from replay.object_store import ObjectStore, StoreError, open_store
from replay.overlay import map_rows
from replay.quarantine import report_damage
from replay.read_ahead import ReadAhead, shared_read_ahead
from replay.rows import RowsGone, RowViews
from replay.segment import CHUNK_ROWS, data_path
from replay.vetting import sealed_rows
from system.errors import IntegrityError, PreflightError
from system.specs import TableSpec

log = logging.getLogger(__name__)
CATALOG = re.compile(r"catalog-(\d{8})\.json")
CATALOGS_KEPT = 8
ATTEMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FarCatalog:
    """Which segments of one shard lie in the store. Made by `FarShelf`."""

    generation: int
    epoch: int  # life of the shard that wrote it
    segments: Mapping[str, int]  # name -> rows


class FarShelf:
    """The part of an object store that belongs to one shard. Its owner writes, others may read."""

    def __init__(self, store: ObjectStore, shard: int, epoch: int = 0) -> None:
        self._store = store
        self._prefix = f"shard-{shard:04d}"
        self._epoch = epoch

    def catalog(self) -> FarCatalog:
        """The newest catalog; an empty one when there is none. Raises: StoreError, IntegrityError."""
        newest = max(self._catalogs(), default=0)
        if not newest:
            return FarCatalog(generation=0, epoch=0, segments={})
        key = self._catalog_key(newest)
        try:
            value = json.loads(bytes(self._store.get(key)))
            segments = {str(name): int(rows) for name, rows in value["segments"].items()}
            return FarCatalog(generation=newest, epoch=int(value["epoch"]), segments=segments)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{self._store.url}/{key} is no catalog ({error!r}); delete it") from error

    def upload(self, cold: Path, name: str) -> seal.Manifest:
        """Copy a cold segment and read every object back; return its manifest as a far one.

        `name` tells it from the segments of other shards: `cut.segment_key`.

        Does not count until `publish`. Raises: IntegrityError when either side differs from the manifest;
        StoreError.
        """
        manifest = seal.read_manifest(cold)
        key = self._key(name)
        for file, (size, crc) in manifest.files.items():
            data = (cold / file).read_bytes()
            _compare(cold / file, data, size, crc)
            self._store.put(f"{key}/{file}", data)
            _compare(f"{self._store.url}/{key}/{file}", self._store.get(f"{key}/{file}"), size, crc)
        self._store.put(f"{key}/{seal.NAME}", (cold / seal.NAME).read_bytes())
        return far_manifest(cold, manifest, self._store.url, key)

    def publish(self, added: Mapping[str, int]) -> int:
        """Make uploaded segments (name -> rows) count; return the catalog's generation."""
        return self._write_catalog(lambda segments: segments | dict(added))

    def remove(self, names: Iterable[str]) -> None:
        """Delete segments: they cease to count first. Raises: as `catalog`."""
        gone = set(names)
        self._write_catalog(lambda segments: {k: v for k, v in segments.items() if k not in gone})
        for name in sorted(gone):
            self._store.delete(self._store.keys(self._key(name)))

    def sweep(self) -> list[str]:
        """Delete what was uploaded but never counted, by a life that ended; return the names."""
        known, found = set(self.catalog().segments), set[str]()
        for key in self._store.keys(self._prefix):
            parts = key.split("/")
            if len(parts) > 2 and (name := parts[1].removesuffix(layout.SUFFIXES["cold"])) not in known:
                found.add(name)
        for name in sorted(found):
            self._store.delete(self._store.keys(self._key(name)))
        return sorted(found)

    def _write_catalog(self, change: Callable[[dict[str, int]], dict[str, int]]) -> int:
        for _ in range(ATTEMPTS):
            before = self.catalog()
            if before.epoch > self._epoch:
                raise StoreError(
                    f"{self._store.url}/{self._prefix} was written by life {before.epoch} of its shard, this "
                    f"is life {self._epoch}: another process owns it; give each replay its own replay.far"
                )
            segments = change(dict(before.segments))
            if segments == before.segments:
                return before.generation
            value = {"format": layout.FORMAT, "epoch": self._epoch, "segments": segments}
            generation = before.generation + 1
            if self._store.create(self._catalog_key(generation), json.dumps(value, indent=1).encode()):
                old = [n for n in self._catalogs() if n <= generation - CATALOGS_KEPT]
                self._store.delete(self._catalog_key(n) for n in old)
                return generation
        raise StoreError(f"{self._store.url}/{self._prefix}: {ATTEMPTS} catalogs were overtaken; try again")

    def _catalogs(self) -> list[int]:
        names = (key.rsplit("/", 1)[-1] for key in self._store.keys(self._prefix) if key.count("/") == 1)
        return [int(match[1]) for name in names if (match := CATALOG.fullmatch(name))]

    def _catalog_key(self, generation: int) -> str:
        return f"{self._prefix}/catalog-{generation:08d}.json"

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}{layout.SUFFIXES['cold']}"


def _compare(what: object, data: bytes | memoryview, size: int, crc: int) -> None:
    found = int(google_crc32c.value(np.frombuffer(data, np.uint8))) if len(data) else 0
    if len(data) != size or found != crc:
        raise IntegrityError(
            f"{what} has {len(data)} bytes with crc32c {found:08x}, must have {size} with {crc:08x}"
        )


def far_manifest(cold: Path, manifest: seal.Manifest, url: str, key: str) -> seal.Manifest:
    """The manifest of a cold segment whose files lie at `url`/`key`, with what a reader needs to begin."""
    group = layout.read_json(cold / "zarr.json")
    assert group is not None, cold
    attributes = group["attributes"]["replay"]
    indices: dict[str, list[list[int]]] = {}
    for name, codec in attributes["codecs"].items():
        if codec != "plain":
            file = next(path for path in cold.joinpath(name, "c").rglob("0") if path.is_file())
            stored = np.fromfile(file, np.uint8)
            chunks = len(manifest.committed) * manifest.rows // CHUNK_ROWS
            indices[name] = read_index(stored, chunks, len(stored), file).tolist()
    extra = {**manifest.extra, "url": url, "key": key, "attributes": attributes, "indices": indices}
    return replace(manifest, tier="far", extra=extra)


def write_far(cold: Path, manifest: seal.Manifest, table: TableSpec, draft: Path) -> None:
    """Write `draft`.far.json and the kept narrow columns beside it, complete and on the device."""
    kept = layout.kept_path(draft)
    layout.remove((draft, kept))
    kept.mkdir()
    for name in _plain(manifest):
        os.link(data_path(cold, name, 2 + len(table.columns[name].shape)), kept / name)
    sync_tree(kept)
    seal.seal(draft, manifest)
    sync(draft)


def _plain(manifest: seal.Manifest) -> list[str]:
    return sorted(n for n, codec in manifest.extra["attributes"]["codecs"].items() if codec == "plain")


class FarSegment:
    """Home of rows whose wide columns lie in an object store; row r of slot s is row s * slot_rows + r."""

    distant = True

    def __init__(
        self,
        path: Path,
        table: TableSpec,
        *,
        store: ObjectStore | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        """Open by the manifest at `path`; narrow columns that are not kept here are fetched.

        Raises: FileNotFoundError when it is gone; SchemaError; IntegrityError; PreflightError.
        """
        manifest = seal.read_manifest(path)
        extra = manifest.extra
        about = About.read(extra.get("attributes", {}), table, path)
        self.path = path
        self.geometry = about.geometry
        self.slot_rows = about.geometry.rows
        self.replay_id = about.replay_id
        self.committed = np.asarray(manifest.committed, np.int64)  # [S]
        self.slots = np.asarray(manifest.slots, np.int64).reshape(-1, 3)
        self._store = store or open_store(str(extra["url"]))
        self._ahead = ahead or shared_read_ahead()
        self._wide: dict[str, tuple[str, WideColumn]] = {}  # by name: object key, column
        plain: dict[str, NDArray[Any]] = {}
        for name, spec in table.columns.items():
            file = data_path(Path(), name, len(spec.shape) + 2).as_posix()
            key = f"{extra['key']}/{file}"
            if about.codecs[name] == "plain":
                kept = self._kept(name, key, manifest.files[file])
                plain[name] = map_rows(kept, spec, about.geometry.total)
                continue
            index = np.asarray(extra["indices"][name], "<u8").reshape(-1, 2)
            fetch = functools.partial(self._fetch, key)
            column = WideColumn(spec.nbytes, about.codecs[name], index, fetch, SCRATCH, mapped=False)
            self._wide[name] = (key, column)
        self.overlay = about.overlay(path, table)
        self.overlay_key = segment_key(path)
        self.overlay_files = self.overlay.files
        self.plain = plain | self.overlay.columns  # [S * T, ...], what needs no unpacking
        self._is_first = plain.get("is_first")
        wide = {name: column for name, (_, column) in self._wide.items()}
        self._rows = TieredRows(table, plain | self.overlay.columns, wide)

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home. A chunk that fails its check is fetched once more: it may have suffered on the way."""
        for again in (True, False):
            try:
                self._rows.copy(target, at, first, count)
                return
            except IntegrityError as error:
                for key, _ in self._wide.values():
                    self._ahead.forget(self._store, key)
                if not again:
                    report_damage(self.path, str(error))
                    raise RowsGone(f"{self.path.name}: {error}") from error
            except (StoreError, FileNotFoundError) as error:
                log.warning("far rows unreadable", extra={"segment": self.path.name, "why": str(error)})
                raise RowsGone(f"{self.path.name}: {error}") from error

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """As episodes.FlagHome."""
        return None if self._is_first is None else self._is_first[first : first + count]

    def will_need(self, first: int, count: int) -> None:
        """As Home: their chunks are on their way when this returns."""
        for key, column in self._wide.values():
            chunks = sorted((offset, size) for _, offset, size in column.stored(first, count))
            self._ahead.want(self._store, key, chunks)

    def mend(self) -> None:
        """As SegmentHome."""
        self.overlay.mend(self.committed, self.slot_rows)

    def good_rows(self) -> NDArray[np.int64]:
        """As SegmentHome: chunks are checked as they arrive, so only the manifest is looked at."""
        return sealed_rows(self.path, self.committed)

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home."""
        return self.overlay.write(name, first, values)

    def _fetch(self, key: str, _: int, offset: int, size: int) -> Bytes:
        return self._ahead.take(self._store, key, offset, size)

    def _kept(self, name: str, key: str, check: tuple[int, int]) -> Path:
        """The local file of a narrow column."""
        kept = layout.kept_path(self.path) / name
        if not kept.exists():
            try:
                data = self._store.get(key)
            except StoreError as error:
                raise PreflightError(f"segment {self.path.name} cannot be opened now: {error}") from error
            except FileNotFoundError as error:
                raise IntegrityError(
                    f"{self._store.url}/{key} is gone; `dreamfleet replay repair`"
                ) from error
            _compare(f"{self._store.url}/{key}", data, *check)
            kept.parent.mkdir(exist_ok=True)
            draft = kept.with_name(f".{name}-{os.getpid()}")
            draft.write_bytes(data)
            draft.replace(kept)
        return kept
