"""Rows out of and into the blocks that hold them, by position: what every reader does with an index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from replay.batches import BatchBuffer
from replay.index import StartIndex, StreamRuns
from system.errors import SchemaError
from system.experience import WriteBack
from system.specs import TableSpec


class RowBlock(Protocol):
    """Memory that holds rows: views [rows, ...] of all columns in table order, and of overlays by name."""

    flat: list[NDArray[Any]]
    overlay: dict[str, NDArray[Any]]


Block = TypeVar("Block", bound=RowBlock)


def copy_sequence(buffer: BatchBuffer, b: int, runs: StreamRuns[Block], position: int, length: int) -> None:
    """Fill sequence b of the buffer with `length` rows of a stream: one slice copy per column and run.

    Slices, never fancy indices: on mapped memory those cost thirteen times as much.
    """
    at = 0
    targets = buffer.sequences[b]
    for piece in runs.pieces(position, length):
        first, last = piece.first, piece.first + piece.count
        if piece.count == length:
            for target, source in zip(targets, piece.home.flat, strict=True):
                target[...] = source[first:last]
            return
        for target, source in zip(targets, piece.home.flat, strict=True):
            target[at : at + piece.count] = source[first:last]
        at += piece.count


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
            target = slice(piece.first, piece.first + piece.count)
            for name, values in back.columns.items():
                piece.home.overlay[name][target] = values[b, at : at + piece.count]
            at += piece.count
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
