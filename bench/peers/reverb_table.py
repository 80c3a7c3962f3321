"""Reverb: a uniform table of overlapping trajectories, read through its TensorFlow dataset."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import reverb
import tensorflow as tf
from numpy.typing import NDArray

from bench.peers.workload import BATCH, SHAPES, TIME, run

STRIDE = 13
"""Rows between the beginnings of two items: every row is in five sequences, as in a Dreamer's replay."""


class ReverbTable:
    """One stream, items of TIME rows; the dataset prefetches as its documentation advises."""

    name = "reverb"

    def __init__(self, capacity: int) -> None:
        signature = {
            name: tf.TensorSpec((TIME, *shape), tf.as_dtype(dtype)) for name, (shape, dtype) in SHAPES.items()
        }
        table = reverb.Table(
            "rows",
            sampler=reverb.selectors.Uniform(),
            remover=reverb.selectors.Fifo(),
            max_size=capacity // STRIDE,
            rate_limiter=reverb.rate_limiters.MinSize(1),
            signature=signature,
        )
        self._server = reverb.Server([table], port=None)
        self._client = reverb.Client(f"localhost:{self._server.port}")
        self._writer = self._client.trajectory_writer(num_keep_alive_refs=TIME)
        self._inserted = 0
        self._batches: Any = None

    def insert(self, rows: dict[str, NDArray[Any]]) -> None:
        for row in range(len(rows["reward"])):
            self._writer.append({name: values[row] for name, values in rows.items()})
            self._inserted += 1
            if self._inserted >= TIME and self._inserted % STRIDE == 0:
                window = {name: self._writer.history[name][-TIME:] for name in SHAPES}
                self._writer.create_item("rows", priority=1.0, trajectory=window)
        self._writer.flush(block_until_num_items=8)

    def sample(self) -> list[Any]:
        if self._batches is None:
            self._writer.flush()
            dataset = reverb.TrajectoryDataset.from_table_signature(
                f"localhost:{self._server.port}", "rows", max_in_flight_samples_per_worker=2 * BATCH
            )
            self._batches = dataset.batch(BATCH).prefetch(2).as_numpy_iterator()
        batch = next(self._batches)
        return [np.asarray(values) for values in batch.data.values()]

    def close(self) -> None:
        self._batches = None
        self._writer.close()
        self._server.stop()


if __name__ == "__main__":
    run(ReverbTable)
