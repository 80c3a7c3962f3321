"""Turns legal starts into batches. Between `index` (where they are) and `reader` (when one may be drawn)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.batches import BatchRing, mark_borders
from replay.index import StartIndex
from replay.rows import HomeT
from system.experience import Sequence, SequenceIds
from system.seeds import generator
from system.specs import ArraySpec


def uniform(rng: np.random.Generator, total: int, batch: int) -> NDArray[np.int64]:
    """`batch` independent draws from 0 .. total - 1, every legal start equally likely [B]."""
    return rng.integers(0, total, size=batch, dtype=np.int64)


class Sampler:
    """Uniform batches over all legal starts of an index. Equal seed and equal rows give equal batches."""

    def __init__(
        self, specs: Mapping[str, ArraySpec], *, batch: int, time: int, context: int, ring: int, seed: int
    ) -> None:
        """`time` rows per sequence, context included; the `ring`-th draw after a batch overwrites it."""
        self._batch = batch
        self._context = context
        self._rng = generator(seed, "replay", "sample")
        self._ring = BatchRing(specs, batch, time, ring)

    def draw(self, index: StartIndex[HomeT]) -> Sequence:
        """One batch [B, T]; the index must have at least one legal start."""
        drawn = index.resolve(uniform(self._rng, index.total, self._batch))
        buffer = self._ring.take()
        for row, (runs, position) in enumerate(drawn):
            at = 0
            for home, first, count in runs.pieces(position, index.length):
                home.copy_rows(buffer.sequences[row], at, first, count)
                at += count
        mark_borders(buffer.columns["is_first"], buffer.columns["is_last"])
        ids = SequenceIds(
            shard=np.asarray([runs.shard for runs, _ in drawn], np.int32),
            stream=np.asarray([runs.stream for runs, _ in drawn], np.int32),
            start=np.asarray([position for _, position in drawn], np.int64),
        )
        return Sequence(columns=dict(buffer.columns), ids=ids, context=self._context)

    def state(self) -> dict[str, Any]:
        """The generator's state, as JSON values."""
        return dict(self._rng.bit_generator.state)

    def load(self, state: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = dict(state)
