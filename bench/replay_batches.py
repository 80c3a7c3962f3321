"""Draws batches from a replay as a learner would, and looks at every row of every sequence.

Between `damage`, which reads all rows once, and the chaos trials: what counts in the end is a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.damage import strange_latents
from replay import synthetic
from replay.admission import stream_of
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from system.errors import DeadlineError
from system.experience import Columns, Sequence, StreamId
from system.specs import TableSpec

BATCH, LENGTH = 16, 12
SETTLE_SECONDS, SAMPLE_SECONDS = 60.0, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What `draw` saw."""

    sequences: int
    wrong: tuple[str, ...]  # sequences with rows that were not appended, or not in their order


class Known:
    """Rows of every stream as they were appended, made once: all of incarnation 0."""

    def __init__(self, table: TableSpec) -> None:
        self.table = table
        self._made: dict[StreamId, Columns] = {}

    def rows(self, stream: StreamId, stop: int) -> Columns:
        """Rows 0 .. stop - 1 at least, each column [T, ...]."""
        made = self._made.get(stream)
        if made is None or len(made["step"]) < stop:
            made = synthetic.rows(self.table, stream, 0, max(512, 2 * stop)).columns
            self._made[stream] = made
        return made


def draw(root: Path, known: Known, batches: int, seed: int) -> Drawn:
    """Draw up to `batches` batches with a reader of its own; fewer where there is nothing to draw from.

    Raises: as LocalReader.
    """
    limiter = RateLimiter(1e6, 0, 1 << 30, 1)
    reader = LocalReader(
        root, known.table, seed=seed, limiter=limiter, controls=[], batch=BATCH, length=LENGTH, ring=1
    )
    wrong: list[str] = []
    sequences = 0
    try:
        for number in range(batches):
            if number == batches // 2:  # the first ones while segments may still wait to be vetted
                reader.settle(SETTLE_SECONDS)
            try:
                batch = reader.sample(SAMPLE_SECONDS)
            except DeadlineError:  # no sequence of this length is left
                reader.settle(SETTLE_SECONDS)
                break
            sequences += BATCH
            wrong += wrong_sequences(batch, known)
    finally:
        reader.close()
    return Drawn(sequences=sequences, wrong=tuple(wrong))


def wrong_sequences(batch: Sequence, known: Known) -> list[str]:
    """Sequences whose rows do not follow each other or are not what was appended."""
    numbers = synthetic.row_number(dict(batch.columns))  # [B, T]
    found: list[str] = []
    for b, got in enumerate(numbers):
        stream = stream_of(int(batch.ids.stream[b]))
        if got[0] < 0 or got[0] > 1 << 24 or not np.array_equal(got, got[0] + np.arange(len(got))):
            found.append(f"{stream} rows {got.tolist()} are not consecutive")
            continue
        made = known.rows(stream, int(got[-1]) + 1)
        rows = slice(int(got[0]), int(got[-1]) + 1)
        table = known.table
        bad = [name for name in table.columns if not np.array_equal(batch.columns[name][b], made[name][rows])]
        bad += [
            name for name in table.overlay if strange_latents(batch.columns[name][b], made[name][rows]).any()
        ]
        if bad:
            found.append(f"{stream} rows {got[0]}..{got[-1]} differ in {bad}")
    return found
