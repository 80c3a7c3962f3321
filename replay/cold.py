"""A sealed segment compressed: a Zarr v3 group with the same arrays, and the home that samples from it.

Wide columns that shrink (`replay.chunk_codec`) lie in `sharding_indexed` shards of zstd chunks with crc32c,
wide ones that do not in chunks with crc32c alone; narrow ones, commit words, slots and checksums are the
raw segment's own files. Every stored chunk is checked before it reaches a batch. Between `tiers`, which
decides when, and `chunked`, which knows the shard file. Overlays stay where and what they were.
"""

from __future__ import annotations

import functools
import json
import logging
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from replay import layout, seal
from replay.checks import CHECK
from replay.chunk_codec import LEVEL, SCRATCH, Bytes, Codec, choose, trial_chunks
from replay.chunked import TieredRows, WideColumn, chunk_of, read_index, write_chunks
from replay.cut import segment_key
from replay.overlay import MappedOverlay, map_file, map_rows
from replay.quarantine import report_damage
from replay.rows import RowsGone, RowViews
from replay.segment import CHUNK_ROWS, Geometry, Segment, data_path
from replay.vetting import sealed_rows
from system.errors import IntegrityError, PreflightError, SchemaError
from system.specs import ArraySpec, TableSpec

log = logging.getLogger(__name__)
KEPT = ("committed", "_slots", CHECK)
"""Arrays that are the same files in a raw and in a cold segment."""

# ---- writing --------------------------------------------------------------------------------------


def plan_codecs(segment: Segment) -> dict[str, Codec]:
    """The codec of every column by a trial on its own rows."""
    live = live_rows(segment)
    full = np.flatnonzero(live.reshape(-1, CHUNK_ROWS).all(axis=1))
    plan: dict[str, Codec] = {}
    for name, array in segment.columns.items():
        rows = octets(array)  # [S * T, bytes]
        picked = trial_chunks(full if len(full) else np.flatnonzero(live[::CHUNK_ROWS]))
        chunks = np.stack([chunk_of(rows, live, int(n)) for n in picked])
        plan[name] = choose(chunks, rows.shape[1])
    return plan


def pays(plan: Mapping[str, Codec]) -> bool:
    """Whether any column shrinks enough to leave the raw form."""
    return "packed" in plan.values()


def write_cold(segment: Segment, table: TableSpec, plan: Mapping[str, Codec], draft: Path) -> Path:
    """Write the cold form of a sealed segment to the directory `draft`, complete, checked and on the device.

    Nothing is published: one rename does that. Raises: IntegrityError when what was written reads back
    differently; PreflightError when the disk refuses. Nothing is left behind then.
    """
    layout.remove((draft,))
    try:
        _write(segment, table, plan, draft)
        _read_back(segment, table, draft)
    except OSError as error:
        layout.remove((draft,))
        raise PreflightError(
            f"cannot write the cold segment {draft} ({error.strerror or error}); free disk space"
        ) from error
    except IntegrityError:
        layout.remove((draft,))
        raise
    return draft


def _write(segment: Segment, table: TableSpec, plan: Mapping[str, Codec], draft: Path) -> None:
    raw = layout.read_json(segment.path / "zarr.json")
    manifest = seal.read_manifest(segment.path)
    assert raw is not None, segment.path
    attributes = raw["attributes"]["replay"] | {"codecs": dict(plan)}
    draft.mkdir()
    for name, document in _documents(_key(table), segment.geometry, tuple(sorted(plan.items()))).items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(document)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"replay": attributes}}
    (draft / "zarr.json").write_text(json.dumps(group))
    live = live_rows(segment)
    for name, spec in table.columns.items():
        path = data_path(draft, name, 2 + len(spec.shape))
        path.parent.mkdir(parents=True)
        if plan[name] == "plain":
            os.link(data_path(segment.path, name, 2 + len(spec.shape)), path)
            continue
        with path.open("wb") as file:
            write_chunks(file, octets(segment.columns[name]), live, plan[name])
    for name, ndim in zip(KEPT, (1, 2, 3), strict=True):
        path = data_path(draft, name, ndim)
        path.parent.mkdir(parents=True)
        os.link(data_path(segment.path, name, ndim), path)
    seal.seal(draft, replace(manifest, tier="cold", files={}))
    sync_tree(draft)


