"""One run seed, many independent streams of random numbers, each named by who uses it."""

from __future__ import annotations

import zlib

import numpy as np


def child_seed(seed: int, *path: str | int) -> int:
    """A 31-bit seed for the part named by `path`, for example (7, "actor", 3, "incarnation", 1).

    Different paths give statistically independent streams (numpy SeedSequence spawning).
    """
    words = [zlib.crc32(str(part).encode()) for part in path]
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, *words]).generate_state(1)[0] & 0x7FFFFFFF)


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """A numpy Generator for the part named by `path`."""
    return np.random.default_rng(child_seed(seed, *path))
