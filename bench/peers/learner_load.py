"""The load every DreamerV3 learner is measured under: batch, sizes, made-up rows, and how an update is timed.

Needs numpy and torch alone, because it runs inside the peers' environment too (`bench.learner_peers`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BATCH, LENGTH, HORIZON = 16, 64, 15
DETER, UNITS, STOCH, CLASSES, DEPTH, BINS, BLOCKS = 512, 64, 32, 4, 4, 255, 8
"""The official size1m."""
VECTOR, ACTION, SIDE = 24, 6, 64
EPISODE = 100
"""Rows per episode of the made-up experience."""


def made_up(case: str, time_rows: int = LENGTH) -> dict[str, NDArray[Any]]:
    """Noise [B, T, ...]: obs (vector [24] or image [64, 64, 3]), action [6], reward, is_first, is_last."""
    rng = np.random.default_rng(0)
    shape = (BATCH, time_rows)
    step = (np.arange(time_rows) + rng.integers(0, EPISODE, size=(BATCH, 1))) % EPISODE  # [B, T]
    if case == "image":
        obs: NDArray[Any] = rng.integers(0, 256, (*shape, SIDE, SIDE, 3), np.uint8)
        action = np.eye(ACTION, dtype=np.float32)[rng.integers(0, ACTION, shape)]
    else:
        obs = rng.standard_normal((*shape, VECTOR)).astype(np.float32)
        action = rng.uniform(-1, 1, (*shape, ACTION)).astype(np.float32)
    return {
        "obs": obs,
        "action": action,
        "reward": rng.standard_normal(shape).astype(np.float32),
        "is_first": step == 0,
        "is_last": step == EPISODE - 1,
    }


def time_updates(name: str, case: str, update: Callable[[], float], parameters: int, seconds: float) -> None:
    """Print the peer's rows as JSON lines: milliseconds per update (median, spread), trained parameters.

    update() does one whole training step and returns its loss. Raises: ArithmeticError when it is not finite.
    """
    for _ in range(2):
        update()
    spent: list[float] = []
    cpu = time.process_time()
    begun = time.perf_counter()
    while len(spent) < 5 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        loss = update()
        spent.append(1000 * (time.perf_counter() - start))
        if not np.isfinite(loss):
            raise ArithmeticError(f"the loss of {name} is {loss}; its figures mean nothing")
    cores = (time.process_time() - cpu) / (time.perf_counter() - begun)
    low, _, high = statistics.quantiles(spent, n=4, method="inclusive")
    median = statistics.median(spent)
    row = {"n": len(spent), "spread": (high - low) / median}
    _print(name, case, "update_ms", median, "ms", **row)
    _print(name, case, "cpu_per_wall", cores, "cores")
    _print(name, case, "params", parameters, "parameters")


def _print(name: str, case: str, metric: str, value: float, unit: str, **more: Any) -> None:
    row = {"bench": "learner", "case": f"{case} {name}", "metric": metric, "value": value, "unit": unit}
    print(json.dumps(row | more), flush=True)


def arguments() -> argparse.Namespace:
    """What `bench.learner_peers` asks a peer for. Sets the number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=("vector", "image"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options
