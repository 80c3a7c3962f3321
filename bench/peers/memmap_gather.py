"""One memory map per column, sequences gathered by fancy indexing: how sheeprl's buffers on disk work."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.peers.workload import BATCH, SHAPES, TIME, run


class MemmapGather:
    """Columns [capacity, ...] in files; a batch is one index array [BATCH, TIME] per column."""

    name = "memmap gather"

    def __init__(self, capacity: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-memmap-")
        self._columns = {
            name: np.memmap(Path(self._folder.name) / name, dtype, "w+", shape=(capacity, *shape))
            for name, (shape, dtype) in SHAPES.items()
        }
        self._used, self._capacity = 0, capacity
        self._rng = np.random.default_rng(0)

    def insert(self, rows: dict[str, NDArray[Any]]) -> None:
        count = min(len(rows["reward"]), self._capacity - self._used)
        for name, values in rows.items():
            self._columns[name][self._used : self._used + count] = values[:count]
        self._used += count

    def sample(self) -> list[Any]:
        starts = self._rng.integers(0, self._used - TIME, BATCH)
        index = starts[:, None] + np.arange(TIME)  # [BATCH, TIME]
        return [np.asarray(column[index]) for column in self._columns.values()]

    def close(self) -> None:
        self._columns.clear()
        self._folder.cleanup()


if __name__ == "__main__":
    run(MemmapGather)
