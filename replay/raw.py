"""The home of rows in a raw segment: mapped files, nothing between the page cache and the batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import seal
from replay.checks import CHECK
from replay.cut import segment_key
from replay.pages import is_resident, read_ahead
from replay.rows import MemoryHome
from replay.segment import Segment
from replay.vetting import sealed_rows
from system.specs import TableSpec

log = logging.getLogger(__name__)

LOOKS = 4
"""Pages of a segment that are looked at to tell whether it is in memory."""


class MappedSegment(MemoryHome):
    """A segment as flat views [S * T, ...]."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        arrays = {**segment.columns, **segment.overlay}
        flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in arrays.items()}
        super().__init__(flat, segment.overlay)
        self._places = [
            (a.ctypes.data, size) for a, size in zip(flat.values(), self.views.sizes, strict=True)
        ]
        self.overlay_key = segment_key(segment.path)
        checks = {CHECK: segment.overlay_check.reshape(-1)} if segment.overlay else {}
        self.overlay_files = {**self.overlay, **checks}  # [S * T, ...]

    @property
    def replay_id(self) -> str:
        """As SegmentHome."""
        return self.segment.replay

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

    @property
    def distant(self) -> bool:
        """As SegmentHome: whether pages of the widest column had to be read from the device."""
        address, nbytes = max(self._places, key=lambda place: place[1])
        rows = [
            slot * self.slot_rows + used // 2 for slot, used in enumerate(self.committed.tolist()) if used
        ]
        return not all(is_resident(address + row * nbytes) for row in rows[:: max(1, len(rows) // LOOKS)])

    def will_need(self, first: int, count: int) -> None:
        """As Home: the kernel reads the pages, while this goes on."""
        for address, nbytes in self._places:
            read_ahead(address + first * nbytes, count * nbytes)

    def mend(self) -> None:
        """As SegmentHome."""
        if mended := self.segment.mend_overlay():
            log.warning("overlay rows reset", extra={"segment": self.segment.path.name, "rows": mended})

    def good_rows(self) -> NDArray[np.int64]:
        """As SegmentHome."""
        if seal.is_sealed(self.segment.path):
            return sealed_rows(self.segment.path, self.committed)
        good = np.zeros(len(self.committed), np.int64)
        for slot, used in enumerate(self.committed.tolist()):
            if used:
                self.will_need(slot * self.slot_rows, used)
                good[slot] = self.segment.good_rows(slot)
        return good

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home; the checksums of the rows follow."""
        written = super().write_overlay(name, first, values)
        self.segment.check_overlay(first, written)
        return written


def open_raw(path: Path, table: TableSpec) -> MappedSegment:
    """Map a published segment. Raises: as `Segment.open`."""
    return MappedSegment(Segment.open(path, table))
