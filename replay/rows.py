"""Rows out of and into the homes that hold them, by position: what every reader does with an index.

A *home* is where the rows of some runs lie: a mapped segment, a compressed one, another shard. The sampler
copies rows through it and knows nothing else about them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from replay.index import Piece, StartIndex
from replay.native import load_gather
from system.errors import SchemaError
from system.experience import Columns, WriteBack
from system.specs import TableSpec

NARROW_NBYTES = 256
"""Columns up to so many bytes per row are copied as bytes: a numpy slice copy costs twice a memoryview's."""


class RowViews:
    """Columns [rows, ...] of one piece of memory, in table order, as what copies fastest.

    Slices, never fancy indices: on mapped memory those cost thirteen times as much.
    """

    __slots__ = ("_tables", "addresses", "columns", "layout", "narrow", "nbytes", "rows", "sizes", "wide")

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """The arrays must be contiguous and of equal length."""
        sizes = {name: a.itemsize * int(np.prod(a.shape[1:], dtype=np.int64)) for name, a in columns.items()}
        self.columns = dict(columns)
        self.rows = min((len(a) for a in columns.values()), default=0)
        self.sizes = tuple(sizes.values())
        self.layout = tuple(sizes.items())  # equal sizes alone would let columns of another order pass
        self._tables = (
            np.asarray([a.ctypes.data for a in columns.values()], np.uint64),  # [columns]
            np.asarray(self.sizes, np.int64),  # [columns]
        )
        self.addresses, self.nbytes = (table.ctypes.data for table in self._tables)  # for the compiled copy
        assert all(a.flags.c_contiguous for a in columns.values())
        self.wide = [a for name, a in columns.items() if sizes[name] > NARROW_NBYTES]
        self.narrow = [
            (a.reshape(-1).view(np.uint8).data, sizes[name])
            for name, a in columns.items()
            if sizes[name] <= NARROW_NBYTES
        ]


def copy_rows(target: RowViews, at: int, source: RowViews, first: int, count: int) -> None:
    """Copy rows first .. first + count - 1 of `source` to row `at` of `target`, all columns.

    Raises: RowsGone when the source has no such rows; ValueError when the target has no room for them.
    """
    assert target.layout == source.layout, (target.layout, source.layout)
    if not 0 <= first <= source.rows - count:
        raise RowsGone(f"rows {first} to {first + count} must lie within the {source.rows} of their home")
    if not 0 <= at <= target.rows - count:
        raise ValueError(f"rows {at} to {at + count} must lie within the {target.rows} of the target")
    gather = load_gather()
    if gather is None:
        copy_rows_by_numpy(target, at, source, first, count)
        return
    gather(len(target.sizes), target.addresses, source.addresses, target.nbytes, at, first, count)


def copy_rows_by_numpy(target: RowViews, at: int, source: RowViews, first: int, count: int) -> None:
    """As `copy_rows`, where there is no compiler."""
    for to, wide in zip(target.wide, source.wide, strict=True):
        to[at : at + count] = wide[first : first + count]
    for (into, nbytes), (narrow, _) in zip(target.narrow, source.narrow, strict=True):
        into[at * nbytes : (at + count) * nbytes] = narrow[first * nbytes : (first + count) * nbytes]


class RowsGone(Exception):
    """Rows of the index are no longer there: evicted, quarantined, or their shard died. Draw others."""


class Home(Protocol):
    """Where rows of runs lie; they count from 0 inside it. One thread copies at a time."""

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """Copy rows first .. first + count - 1, all columns of the table, to row `at` of `target`.

        Raises: RowsGone.
        """
        ...

    def will_need(self, first: int, count: int) -> None:
        """These rows will be copied soon. A hint, given some batches ahead; returns at once."""
        ...

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """Overwrite rows of an overlay column by `values` [rows, ...]; return how many: 0 when read-only."""
        ...


