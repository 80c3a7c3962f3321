"""Gives disk blocks back: what a dead owner reserved in its last segments and can no longer fill."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replay.segment import Segment, data_path

KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h
PAGE = 4096


def release_unused(segment: Segment) -> None:
    """Free the blocks behind the committed rows of a segment that nobody writes to any more.

    The files keep their size and stay valid Zarr. Where the filesystem cannot do it, nothing happens.
    """
    rows = segment.geometry.rows
    for group, arrays in segment.groups():
        for name, array in arrays.items():
            nbytes = array.itemsize * array[0, 0].size
            ranges = [
                ((slot * rows + used) * nbytes, (slot + 1) * rows * nbytes)
                for slot, used in enumerate(segment.committed.tolist())
            ]
            _punch(data_path(group, name, array.ndim), ranges)


def _punch(path: Path, ranges: list[tuple[int, int]]) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        for start, stop in _joined(ranges):
            first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
            if first < last:
                _fallocate()(handle, KEEP_SIZE_AND_PUNCH, first, last - first)
    finally:
        os.close(handle)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbours, so that pages across two empty slots are freed too."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


@functools.cache
def _fallocate() -> Callable[..., Any]:
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return lambda *_: 0
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call
