"""A column in 64-row chunks of varying size: the Zarr shard file that holds it, and copying rows out of it.

`replay.cold` maps such files, `replay.far` fetches ranges of them; both copy through `WideColumn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from replay.chunk_codec import Bytes, Codec, Scratch, checked, pack, unpack
from replay.rows import NARROW_NBYTES, RowViews
from replay.segment import CHUNK_ROWS
from system.errors import IntegrityError
from system.specs import TableSpec

ABSENT = 2**64 - 1
"""Offset and size of a chunk without committed rows: the Zarr v3 spec's mark of an empty inner chunk."""
PAIR_NBYTES = 16
CRC_NBYTES = 4

Fetch = Callable[[int, int, int], Bytes]
"""The stored bytes of a chunk from (chunk number, offset, size). Raises: RowsGone, IntegrityError."""


def write_chunks(file: IO[bytes], rows: Bytes, live: NDArray[np.bool_], codec: Codec) -> NDArray[np.uint64]:
    """Write the shard file of a column from its rows [S * T, bytes]; return its index [chunks, 2].

    `live` [S * T] are the committed rows: others are written as zeros, chunks without any not at all.
    """
    lives = live.reshape(-1, CHUNK_ROWS)
    index = np.full((len(lives), 2), ABSENT, "<u8")
    offset = 0
    for number in np.flatnonzero(lives.any(axis=1)).tolist():
        stored = pack(chunk_of(rows, live, number), codec)
        file.write(stored)
        index[number] = offset, len(stored)
        offset += len(stored)
    body = index.tobytes()
    file.write(body + int(google_crc32c.value(body)).to_bytes(CRC_NBYTES, "little"))
    return index


def chunk_of(rows: Bytes, live: NDArray[np.bool_], number: int) -> Bytes:
    """The bytes of one chunk as written: rows that are not live are zeros."""
    at = slice(number * CHUNK_ROWS, (number + 1) * CHUNK_ROWS)
    if live[at].all():
        return rows[at].reshape(-1)
    return np.where(live[at, None], rows[at], np.uint8(0)).reshape(-1)


def read_index(tail: Bytes, chunks: int, nbytes: int, path: Path) -> NDArray[np.uint64]:
    """The index [chunks, 2] from the last bytes of a shard file of `nbytes` bytes.

    Raises: IntegrityError when it is damaged or points out of the file.
    """
    size = chunks * PAIR_NBYTES
    body = tail[-(size + CRC_NBYTES) : -CRC_NBYTES]
    crc = int(google_crc32c.value(body)).to_bytes(CRC_NBYTES, "little") if len(body) == size else b""
    if tail[-CRC_NBYTES:].tobytes() != crc:
        raise IntegrityError(f"{path} must end with an index of {chunks} chunks; `dreamfleet replay repair`")
    index = np.frombuffer(body.tobytes(), "<u8").reshape(chunks, 2)
    present = index[index[:, 0] != ABSENT]
    if len(present) and int(present.sum(axis=1).max()) > nbytes - size - CRC_NBYTES:
        raise IntegrityError(f"{path} has an index beyond its end; `dreamfleet replay repair`")
    return index


class WideColumn:
    """Rows of one column [rows, bytes], unpacked chunk by chunk."""

    def __init__(
        self,
        row_nbytes: int,
        codec: Codec,
        index: NDArray[np.uint64],
        fetch: Fetch,
        scratch: Scratch,
        *,
        mapped: bool,
    ) -> None:
        """`mapped`: bytes that are not compressed are checked once, as a raw segment's; all others always."""
        self._row = row_nbytes
        self._codec: Codec = codec
        self._index = index
        self._fetch = fetch
        self._scratch = scratch
        self._seen = np.zeros(len(index), np.bool_) if mapped else None

    def copy(self, target: NDArray[Any], first: int) -> None:
        """Fill `target` [n, ...] with rows from `first` on. Raises: RowsGone, IntegrityError."""
        flat = target.reshape(-1).view(np.uint8)
        at = 0
        for number, skip, count in chunks_of(first, len(target)):
            out = flat[at * self._row : (at + count) * self._row]
            at += count
            if self._codec == "packed" and count == CHUNK_ROWS:
                unpack(self._stored(number), "packed", out)
            else:
                out[:] = self._whole(number)[skip * self._row : (skip + count) * self._row]

    def stored(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(chunk number, offset, size) of the chunks that hold these rows."""
        for number, _, _ in chunks_of(first, count):
            offset, size = self._index[number].tolist()
            if offset != ABSENT:
                yield number, offset, size

    def _whole(self, number: int) -> Bytes:
        """A chunk unpacked, valid until the next call by this thread."""
        nbytes = CHUNK_ROWS * self._row
        if self._codec == "packed":
            return self._scratch.chunk(
                (self, number), nbytes, lambda out: unpack(self._stored(number), "packed", out)
            )
        stored = self._stored(number)
        if self._seen is not None and self._seen[number]:
            return stored[:nbytes]
        body = checked(stored)
        if len(body) != nbytes:
            raise IntegrityError(f"chunk {number} has {len(body)} bytes, must have {nbytes}; take a copy")
        if self._seen is not None:
            self._seen[number] = True
        return body

    def _stored(self, number: int) -> Bytes:
        offset, size = self._index[number].tolist()
        if offset == ABSENT:
            raise IntegrityError(f"chunk {number} must hold committed rows but is empty; take it from a copy")
        return self._fetch(number, offset, size)


class TieredRows:
    """All columns of a segment whose wide columns are packed: rows [S * T] in table order."""

    def __init__(
        self, table: TableSpec, plain: Mapping[str, NDArray[Any]], wide: Mapping[str, WideColumn]
    ) -> None:
        """`plain` has the columns [S * T, ...] that lie unpacked, overlays too; `wide` has all others."""
        views = RowViews({name: plain[name] for name in table.all if name in plain})
        self._narrow = views.narrow
        self._wide: list[WideColumn | NDArray[Any]] = [
            wide[name] if name in wide else plain[name]
            for name, spec in table.all.items()
            if spec.nbytes > NARROW_NBYTES
        ]

    def copy(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home.copy_rows. Raises: RowsGone, IntegrityError."""
        for to, wide in zip(target.wide, self._wide, strict=True):
            if isinstance(wide, WideColumn):
                wide.copy(to[at : at + count], first)
            else:
                to[at : at + count] = wide[first : first + count]
        for (into, nbytes), (narrow, _) in zip(target.narrow, self._narrow, strict=True):
            into[at * nbytes : (at + count) * nbytes] = narrow[first * nbytes : (first + count) * nbytes]


def chunks_of(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(chunk number, rows to skip in it, rows of it) of rows first .. first + count - 1."""
    stop = first + count
    while first < stop:
        number, skip = divmod(first, CHUNK_ROWS)
        rows = min(CHUNK_ROWS - skip, stop - first)
        yield number, skip, rows
        first += rows