class SegmentHome(Home, Protocol):
    """One segment in some tier; row r of slot s is row s * slot_rows + r of the home."""

    @property
    def replay_id(self) -> str:
        """The replay it was made for, which tells it from segments of others with the same schema."""
        ...

    @property
    def slot_rows(self) -> int:
        """Rows of one slot (T)."""
        ...

    @property
    def slots(self) -> NDArray[np.int64]:
        """Actor, env and first position of each slot [S, 3]; -1 when free."""
        ...

    @property
    def committed(self) -> NDArray[np.int64]:
        """Complete rows of each slot [S]; grows under a mapped segment that is being filled."""
        ...

    @property
    def distant(self) -> bool:
        """As ShardView: copies may wait for a disk, the network, a decoder."""
        ...

    def good_rows(self) -> NDArray[np.int64]:
        """Read it all; return how many committed rows of each slot the checksums confirm [S].

        Raises: IntegrityError when nothing may be read, FileNotFoundError when it is gone.
        """
        ...

    def mend(self) -> None:
        """Reset committed overlay rows whose checksums fail to zeros, the initial latents."""
        ...


class MemoryHome:
    """Rows in arrays [rows, ...] of this process, in table order; those named in `overlay` may change."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], overlay: Collection[str] = ()) -> None:
        self.views = RowViews(arrays)
        self.overlay = {name: arrays[name] for name in overlay}
        self.plain: Mapping[str, NDArray[Any]] = arrays  # all that needs no unpacking
        self._is_first = arrays.get("is_first")

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home."""
        copy_rows(target, at, self.views, first, count)

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """As episodes.FlagHome."""
        return None if self._is_first is None else self._is_first[first : first + count]

    def will_need(self, first: int, count: int) -> None:
        """Nothing: the rows are here."""

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home."""
        self.overlay[name][first : first + len(values)] = values
        return len(values)


HomeT = TypeVar("HomeT", bound=Home)


def write_overlay(
    table: TableSpec,
    index: StartIndex[HomeT],
    back: WriteBack,
    before: Callable[[HomeT, int, int], None] | None = None,
) -> tuple[int, int]:
    """Overwrite overlay rows by position; return (rows written, rows dropped: not live or read-only).

    `before(home, first, count)` is told of all rows that are about to change.
    Raises: SchemaError for columns that are no overlay or have another shape or dtype.
    """
    batch, count = _check_write_back(table, back)
    written = 0
    for b in range(batch):
        runs = index.streams.get((int(back.ids.shard[b]), int(back.ids.stream[b])))
        if runs is None:
            continue
        begin = int(back.ids.start[b]) + back.offset
        for lo, hi in runs.overlap(begin, begin + count):
            at = lo - begin
            for piece in runs.pieces(lo, hi - lo):
                source = slice(at, at + piece.rows)
                if before is not None:
                    before(piece.home, piece.first, piece.rows)
                written += _write_piece(piece, {k: v[b, source] for k, v in back.columns.items()})
                at += piece.rows
    return written, batch * count - written


def _write_piece(piece: Piece[HomeT], columns: Columns) -> int:
    """Rows of one piece that were written, in all columns."""
    try:
        return min(piece.home.write_overlay(name, piece.first, v) for name, v in columns.items())
    except RowsGone:
        return 0


def _check_write_back(table: TableSpec, back: WriteBack) -> tuple[int, int]:
    columns: Mapping[str, NDArray[Any]] = back.columns
    if unknown := sorted(columns.keys() - table.overlay.keys()):
        raise SchemaError(
            f"write-back of {unknown} must name overlay columns {sorted(table.overlay)}; "
            "all others are immutable"
        )
    batch, count = len(back.ids.start), 0
    for name, values in columns.items():
        spec = table.overlay[name]
        count = count or (values.shape[1] if values.ndim > 1 else 0)
        if values.dtype != np.dtype(spec.dtype) or values.shape != (batch, count, *spec.shape):
            raise SchemaError(
                f"write-back column {name} is {values.dtype}{list(values.shape)}, must be "
                f"{spec.dtype}{[batch, 'L', *spec.shape]}, one L for all columns; cast and reshape it"
            )
    return batch, count
