"""The shape of a segment: how many slots of how many rows. Between `specs` and `segment`."""

from __future__ import annotations

from dataclasses import dataclass

from system.errors import ConfigError

CHUNK_ROWS = 64
"""Rows of one inner chunk: the unit foreign readers fetch, and of compression once sealed."""
TARGET_BYTES = 128 << 20
MAX_SLOT_ROWS = 1024
SLOTS_PER_SEGMENT = 16


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
