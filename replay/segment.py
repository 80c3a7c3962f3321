"""One segment: a Zarr v3 group of S slots x T rows that grows by memory copies and is valid at any instant.

Each column is an array [S, T, ...] in one `sharding_indexed` shard whose inner chunks [1, 64, ...] have
no codec and so a known size: the shard index and its crc32c are written before there is data, in
plain C order, and the file is the array itself followed by the index. `committed` [S] says how many
rows of each slot exist and is written last; rows behind it are undefined. `_slots` [S, 3] names
the run of rows in each slot: actor, env, position of its first row in the stream; -1 when free.
Overlay columns lie in a sibling group of the same layout, because they may change after the commit.
Live segments are read-only for other programs: a foreign writer would replace the mapped files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from replay import layout
from system.errors import ConfigError, IntegrityError, PreflightError, SchemaError
from system.specs import ArraySpec, TableSpec

CHUNK_ROWS = 64
"""Rows of one inner chunk: the unit foreign readers fetch, and of compression once sealed."""
TARGET_BYTES = 128 << 20
MAX_SLOT_ROWS = 1024
SLOTS_PER_SEGMENT = 16
POPULATE_STEP = 4 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python 3.11 has no name for it

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """S slots of T rows. A slot holds one run of consecutive rows of one stream."""

    slots: int
    rows: int

    @property
    def total(self) -> int:
        return self.slots * self.rows


def choose_geometry(row_nbytes: int, capacity_rows: int, segment_rows: int | None = None) -> Geometry:
    """Slots and rows of a segment near 128 MiB, within an eighth of the capacity but >= 64 rows.

    `segment_rows` fixes the rows of a whole segment instead.
    Raises: ConfigError when the capacity is below two segments of 64 rows or segment_rows is no
    multiple of 64 within half the capacity.
    """
    if capacity_rows < 2 * CHUNK_ROWS:
        raise ConfigError(
            f"replay capacity of one shard ({capacity_rows} rows) must be >= {2 * CHUNK_ROWS}; raise it"
        )
    total = segment_rows
    if total is None:
        total = min(TARGET_BYTES // max(row_nbytes, 1), capacity_rows // 8)
        total = max(CHUNK_ROWS, total // CHUNK_ROWS * CHUNK_ROWS)
    elif total < CHUNK_ROWS or total % CHUNK_ROWS or total > capacity_rows // 2:
        raise ConfigError(
            f"segment_rows ({total}) must be a multiple of {CHUNK_ROWS} and <= capacity_rows / 2 "
            f"({capacity_rows // 2}); change either"
        )
    rows = min(MAX_SLOT_ROWS, total // SLOTS_PER_SEGMENT) // CHUNK_ROWS * CHUNK_ROWS
    rows = max(CHUNK_ROWS, rows)
    return Geometry(slots=total // rows, rows=rows)


class SegmentFormat:
    """Stamps segments of one table and geometry; the Zarr metadata is made once, by zarr itself."""

    def __init__(self, table: TableSpec, geometry: Geometry) -> None:
        self.table = table
        self.geometry = geometry
        for name, spec in table.all.items():
            if spec.nbytes == 0:
                raise SchemaError(
                    f"column {name} has shape {list(spec.shape)} without entries; drop the column"
                )
        self._columns = _documents(table.columns, geometry, with_slots=True)
        self._overlay = _documents(table.overlay, geometry, with_slots=False)
        self._indices = {
            name: shard_index(geometry, CHUNK_ROWS * spec.nbytes) for name, spec in table.all.items()
        }
        data = geometry.total * table.row_nbytes
        self.nbytes = data + sum(map(len, self._indices.values())) + 32 * geometry.slots

    def create(self, directory: Path, number: int, epoch: int, previous: int) -> Segment:
        """Make a complete segment in the scratch directory; `Segment.publish` moves it where readers look.

        Raises: PreflightError when the disk is full or refuses; nothing is left behind then.
        """
        name = layout.segment_name(number, epoch)
        attributes = {
            "format": layout.FORMAT,
            "schema": self.table.digest,
            "number": number,
            "epoch": epoch,
            "previous": previous,
            "slots": self.geometry.slots,
            "rows": self.geometry.rows,
            "slot_columns": ["actor", "env", "start"],
        }
        draft = directory / layout.SCRATCH / name
        try:
            self._stamp(draft, self._columns, self.table.columns, attributes)
            if self.table.overlay:
                self._stamp(layout.overlay_path(draft), self._overlay, self.table.overlay, attributes)
            segment = Segment(draft, self.table, self.geometry, number=number, writable=True)
            segment.populate()
        except OSError as error:
            layout.remove((draft, layout.overlay_path(draft)))
            free = os.statvfs(directory)
            raise PreflightError(
                f"cannot make replay segment {name} of {self.nbytes >> 20} MiB in {directory} "
                f"({error.strerror or error}; {free.f_bavail * free.f_frsize >> 20} MiB free); "
                "free disk space, raise the file size limit or lower the replay capacity"
            ) from error
        return segment

    def _stamp(
        self,
        path: Path,
        documents: Mapping[str, bytes],
        specs: Mapping[str, ArraySpec],
        attributes: Mapping[str, Any],
    ) -> None:
        path.mkdir()
        for name, document in documents.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(document)
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"replay": attributes}}
        (path / "zarr.json").write_text(json.dumps(group))
        for name, spec in specs.items():
            _allocate(
                data_path(path, name, 2 + len(spec.shape)), self._data_nbytes(spec), self._indices[name]
            )
        if "committed/zarr.json" in documents:
            slots = self.geometry.slots
            _allocate(data_path(path, "committed", 1), 0, bytes(8 * slots))
            _allocate(data_path(path, "_slots", 2), 0, b"\xff" * (24 * slots))

    def _data_nbytes(self, spec: ArraySpec) -> int:
        return self.geometry.total * spec.nbytes


def shard_index(geometry: Geometry, chunk_nbytes: int) -> bytes:
    """The sharding_indexed index of a shard whose chunks lie in C order: (offset, nbytes) pairs + crc32c.

    Zarr v3 spec, "sharding-indexed codec": uint64 little endian, crc32c over the pairs at the end.
    """
    chunks = geometry.total // CHUNK_ROWS
    pairs = np.empty((chunks, 2), "<u8")
    pairs[:, 0] = np.arange(chunks, dtype=np.uint64) * np.uint64(chunk_nbytes)
    pairs[:, 1] = chunk_nbytes
    body = pairs.tobytes()
    return body + int(google_crc32c.value(body)).to_bytes(4, "little")


def _documents(specs: Mapping[str, ArraySpec], geometry: Geometry, *, with_slots: bool) -> dict[str, bytes]:
    """zarr.json of every array, as zarr writes it."""
    found: dict[str, Buffer] = {}
    store = MemoryStore(store_dict=found)
    group = zarr.create_group(store, zarr_format=3)
    slots, rows = geometry.slots, geometry.rows
    for name, spec in specs.items():
        shape = (slots, rows, *spec.shape)
        group.create_array(
            name,
            shape=shape,
            dtype=spec.dtype,
            chunks=(1, CHUNK_ROWS, *spec.shape),
            shards=shape,
            compressors=None,
            filters=None,
            fill_value=0,
        )
    if with_slots:
        for name, shape in (("committed", (slots,)), ("_slots", (slots, 3))):
            group.create_array(
                name, shape=shape, chunks=shape, dtype="int64", compressors=None, filters=None, fill_value=0
            )
    return {key: value.to_bytes() for key, value in found.items() if key.endswith("/zarr.json")}


def data_path(group: Path, name: str, ndim: int) -> Path:
    """The one file that holds an array of a segment."""
    return group.joinpath(name, "c", *["0"] * ndim)


def _allocate(path: Path, data_nbytes: int, tail: bytes) -> None:
    """A file of `data_nbytes` zeros and `tail`, its blocks reserved: later stores cannot hit a full disk."""
    path.parent.mkdir(parents=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.posix_fallocate(handle, 0, data_nbytes + len(tail))
        if os.pwrite(handle, tail, data_nbytes) != len(tail):
            raise OSError(28, "short write")
    finally:
        os.close(handle)


class Segment:
    """A mapped segment. `columns` and `overlay` are [S, T, ...], `committed` [S], `slots` [S, 3].

    The maps outlive eviction: a reader that still holds them keeps reading what it knew.
    """

    def __init__(
        self, path: Path, table: TableSpec, geometry: Geometry, *, number: int, writable: bool
    ) -> None:
        self.path = path
        self.number = number
        self.geometry = geometry
        self._maps: list[mmap.mmap] = []
        lead = (geometry.slots, geometry.rows)
        self.columns: Arrays = {
            name: self._array(path, name, spec, lead, writable) for name, spec in table.columns.items()
        }
        beside = layout.overlay_path(path)
        self.overlay: Arrays = {  # readers write latents back, so always writable
            name: self._array(beside, name, spec, lead, True) for name, spec in table.overlay.items()
        }
        counter = ArraySpec(shape=(), dtype="int64")
        triple = ArraySpec(shape=(3,), dtype="int64")
        self.committed = self._array(path, "committed", counter, lead[:1], writable)
        self.slots = self._array(path, "_slots", triple, lead[:1], writable)

    @classmethod
    def open(cls, path: Path, table: TableSpec, *, writable: bool = False) -> Segment:
        """Map a published segment.

        Raises: FileNotFoundError when it was evicted meanwhile; IntegrityError when it is damaged;
        SchemaError when it belongs to another table.
        """
        group = layout.read_json(path / "zarr.json")
        if group is None:
            raise FileNotFoundError(path)
        try:
            about = group["attributes"]["replay"]
            schema, number = about["schema"], int(about["number"])
            geometry = Geometry(slots=int(about["slots"]), rows=int(about["rows"]))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{path}/zarr.json lacks replay attributes ({error!r}); {_REMEDY}"
            ) from error
        if schema != table.digest:
            raise SchemaError(
                f"segment {path} has schema {schema[:12]}, its table {table.digest[:12]}; it was moved here "
                "from another replay: move it away"
            )
        return cls(path, table, geometry, number=number, writable=writable)

    def _array(
        self, group: Path, name: str, spec: ArraySpec, lead: tuple[int, ...], writable: bool
    ) -> NDArray[Any]:
        shape = lead + spec.shape
        path = data_path(group, name, len(shape))
        data = math.prod(lead) * spec.nbytes
        tail = math.prod(lead) // CHUNK_ROWS * 16 + 4 if len(lead) == 2 else 0
        try:
            handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not group.exists():
                raise
            raise _unreadable(path, error) from error
        try:
            actual = os.fstat(handle).st_size
            if actual != data + tail:
                raise IntegrityError(f"{path} has {actual} bytes, must have {data + tail}; {_REMEDY}")
            extra = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapped = mmap.mmap(handle, actual, access=access, **extra)
        except OSError as error:
            raise _unreadable(path, error) from error
        finally:
            os.close(handle)
        self._maps.append(mapped)
        return np.frombuffer(mapped, spec.dtype, data // np.dtype(spec.dtype).itemsize).reshape(shape)

    def groups(self) -> tuple[tuple[Path, Arrays], ...]:
        """The Zarr groups on disk, each with its columns [S, T, ...]."""
        return (self.path, self.columns), (layout.overlay_path(self.path), self.overlay)

    def populate(self) -> None:
        """Touch all pages in order, so that the kernel backs them with large pages and appends do not fault.

        Strided first writes leave 4 KiB pages and made inserts seven times slower.
        """
        for mapped in self._maps:
            for start in range(0, len(mapped), POPULATE_STEP):
                try:
                    mapped.madvise(MADV_POPULATE_WRITE, start, min(POPULATE_STEP, len(mapped) - start))
                except OSError:
                    return  # an older kernel: slower, not wrong

    def publish(self, directory: Path) -> None:
        """Move into the shard directory: from here on readers see the segment, whole."""
        final = directory / self.path.name
        if self.overlay:
            layout.overlay_path(self.path).rename(layout.overlay_path(final))
        self.path.rename(final)
        self.path = final

    def flush(self) -> None:
        """Write all pages to the device, the commit words last."""
        for mapped in self._maps:
            mapped.flush()


_REMEDY = "the segment is damaged: move it and its overlay out of the shard and start again"


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return IntegrityError(f"{path} is missing; {_REMEDY}")
    return PreflightError(
        f"cannot map {path} ({error.strerror}); check permissions, `ulimit -n` and vm.max_map_count"
    )


def allow_many_files() -> None:
    """Raise the soft limit of open files: every mapped column holds one (before Python 3.13)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < want:
        resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