def _read_back(segment: Segment, table: TableSpec, draft: Path) -> None:
    """Raises: IntegrityError unless every committed row reads back as the raw segment has it."""
    if damage := seal.verify(draft):
        raise IntegrityError(f"{draft} is damaged as written ({damage[0].what}); check the disk")
    home = ColdSegment(draft, table, beside=segment.path)
    live = live_rows(segment)
    for name, column in home.wide_columns.items():
        rows = octets(segment.columns[name])
        found = np.empty((CHUNK_ROWS, rows.shape[1]), np.uint8)
        for number in np.flatnonzero(live.reshape(-1, CHUNK_ROWS).any(axis=1)).tolist():
            column.copy(found, number * CHUNK_ROWS)
            if not np.array_equal(found.reshape(-1), chunk_of(rows, live, number)):
                raise IntegrityError(
                    f"{draft} chunk {number} of {name} reads back differently; check the disk"
                )


def live_rows(segment: Segment) -> NDArray[np.bool_]:
    """Which rows of a segment are committed [S * T]."""
    return (np.arange(segment.geometry.rows) < segment.committed[:, None]).reshape(-1)


def octets(array: NDArray[Any]) -> Bytes:
    """An array [S, T, ...] as its rows [S * T, bytes]."""
    slots, rows = array.shape[:2]
    return array.reshape(slots * rows, -1).view(np.uint8)


def sync_tree(top: Path) -> None:
    """Write every file and directory below and including `top` to the device."""
    for directory, _, files in os.walk(top, topdown=False):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))


def sync(path: Path) -> None:
    """Write one file or directory to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _key(table: TableSpec) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((name, spec.shape, spec.dtype) for name, spec in table.columns.items())


@functools.lru_cache(maxsize=64)
def _documents(
    columns: tuple[tuple[str, tuple[int, ...], str], ...],
    geometry: Geometry,
    plan: tuple[tuple[str, Codec], ...],
) -> dict[str, bytes]:
    """zarr.json of every array, as zarr writes it."""
    found: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(found), zarr_format=3)
    lead, codecs = (geometry.slots, geometry.rows), dict(plan)
    compressors = {
        "plain": None,
        "checked": [Crc32cCodec()],
        "packed": [ZstdCodec(level=LEVEL, checksum=False), Crc32cCodec()],
    }
    for name, shape, dtype in columns:
        group.create_array(
            name,
            shape=lead + shape,
            dtype=dtype,
            chunks=(1, CHUNK_ROWS, *shape),
            shards=lead + shape,
            compressors=compressors[codecs[name]],
            filters=None,
            fill_value=0,
        )
    words = (lead[:1], "int64"), ((lead[0], 3), "int64"), ((*lead, 2), "uint32")
    for name, (shape, dtype) in zip(KEPT, words, strict=True):
        group.create_array(
            name, shape=shape, chunks=shape, dtype=dtype, compressors=None, filters=None, fill_value=0
        )
    return {key: value.to_bytes() for key, value in found.items() if key.endswith("/zarr.json")}


# ---- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What zarr.json of a cold segment says of it; the same words stand in the manifest of a far one."""

    geometry: Geometry
    number: int
    replay_id: str
    codecs: Mapping[str, Codec]

    @classmethod
    def read(cls, attributes: Mapping[str, Any], table: TableSpec, path: Path) -> About:
        """Raises: IntegrityError when words are missing; SchemaError when it is another table's."""
        try:
            schema, number = attributes["schema"], int(attributes["number"])
            geometry = Geometry(slots=int(attributes["slots"]), rows=int(attributes["rows"]))
            codecs: dict[str, Codec] = {
                name: cast(Codec, attributes["codecs"][name]) for name in table.columns
            }
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(attributes.get("schema"), str) and attributes["schema"] != table.digest:
                raise _other_table(path, attributes["schema"], table) from error
            raise IntegrityError(
                f"{path} lacks replay attributes ({error!r}); `dreamfleet replay repair`"
            ) from error
        if schema != table.digest:
            raise _other_table(path, schema, table)
        if unknown := set(codecs.values()) - set(get_args(Codec)):
            raise IntegrityError(f"{path} has codecs {sorted(unknown)}, must be {get_args(Codec)}")
        replay_id = str(attributes.get("replay", ""))
        return cls(geometry=geometry, number=number, replay_id=replay_id, codecs=codecs)

    def overlay(self, segment: Path, table: TableSpec) -> MappedOverlay:
        """Map the overlay beside the segment. Raises: as `map_file`."""
        return MappedOverlay(segment, table, self.geometry, replay_id=self.replay_id, number=self.number)


