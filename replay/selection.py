"""Which starts to draw: pure functions of a Generator and the index's counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniform(rng: np.random.Generator, total: int, batch: int) -> NDArray[np.int64]:
    """`batch` independent draws from 0 .. total - 1, every legal start equally likely [B]."""
    return rng.integers(0, total, size=batch, dtype=np.int64)
