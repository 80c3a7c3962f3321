"""Rows out of and into the memory that holds them, by position: what every reader does with an index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from replay.index import StartIndex
from system.errors import SchemaError
from system.experience import WriteBack
from system.specs import TableSpec

NARROW_NBYTES = 256
"""Columns up to so many bytes per row are copied as bytes: a numpy slice copy costs twice a memoryview's."""


class RowViews:
    """Columns [rows, ...] of one piece of memory, in table order, as what copies fastest.

    Slices, never fancy indices: on mapped memory those cost thirteen times as much.
    """

    __slots__ = ("narrow", "wide")

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        sizes = {name: a.itemsize * int(np.prod(a.shape[1:], dtype=np.int64)) for name, a in columns.items()}
        self.wide = [a for name, a in columns.items() if sizes[name] > NARROW_NBYTES]
        self.narrow = [
            (a.reshape(-1).view(np.uint8).data, sizes[name])
            for name, a in columns.items()
            if sizes[name] <= NARROW_NBYTES
        ]


def copy_rows(target: RowViews, at: int, source: RowViews, first: int, count: int) -> None:
    """Copy rows first .. first + count - 1 of `source` to row `at` of `target`, all columns."""
    for to, wide in zip(target.wide, source.wide, strict=True):
        to[at : at + count] = wide[first : first + count]
    for (into, nbytes), (narrow, _) in zip(target.narrow, source.narrow, strict=True):
        into[at * nbytes : (at + count) * nbytes] = narrow[first * nbytes : (first + count) * nbytes]


class RowBlock(Protocol):
    """Memory that holds rows: views of all columns, and the overlay columns [rows, ...] by name."""

    views: RowViews
    overlay: dict[str, NDArray[Any]]


Block = TypeVar("Block", bound=RowBlock)


def write_overlay(table: TableSpec, index: StartIndex[Block], back: WriteBack) -> tuple[int, int]:
    """Overwrite overlay rows by position; return (rows written, rows dropped because they are not live).

    Raises: SchemaError for columns that are no overlay or have another shape or dtype.
    """
    batch, count = _check_write_back(table, back)
    written = 0
    for b in range(batch):
        runs = index.streams.get((int(back.ids.shard[b]), int(back.ids.stream[b])))
        if runs is None:
            continue
        begin = int(back.ids.start[b]) + back.offset
        first, last = max(begin, runs.lo), min(begin + count, runs.hi)
        if first >= last:
            continue
        at = first - begin
        for piece in runs.pieces(first, last - first):
            target = slice(piece.first, piece.first + piece.rows)
            for name, values in back.columns.items():
                piece.home.overlay[name][target] = values[b, at : at + piece.rows]
            at += piece.rows
        written += last - first
    return written, batch * count - written


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
