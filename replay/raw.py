"""The home of rows in a raw segment: mapped files, nothing between the page cache and the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replay.checks import CHECK
from replay.cut import segment_key
from replay.rows import MemoryHome
from replay.segment import Segment
from system.specs import TableSpec


class MappedSegment(MemoryHome):
    """A segment as flat views [S * T, ...]."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        arrays = {**segment.columns, **segment.overlay}
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in arrays.items()}
        super().__init__(flat, segment.overlay)
        self.distant = False
        self.overlay_key = segment_key(segment.path)
        checks = {CHECK: segment.overlay_check.reshape(-1)} if segment.overlay else {}
        self.overlay_files = {**self.overlay, **checks}  # [S * T, ...]

    @property
    def slot_rows(self) -> int:
        """Rows of one slot (T)."""
        return self.segment.geometry.rows

    @property
    def slots(self) -> NDArray[np.int64]:
        """Actor, env and first position of each slot [S, 3]; -1 when free."""
        return self.segment.slots

    @property
    def committed(self) -> NDArray[np.int64]:
        """Complete rows of each slot [S]."""
        return self.segment.committed


def open_raw(path: Path, table: TableSpec) -> MappedSegment:
    """Map a published segment. Raises: as `Segment.open`."""
    return MappedSegment(Segment.open(path, table))
