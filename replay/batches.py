"""Batch memory: page-aligned buffers, made once and used in turn."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.rows import RowViews
from system.specs import ArraySpec


class BatchBuffer:
    """Columns [B, T, ...] of one batch; `sequences[b]` are the views [T, ...] of one.

    Page-aligned on purpose: numpy's own memory is 16 bytes off a cache line, where copies run at half speed.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], batch: int, time: int) -> None:
        self.columns: dict[str, NDArray[Any]] = {}
        for name, spec in specs.items():
            count = batch * time * int(np.prod(spec.shape, dtype=np.int64))
            memory = mmap.mmap(-1, count * np.dtype(spec.dtype).itemsize)
            self.columns[name] = np.frombuffer(memory, spec.dtype, count).reshape(batch, time, *spec.shape)
        self.sequences = [RowViews({name: a[b] for name, a in self.columns.items()}) for b in range(batch)]


class BatchRing:
    """Hands out buffers in turn; one stays untouched until `size` more batches were taken."""

    def __init__(self, specs: Mapping[str, ArraySpec], batch: int, time: int, size: int) -> None:
        self._buffers = [BatchBuffer(specs, batch, time) for _ in range(size)]
        self._next = 0

    def take(self) -> BatchBuffer:
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer


def mark_borders(is_first: NDArray[np.bool_], is_last: NDArray[np.bool_]) -> None:
    """Close episodes that a restarted actor left open: is_last[:, t] |= is_first[:, t + 1], both [B, T].

    Rows are stored as the environment made them; only the sampled copy says where the break is.
    """
    np.logical_or(is_last[:, :-1], is_first[:, 1:], out=is_last[:, :-1])
