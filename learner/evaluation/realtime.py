"""How fast a world model answers when one world waits for it: whether a person could play in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from learner.evaluation.rows import Rows, leaves, map_leaves, observe
from learner.interfaces import Tree, WorldModel


@torch.no_grad()
def latency(
    model: WorldModel, rows: Rows, generator: torch.Generator, *, repeats: int = 30
) -> dict[str, float]:
    """Milliseconds at batch 1, median and 95th percentile: `observe` a row, `step` once, `read` it."""
    one = replace(
        rows,
        batch=map_leaves(lambda leaf: leaf[:1, :1], rows.batch),
        start=map_leaves(lambda leaf: leaf[:1], rows.start),
    )
    noise, ahead = model.noise(1, 1, generator), model.noise(1, 1, generator)
    what = frozenset({"obs"} if "decode" in model.caps else {"feat"})
    carry, action = observe(model, one, noise)[0], rows.actions[:1, :1]
    reached = model.imagine(carry, 1, action, ahead).state
    parts: dict[str, Callable[[], Tree]] = {
        "observe": lambda: observe(model, one, noise)[0],
        "step": lambda: model.imagine(carry, 1, action, ahead).state,
        "read": lambda: model.read(reached, what),
    }
    found: dict[str, float] = {}
    for name, part in parts.items():
        taken = [_milliseconds(part) for _ in range(repeats)]
        found[f"{name}_p50_ms"] = float(np.median(taken))
        found[f"{name}_p95_ms"] = float(np.quantile(taken, 0.95))
    return found


def _milliseconds(part: Callable[[], Tree]) -> float:
    """Until the numbers are on the CPU: devices answer before they are done."""
    begun = time.perf_counter()
    for leaf in leaves(part()):
        leaf.cpu()
    return 1000.0 * (time.perf_counter() - begun)
