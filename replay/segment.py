"""One segment: a Zarr v3 group of S slots x T rows that grows by memory copies and is valid at any instant.

Each column is an array [S, T, ...] in one `sharding_indexed` shard whose inner chunks [1, 64, ...] have
no codec and so a known size: the shard index and its crc32c are written before there is data, in
plain C order, and the file is the array itself followed by the index. `committed` [S] says how many
rows of each slot exist and is written last; rows behind it are undefined. `_slots` [S, 3] names
the run of rows in each slot: actor, env, position of its first row in the stream; -1 when free.
`_check` holds the checksums of the appends, or of overlay rows (`replay.checks`).
Overlay columns lie in a sibling group of the same layout, because they may change after the commit.
Live segments are read-only for other programs: a foreign writer would replace the mapped files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from replay import layout
from replay.checks import CHECK, AppendCheck, OverlayCheck, place_of
from replay.geometry import CHUNK_ROWS, Geometry
from system.errors import IntegrityError, PreflightError, SchemaError
from system.experience import Columns
from system.specs import ArraySpec, TableSpec

POPULATE_STEP = 4 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python 3.11 has no name for it

Arrays = dict[str, NDArray[Any]]


class SegmentFormat:
    """Stamps segments of one table and geometry; the Zarr metadata is made once, by zarr itself."""

    def __init__(
        self, table: TableSpec, geometry: Geometry, replay_id: str = "", former: Iterable[TableSpec] = ()
    ) -> None:
        """`replay_id` tells segments of this replay from others' of the same schema; `former` ones it had."""
        self.table, self.tables = table, (table, *former)
        self.replay_id = replay_id
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
        data = geometry.total * (table.row_nbytes + 8 + (4 if table.overlay else 0))
        self.nbytes = data + sum(map(len, self._indices.values())) + 32 * geometry.slots

    def create(self, directory: Path, number: int, epoch: int, previous: int) -> Segment:
        """Make a complete segment in the scratch directory; `Segment.publish` moves it where readers look.

        Raises: PreflightError when the disk is full or refuses; nothing is left behind then.
        """
        name = layout.segment_name(number, epoch)
        attributes = {
            "format": layout.FORMAT,
            "schema": self.table.digest,
            "replay": self.replay_id,
            "number": number,
            "epoch": epoch,
            "previous": previous,
            "slots": self.geometry.slots,
            "rows": self.geometry.rows,
            "slot_columns": ["actor", "env", "start"],
            "table": self.table.to_json(),
        }
        draft = directory / layout.SCRATCH / name
        try:
            self._stamp(draft, self._columns, self.table.columns, attributes)
            if self.table.overlay:
                self._stamp(layout.overlay_path(draft), self._overlay, self.table.overlay, attributes)
            segment = Segment(
                draft, self.table, self.geometry, number=number, replay=self.replay_id, writable=True
            )
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
            _allocate(data_path(path, CHECK, 3), 8 * self.geometry.total, b"")
        else:
            _allocate(data_path(path, CHECK, 2), 4 * self.geometry.total, b"")

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
    plain = [(CHECK, (slots, rows), "uint32")]
    if with_slots:
        plain = [("committed", (slots,), "int64"), ("_slots", (slots, 3), "int64")]
        plain += [(CHECK, (slots, rows, 2), "uint32")]
    for name, shape, dtype in plain:
        group.create_array(
            name, shape=shape, chunks=shape, dtype=dtype, compressors=None, filters=None, fill_value=0
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
        self, path: Path, table: TableSpec, geometry: Geometry, *, number: int, replay: str, writable: bool
    ) -> None:
        self.table = table
        self.replay = replay  # id of the replay it was made for
        self._append_check = AppendCheck(table)
        self._overlay_check = OverlayCheck(table.overlay, replay, number)
        self.path = path
        self.number = number
        self.geometry = geometry
        self._maps: list[mmap.mmap] = []
        self._files: list[tuple[bool, Path]] = []  # of each map: in the overlay, path inside the group
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
        self._commit_map = self._maps[-1]
        self.slots = self._array(path, "_slots", triple, lead[:1], writable)
        pair, word = (ArraySpec(shape=shape, dtype="uint32") for shape in ((2,), ()))
        self.check = self._array(path, CHECK, pair, lead, writable, indexed=False)  # [S, T, 2]
        self.overlay_check = (  # [S, T]
            self._array(beside, CHECK, word, lead, True, indexed=False)
            if table.overlay
            else np.broadcast_to(np.uint32(0), lead)
        )

    @classmethod
    def open(cls, path: Path, *tables: TableSpec, writable: bool = False) -> Segment:
        """Map a published segment that has one of these schemas.

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
            what = f"{path}/zarr.json lacks replay attributes ({error!r}); {_REMEDY}"
            raise IntegrityError(what) from error
        table = next((known for known in tables if known.digest == schema), None)
        if table is None:
            what = f"segment {path} has schema {schema!s:.12}, its table {tables[0].digest[:12]}"
            raise SchemaError(f"{what}; it was moved here from another replay: move it away")
        replay = str(about.get("replay", ""))
        return cls(path, table, geometry, number=number, replay=replay, writable=writable)

    def _array(
        self,
        group: Path,
        name: str,
        spec: ArraySpec,
        lead: tuple[int, ...],
        writable: bool,
        *,
        indexed: bool = True,
    ) -> NDArray[Any]:
        shape = lead + spec.shape
        path = data_path(group, name, len(shape))
        data = math.prod(lead) * spec.nbytes
        tail = math.prod(lead) // CHUNK_ROWS * 16 + 4 if indexed and len(lead) == 2 else 0
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
        self._files.append((group != self.path, path.relative_to(group)))
        return np.frombuffer(mapped, spec.dtype, data // np.dtype(spec.dtype).itemsize).reshape(shape)

    def append(self, slot: int, at: int, columns: Columns, start: int, stop: int) -> None:
        """Store rows start .. stop - 1 of `columns` [T, ...] from row `at` of a slot on and commit them.

        Data first, then the checksums, the commit word last.
        """
        end = at + stop - start
        for arrays in (self.columns, self.overlay):
            for name, array in arrays.items():
                array[slot, at:end] = columns[name][start:stop]
        if self.overlay:
            self.overlay_check[slot, at:end] = self._overlay_check.of(columns, start, stop)
        place = place_of(self.slots[slot], at)
        self.check[slot, end - 1] = (self._append_check.of(columns, start, stop, place), stop - start)
        # Readers load the counter before the rows. x86-64 keeps the order of these stores.
        self.committed[slot] = end

    def check_overlay(self, first: int, count: int) -> None:
        """Renew the checksums of overlay rows first .. first + count - 1 (counted over all slots)."""
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in self.overlay.items()}
        self.overlay_check.reshape(-1)[first : first + count] = self._overlay_check.of(
            flat, first, first + count
        )

    def good_rows(self, slot: int, limit: int | None = None) -> int:
        """Rows of a slot that their checksums confirm, counted from its first row on.

        At most the committed ones, or `limit`.
        """
        limit = min(int(self.committed[slot]) if limit is None else limit, self.geometry.rows)
        return self._append_check.good_rows(
            self.slot_columns(slot), self.check[slot], self.slots[slot], limit
        )

    def append_holds(self, slot: int, stop: int) -> bool:
        """Whether the append that ends before row `stop` of a slot has the checksum it should."""
        return 0 < stop <= self.geometry.rows and self._append_check.append_holds(
            self.slot_columns(slot), self.check[slot], self.slots[slot], stop
        )

    def slot_columns(self, slot: int) -> Arrays:
        """The immutable columns of one slot, each [T, ...]."""
        return {name: array[slot] for name, array in self.columns.items()}

    def mend_overlay(self) -> int:
        """Reset committed overlay rows whose checksum fails to zeros, the initial latents; say how many."""
        mended = 0
        for slot, used in enumerate(self.committed.tolist() if self.overlay else ()):
            columns = {name: array[slot] for name, array in self.overlay.items()}
            bad = np.flatnonzero(self._overlay_check.of(columns, 0, used) != self.overlay_check[slot, :used])
            for array in columns.values():
                array[bad] = 0
            self.overlay_check[slot, bad] = 0
            mended += len(bad)
        return mended

    def sizes(self) -> dict[Path, int]:
        """The bytes that each mapped file must have."""
        groups = self.path, layout.overlay_path(self.path)
        return {groups[o] / file: len(m) for (o, file), m in zip(self._files, self._maps, strict=True)}

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
        self._commit_map.flush()


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
