"""Sends what the learner writes back to where its rows lie: the source, the position, the priorities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from replay.plans import Planner
from replay.rows import Home, write_overlay
from system.errors import SchemaError
from system.experience import SequenceIds, WriteBack
from system.metrics import Metrics
from system.specs import TableSpec


class Written(NamedTuple):
    """What became of the rows of a write-back."""

    rows: int = 0  # overlay rows written
    dropped: int = 0  # overlay rows that are not live any more, or read-only
    stale: int = 0  # rows with a priority that are not live any more
    priorities: int = 0  # rows whose priority was taken

    def export(self, metrics: Metrics) -> None:
        """Add to the counters."""
        rows, priorities = "learner_write_back_rows_total", "learner_priority_rows_total"
        metrics.labels(rows, outcome="written").inc(self.rows)
        metrics.labels(rows, outcome="evicted").inc(self.dropped)
        metrics.labels(priorities, outcome="written").inc(self.priorities)
        metrics.labels(priorities, outcome="evicted").inc(self.stale)


def apply(
    rows: WriteBack,
    planner: Planner,
    table: TableSpec,
    step: int,
    *,
    before: Callable[[Home, int, int], None] | None = None,
) -> Written:
    """Overwrite overlay rows and priorities. Row i of a sequence lies i * `step` positions behind its start.

    `before` as `rows.write_overlay`. Raises: SchemaError for what does not fit.
    """
    written = dropped = stale = priorities = 0
    for source, part in _by_source(rows, len(planner.pools)):
        index = planner.pools[source].index
        if part.columns:
            done, gone = write_overlay(table, index, _spread(part, step), before=before)
            written, dropped = written + done, dropped + gone
        if part.priority is not None:
            gone = planner.write(source, part.ids, part.offset, part.priority)
            stale, priorities = stale + gone, priorities + part.priority.size - gone
    return Written(written, dropped, stale, priorities)


def _by_source(rows: WriteBack, sources: int) -> Iterator[tuple[int, WriteBack]]:
    if rows.ids.source is None:
        if sources > 1:
            raise SchemaError("write-back to several sources must say which; pass the ids of the sequence on")
        yield 0, rows
        return
    for source in np.unique(rows.ids.source).tolist():
        here = rows.ids.source == source
        if not 0 <= source < sources:
            raise SchemaError(f"write-back to source {source} must be to one of {sources}; ask its reader")
        ids = rows.ids
        yield (
            source,
            WriteBack(
                ids=SequenceIds(shard=ids.shard[here], stream=ids.stream[here], start=ids.start[here]),
                offset=rows.offset,
                columns={name: values[here] for name, values in rows.columns.items()},
                priority=None if rows.priority is None else rows.priority[here],
            ),
        )


def _spread(rows: WriteBack, step: int) -> WriteBack:
    """The same rows as sequences of one row each, where they are not neighbours."""
    if step == 1:
        return rows
    shapes = {name: values.shape for name, values in rows.columns.items()}
    batch = len(rows.ids.start)
    lengths = {shape[1] if len(shape) > 1 and shape[0] == batch else -1 for shape in shapes.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise SchemaError(
            f"write-back columns have shapes {shapes}, must all be [{batch}, L, ...]; reshape them"
        )
    length = lengths.pop()
    start = rows.ids.start[:, None] + (rows.offset + np.arange(length)) * step  # [B, L]
    ids = SequenceIds(
        shard=np.repeat(rows.ids.shard, length),
        stream=np.repeat(rows.ids.stream, length),
        start=start.reshape(-1),
    )
    columns = {name: v.reshape(batch * length, 1, *v.shape[2:]) for name, v in rows.columns.items()}
    return WriteBack(ids=ids, offset=0, columns=columns)
