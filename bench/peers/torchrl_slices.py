"""TorchRL: a memory-mapped storage and its sampler of slices."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, ReplayBuffer, SliceSampler

from bench.peers.workload import BATCH, EPISODE_ROWS, SHAPES, TIME, run


class TorchrlSlices:
    """ReplayBuffer(LazyMemmapStorage, SliceSampler), trajectories cached as its documentation advises."""

    name = "torchrl"

    def __init__(self, capacity: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-torchrl-")
        self._buffer = ReplayBuffer(
            storage=LazyMemmapStorage(capacity, scratch_dir=self._folder.name),
            sampler=SliceSampler(num_slices=BATCH, traj_key="episode", strict_length=True, cache_values=True),
            batch_size=BATCH * TIME,
        )
        self._inserted = 0

    def insert(self, rows: dict[str, NDArray[Any]]) -> None:
        count = len(rows["reward"])
        values = {name: torch.from_numpy(column) for name, column in rows.items()}
        values["episode"] = (self._inserted + torch.arange(count)) // EPISODE_ROWS
        self._buffer.extend(TensorDict(values, batch_size=[count]))
        self._inserted += count

    def sample(self) -> list[Any]:
        batch = self._buffer.sample()
        return [batch[name] for name in SHAPES]

    def close(self) -> None:
        self._folder.cleanup()


if __name__ == "__main__":
    run(TorchrlSlices)
