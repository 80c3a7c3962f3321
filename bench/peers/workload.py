"""The load every replay is measured under: rows, batch shape, and the memcpy it is compared with.

Needs numpy alone, because it runs inside the peers' environment too (`bench.replay_peers`).
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BATCH, LENGTH, CONTEXT, RING = 16, 64, 1, 3
TIME = LENGTH + CONTEXT
EPISODE_ROWS = 1000
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "image": ((64, 64, 3), "uint8"),
    "vector": ((24,), "float32"),
    "action": ((6,), "float32"),
    "reward": ((), "float32"),
    "is_first": ((), "bool"),
    "is_terminal": ((), "bool"),
}
"""One row of a peer. Ours holds the same and its identity and latents besides."""
ROW_NBYTES = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in SHAPES.values())
NOISE_ROWS = 4096


class Memcpy:
    """One copy of `nbytes` per call, out of `blocks` places in turn, into a page-aligned ring of RING."""

    def __init__(self, nbytes: int, blocks: int) -> None:
        self._source = pages(nbytes * blocks).reshape(blocks, nbytes)
        self._source[:] = 1
        self._ring = [pages(nbytes) for _ in range(RING)]
        for block in self._ring:
            block[:] = 0
        self._turn = 0

    def __call__(self) -> None:
        self._turn += 1
        # A large odd stride: the next block is not the one the hardware prefetched.
        block = self._turn * 7919 % len(self._source)
        self._ring[self._turn % RING][:] = self._source[block]


def pages(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory [nbytes]."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def noise(count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """`count` rows that do not compress, each column [count, ...]; flags are all False."""
    rng = np.random.default_rng(seed)
    rows: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in SHAPES.items():
        if dtype == "uint8":
            rows[name] = rng.integers(0, 256, (count, *shape), np.uint8)
        elif dtype == "float32":
            rows[name] = rng.standard_normal((count, *shape)).astype(np.float32)
        else:
            rows[name] = np.zeros((count, *shape), bool)
    return rows


class Peer(Protocol):
    """A replay buffer of another project."""

    name: str

    def insert(self, rows: dict[str, NDArray[Any]]) -> None: ...  # each [n, ...], the next n rows of a stream
    def sample(self) -> list[Any]: ...  # one batch of BATCH x TIME rows: its arrays, each with nbytes
    def close(self) -> None: ...


def measure(peer: Peer, gigabytes: float, seconds: float) -> list[dict[str, Any]]:
    """Fill the peer, then time its batches and memcpy of as many bytes in turn; rows for `bench.load.Row`."""
    rows = int(gigabytes * 1e9 / ROW_NBYTES)
    bank = noise(NOISE_ROWS)
    inserted, spent = 0, 0.0
    while inserted < rows:
        begin = inserted % NOISE_ROWS
        part = {name: values[begin : begin + 64] for name, values in bank.items()}
        begun = time.perf_counter()
        peer.insert(part)
        spent += time.perf_counter() - begun
        inserted += 64
    nbytes = sum(array.nbytes for array in peer.sample())
    copy = Memcpy(nbytes, max(1, int(gigabytes * 1e9 / nbytes)))
    kept: deque[list[Any]] = deque(maxlen=RING - 1)  # a learner still uses the batches before this one

    def draw() -> None:
        kept.append(peer.sample())

    for _ in range(3):
        draw()
        copy()
    sampled: list[float] = []
    copied: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(sampled) < 5:
        sampled.append(_timed(draw))
        copied.append(_timed(copy))
    # Buffers that work ahead answer in bursts, so the mean is the rate; for the others mean and median agree.
    rate, memcpy = nbytes / statistics.fmean(sampled), nbytes / statistics.median(copied)
    base = {"bench": "replay", "case": f"{peer.name} image {gigabytes:g}GB", "n": len(sampled)}
    return [
        {**base, "metric": "append_rate", "value": inserted / spent, "unit": "rows/s", "n": 1},
        {**base, "metric": "memcpy_rate", "value": memcpy / 1e9, "unit": "GB/s"},
        {
            **base,
            "metric": "sample_rate",
            "value": rate / 1e9,
            "unit": "GB/s",
            "ratio": rate / memcpy,
            "ratio_to": "memcpy",
        },
    ]


def run(make: Callable[[int], Peer]) -> None:
    """A peer's program: build it for so many rows, measure, print one JSON object per row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    peer = make(int(options.gigabytes * 1e9 / ROW_NBYTES) + EPISODE_ROWS)
    try:
        for row in measure(peer, options.gigabytes, options.seconds):
            print(json.dumps(row), flush=True)
    finally:
        peer.close()


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
