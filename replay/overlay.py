"""The mapped overlay of a segment that is no longer raw: its mutable columns stay local files."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.checks import CHECK, OverlayCheck
from replay.segment import CHUNK_ROWS, Geometry, data_path
from system.errors import IntegrityError, PreflightError
from system.specs import ArraySpec, TableSpec

log = logging.getLogger(__name__)


def map_file(path: Path, nbytes: int | None = None, *, writable: bool = False) -> mmap.mmap:
    """A whole file of exactly `nbytes` bytes, mapped.

    Raises: FileNotFoundError; IntegrityError for another size; PreflightError when it cannot be mapped.
    """
    try:
        handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PreflightError(f"cannot open {path} ({error.strerror}); check permissions") from error
    try:
        actual = os.fstat(handle).st_size
        if actual == 0 or actual != (nbytes or actual):
            raise IntegrityError(f"{path} has {actual} bytes, must have {nbytes}; `dreamfleet replay repair`")
        return mmap.mmap(handle, actual, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except OSError as error:
        raise PreflightError(
            f"cannot map {path} ({error.strerror}); check `ulimit -n` and vm.max_map_count"
        ) from error
    finally:
        os.close(handle)


def map_rows(path: Path, spec: ArraySpec, rows: int, *, writable: bool = False) -> NDArray[Any]:
    """An array [rows, ...] of a raw segment or overlay, without the shard index behind it.

    Raises: as `map_file`.
    """
    data = rows * spec.nbytes
    found = map_file(path, data + rows // CHUNK_ROWS * 16 + 4, writable=writable)
    count = data // np.dtype(spec.dtype).itemsize
    return np.frombuffer(found, spec.dtype, count).reshape(rows, *spec.shape)


class MappedOverlay:
    """Overlay columns [S * T, ...] of one segment, writable, with a checksum per row."""

    def __init__(
        self, segment: Path, table: TableSpec, geometry: Geometry, *, replay_id: str, number: int
    ) -> None:
        """Map the overlay beside `segment`, whatever its tier. Raises: as `map_file`."""
        self._group = group = layout.overlay_path(segment)
        self.columns: dict[str, NDArray[Any]] = {
            name: map_rows(data_path(group, name, 2 + len(spec.shape)), spec, geometry.total, writable=True)
            for name, spec in table.overlay.items()
        }
        self._sum = OverlayCheck(table.overlay, replay_id, number)
        self.check = np.zeros(geometry.total, np.uint32)  # [S * T]
        if table.overlay:
            found = map_file(data_path(group, CHECK, 2), 4 * geometry.total, writable=True)
            self.check = np.frombuffer(found, np.uint32)

    @property
    def files(self) -> dict[str, NDArray[Any]]:
        """All arrays of the group, each [S * T, ...]."""
        return {**self.columns, CHECK: self.check} if self.columns else {}

    def write(self, name: str, first: int, values: NDArray[Any]) -> int:
        """Overwrite rows of one column and renew their checksums; return how many."""
        rows = slice(first, first + len(values))
        self.columns[name][rows] = values
        self.check[rows] = self._sum.of(self.columns, rows.start, rows.stop)
        return len(values)

    def mend(self, committed: NDArray[np.int64], slot_rows: int) -> None:
        """Reset committed rows whose checksum fails to zeros, the initial latents. `committed` is [S]."""
        live = (np.arange(slot_rows) < committed[:, None]).reshape(-1)
        bad = np.flatnonzero(live & (self._sum.of(self.columns, 0, len(self.check)) != self.check))
        if not len(bad):
            return
        for array in (*self.columns.values(), self.check):
            array[bad] = 0
        log.warning("overlay rows reset", extra={"overlay": str(self._group), "rows": len(bad)})