def _other_table(path: Path, schema: str, table: TableSpec) -> SchemaError:
    return SchemaError(
        f"segment {path} has schema {schema[:12]}, its table {table.digest[:12]}; it was moved here from "
        "another replay: move it away"
    )


class ColdSegment:
    """Home of the rows of a compressed segment on this node; row r of slot s is row s * slot_rows + r."""

    distant = False

    def __init__(self, path: Path, table: TableSpec, *, beside: Path | None = None) -> None:
        """Map a cold segment; its overlay lies next to it, or next to `beside` while it is a draft.

        Raises: FileNotFoundError when it is gone; SchemaError when it belongs to another table;
        IntegrityError when it is damaged; PreflightError when it cannot be mapped.
        """
        group = layout.read_json(path / "zarr.json")
        if group is None:
            raise FileNotFoundError(path)
        about = About.read(group.get("attributes", {}).get("replay", {}), table, path)
        self.path = path
        self.geometry = about.geometry
        self.slot_rows = about.geometry.rows
        self.replay_id = about.replay_id
        self.overlay = about.overlay(beside or path, table)
        self.wide_columns: dict[str, WideColumn] = {}
        self._packed: list[tuple[WideColumn, mmap.mmap]] = []
        plain: dict[str, NDArray[Any]] = {}
        try:
            slots = about.geometry.slots
            committed = map_file(data_path(path, "committed", 1), 8 * slots)
            self.committed = np.frombuffer(committed, np.int64)  # [S]
            names = map_file(data_path(path, "_slots", 2), 24 * slots)
            self.slots = np.frombuffer(names, np.int64).reshape(slots, 3)
            for name, spec in table.columns.items():
                if about.codecs[name] == "plain":
                    file = data_path(path, name, 2 + len(spec.shape))
                    plain[name] = map_rows(file, spec, about.geometry.total)
                else:
                    self.wide_columns[name] = self._wide(name, spec, about.codecs[name])
        except FileNotFoundError as error:
            if not path.exists():
                raise
            raise IntegrityError(f"{error.filename} is missing; `dreamfleet replay repair`") from error
        self.overlay_key = segment_key(beside or path)
        self.overlay_files = self.overlay.files
        self.plain = plain | self.overlay.columns  # [S * T, ...], what needs no unpacking
        self._is_first = plain.get("is_first")
        self._rows = TieredRows(table, plain | self.overlay.columns, self.wide_columns)

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home; a chunk that fails its check raises RowsGone and is reported to the shard's owner."""
        try:
            self._rows.copy(target, at, first, count)
        except IntegrityError as error:
            report_damage(self.path, str(error))
            raise RowsGone(f"{self.path.name}: {error}") from error

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """As episodes.FlagHome."""
        return None if self._is_first is None else self._is_first[first : first + count]

    def will_need(self, first: int, count: int) -> None:
        """As Home: the kernel reads the chunks ahead."""
        for column, stored in self._packed:
            for _, offset, size in column.stored(first, count):
                start = offset // mmap.PAGESIZE * mmap.PAGESIZE
                stored.madvise(mmap.MADV_WILLNEED, start, offset + size - start)

    def mend(self) -> None:
        """As SegmentHome."""
        self.overlay.mend(self.committed, self.slot_rows)

    def good_rows(self) -> NDArray[np.int64]:
        """As SegmentHome."""
        return sealed_rows(self.path, self.committed)

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home."""
        return self.overlay.write(name, first, values)

    def _wide(self, name: str, spec: ArraySpec, codec: Codec) -> WideColumn:
        file = data_path(self.path, name, 2 + len(spec.shape))
        mapped = map_file(file)
        stored = np.frombuffer(mapped, np.uint8)
        index = read_index(stored, self.geometry.total // CHUNK_ROWS, len(stored), file)

        def fetch(_: int, offset: int, size: int) -> Bytes:
            return stored[offset : offset + size]

        column = WideColumn(spec.nbytes, codec, index, fetch, SCRATCH, mapped=True)
        self._packed.append((column, mapped))
        return column
