"""The undo journal: what overlay rows held when a checkpoint pinned them, written before they change.

Overlays are the one part of a replay that changes in place (latents, relabelled columns), so hard links alone
cannot hold them. Between `rows.write_overlay`, which tells the journal first, and `restore`, which puts the
old values back. A record that the process wrote survives its death; power loss is another matter.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from replay.segment import data_path
from system.errors import PreflightError

MAGIC = b"DFU1"
HEAD = struct.Struct("<4sIIQ")  # magic, crc32c of all that follows it, bytes of description, bytes of rows
MAX_DESCRIPTION = 1 << 16


@runtime_checkable
class Overlaid(Protocol):
    """A home whose overlay lies in files of this node: what the journal must know of it."""

    overlay_key: str  # shard of origin, number and epoch: the same in every tier
    overlay_files: Mapping[str, NDArray[Any]]  # all arrays of the overlay group, each [rows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeImage:
    """Rows first .. first + rows - 1 of one overlay as they were. Made and taken by this module."""

    key: str
    first: int
    rows: int
    columns: Mapping[str, tuple[int, bytes]]  # name -> (dimensions of its array in a segment, bytes)


class UndoJournal:
    """Appends before-images of rows that were not overwritten since `path` was begun. One thread."""

    def __init__(self, path: Path) -> None:
        """Begin the journal, or go on with one that an earlier life began.

        Raises: PreflightError when the disk refuses.
        """
        self.path = path
        self.nbytes = sum(record.nbytes for record in _records(path))
        self._seen: dict[str, NDArray[np.bool_]] = {}  # by overlay, [rows] already journaled in this life
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self.nbytes)  # a kill may have left half a record
        except OSError as error:
            raise _refused(path, error) from error

    def before(self, home: object, first: int, count: int) -> None:
        """Keep rows first .. first + count - 1 of a home's overlay unless they are kept already.

        Call it before every overwrite. Raises: PreflightError when the disk is full; nothing may be
        overwritten then.
        """
        if not isinstance(home, Overlaid) or not home.overlay_files:
            return
        arrays = home.overlay_files
        seen = self._seen.get(home.overlay_key)
        if seen is None:
            rows = len(next(iter(arrays.values())))
            seen = self._seen[home.overlay_key] = np.zeros(rows, np.bool_)
        for lo, hi in _unseen(seen, first, first + count):
            self._append(home.overlay_key, arrays, lo, hi)
            seen[lo:hi] = True

    def close(self) -> None:
        os.close(self._file)

    def _append(self, key: str, arrays: Mapping[str, NDArray[Any]], lo: int, hi: int) -> None:
        parts = [np.ascontiguousarray(array[lo:hi]).tobytes() for array in arrays.values()]
        columns = [
            [name, 1 + array.ndim, len(part)]
            for (name, array), part in zip(arrays.items(), parts, strict=True)
        ]
        about = json.dumps({"key": key, "first": lo, "rows": hi - lo, "columns": columns}).encode()
        size = sum(map(len, parts))
        tail = struct.pack("<IQ", len(about), size)
        crc = google_crc32c.value(b"".join((tail, about, *parts)))
        record = b"".join((MAGIC, struct.pack("<I", crc), tail, about, *parts))
        try:
            if os.pwrite(self._file, record, self.nbytes) != len(record):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise _refused(self.path, error) from error
        self.nbytes += len(record)


def _unseen(seen: NDArray[np.bool_], lo: int, hi: int) -> list[tuple[int, int]]:
    """Runs of False in seen[lo:hi]."""
    flags = np.concatenate(([True], seen[lo:hi], [True]))
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + lo
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """Where a whole record lies in its journal."""

    at: int
    about: int
    size: int

    @property
    def nbytes(self) -> int:
        return HEAD.size + self.about + self.size


def _records(path: Path) -> list[_Record]:
    """The whole records of a journal in the order of writing; the first torn or damaged one ends it."""
    found: list[_Record] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return found
    except OSError as error:
        raise _refused(path, error) from error
    with file:
        total = os.fstat(file.fileno()).st_size
        while len(head := file.read(HEAD.size)) == HEAD.size:
            magic, crc, about, size = HEAD.unpack(head)
            at = file.tell()
            if magic != MAGIC or about > MAX_DESCRIPTION or about + size > total - at:
                break
            if google_crc32c.value(head[8:] + file.read(about + size)) != crc:
                break
            found.append(_Record(at=at - HEAD.size, about=about, size=size))
    return found


def _image(file: IO[bytes], record: _Record) -> BeforeImage:
    file.seek(record.at + HEAD.size)
    about = json.loads(file.read(record.about))
    columns = {name: (ndim, file.read(nbytes)) for name, ndim, nbytes in about["columns"]}
    return BeforeImage(key=about["key"], first=about["first"], rows=about["rows"], columns=columns)


def undo(journals: Iterable[Path], overlays: Mapping[str, Path]) -> int:
    """Put the before-images of `journals`, newest journal first, back into overlay groups; return the rows.

    `overlays` maps a segment's key to its overlay group; other segments' images are skipped. Where a row has
    several images the oldest wins. May be repeated. Raises: PreflightError when the disk refuses.
    """
    rows = 0
    for journal in journals:
        records = _records(journal)
        if not records:
            continue
        with journal.open("rb") as file:
            for record in reversed(records):
                image = _image(file, record)
                group = overlays.get(image.key)
                if group is None:
                    continue
                for name, (ndim, data) in image.columns.items():
                    _write_at(data_path(group, name, ndim), len(data) // image.rows * image.first, data)
                rows += image.rows
    return rows


def _write_at(path: Path, offset: int, data: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(handle, data, offset)
        finally:
            os.close(handle)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> PreflightError:
    return PreflightError(
        f"cannot write {path} ({error.strerror}), which exact resume needs; free space or mend its "
        "permissions, or set replay.resume=keep"
    )
