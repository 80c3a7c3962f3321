"""Checksums of rows: crc32c over every append, kept beside the rows and stored before the commit word.

`_check` [S, T, 2] of a segment holds, at the last row of an append, (crc32c of its identity and bytes, its
rows): every committed row is covered from the moment it is committed. Overlay columns change row by row, so
each row has a checksum of its own, made by numpy for many rows at once. Its weights are those of the replay
and the segment: latents of another one fail.

Order of the bytes: columns of <= 256 bytes per row by name, then the wider ones by name; each column's rows
follow each other. It depends on the schema alone, not on the order in which somebody lists it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from system.specs import ArraySpec, TableSpec

NARROW_NBYTES = 256
PLACE = struct.Struct("<3q")
CHECK = "_check"
"""Name of the checksum array, in a segment and in its overlay."""


class AppendCheck:
    """crc32c over rows of the immutable columns of one table."""

    def __init__(self, table: TableSpec) -> None:
        specs = table.columns
        self._narrow = sorted(name for name, spec in specs.items() if spec.nbytes <= NARROW_NBYTES)
        self._wide = sorted(name for name, spec in specs.items() if spec.nbytes > NARROW_NBYTES)

    def of(self, columns: Mapping[str, NDArray[Any]], start: int, stop: int, place: int) -> int:
        """crc32c of rows start .. stop - 1 of `columns` [T, ...], which are stored at `place`."""
        narrow = b"".join([columns[name][start:stop].tobytes() for name in self._narrow])
        crc = int(google_crc32c.extend(place, narrow))
        for name in self._wide:  # without a copy where the rows are contiguous, as they are in segments
            rows = np.ascontiguousarray(columns[name][start:stop])
            crc = int(google_crc32c.extend(crc, rows.reshape(-1).view(np.uint8)))
        return crc

    def good_rows(
        self,
        columns: Mapping[str, NDArray[Any]],
        check: NDArray[np.uint32],
        slot: NDArray[np.int64],
        limit: int,
    ) -> int:
        """Rows of one slot, from its first on, that make up whole appends with right checksums.

        At most `limit`. Needs no commit word. Entries that lead nowhere are passed over: damage to one costs
        its own append and what follows. Shapes: columns [T, ...], check [T, 2], slot [3] (actor, env,
        position of the first row).
        """
        good = 0
        counts = check[: max(0, limit), 1]
        for end in np.flatnonzero(counts).tolist():
            if int(counts[end]) == end + 1 - good and self.append_holds(columns, check, slot, end + 1):
                good = end + 1
        return good

    def append_holds(
        self,
        columns: Mapping[str, NDArray[Any]],
        check: NDArray[np.uint32],
        slot: NDArray[np.int64],
        stop: int,
    ) -> bool:
        """Whether an append ends before row `stop` of a slot and has the checksum it should."""
        crc, count = check[stop - 1].tolist()
        if not 0 < count <= stop:
            return False
        return self.of(columns, stop - count, stop, place_of(slot, stop - count)) == crc


def place_of(slot: NDArray[np.int64], at: int) -> int:
    """crc32c of where rows lie: actor, env, position. Rows under another identity fail their check."""
    actor, env, start = slot.tolist()
    return int(google_crc32c.value(PLACE.pack(actor, env, start + at)))


class OverlayCheck:
    """A checksum per row over the overlay columns of one table; rows of zeros have checksum 0.

    sum of w_i x_i modulo 2^32 over the row's 32-bit words, all w_i odd: any change within one word shows.
    """

    def __init__(self, overlay: Mapping[str, ArraySpec], replay_id: str, number: int) -> None:
        """For segment `number` of one replay: the rows of any other fail."""
        weights = np.random.default_rng([0x0DDC0DE, number % 2**64, google_crc32c.value(replay_id.encode())])
        self._weights: dict[str, NDArray[np.uint32]] = {
            name: weights.integers(0, 1 << 31, -(-overlay[name].nbytes // 4), dtype=np.uint32) * 2 + 1
            for name in sorted(overlay)
        }

    def of(self, columns: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.uint32]:
        """Checksums [n] of rows start .. stop - 1 of `columns` [T, ...]."""
        total = np.zeros(stop - start, np.uint32)
        if start == stop:
            return total
        for name, weights in self._weights.items():
            rows = np.ascontiguousarray(columns[name][start:stop])
            octets = _octets(rows)  # [n, bytes], n may be 0
            if octets.shape[1] % 4:
                padded = np.zeros((len(rows), 4 * len(weights)), np.uint8)
                padded[:, : octets.shape[1]] = octets
                octets = padded
            total += octets.view("<u4") @ weights  # wraps modulo 2^32
        return total


def _octets(rows: NDArray[Any]) -> NDArray[np.uint8]:
    return rows.reshape(-1).view(np.uint8).reshape(len(rows), math.prod(rows.shape[1:]) * rows.itemsize)
