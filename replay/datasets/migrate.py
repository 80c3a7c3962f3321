"""A replay table again under another schema: rows are streamed, cast where asked, and keep their identity.

Streams, incarnations and episode numbers stay, so that a run can go on with the new table. What cannot be
appended anew is left out and counted: rows before the first is_first of a stream, or after a gap in it.
The source is only read; the new table appears when it is whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.admission import stream_of
from replay.datasets.episodes import Tally
from replay.datasets.inference import Casts
from replay.datasets.ingest import APPEND_SECONDS, LEAST_CAPACITY, Progress, quiet
from replay.datasets.table import GONE, HEADLESS, blocks, open_settled
from replay.datasets.whole import whole
from replay.shard import ReplayShard
from replay.view import TableView
from system.errors import ConfigError, RejectedError
from system.experience import Chunk
from system.specs import RESERVED, TableSpec

GAP = "rows after a gap"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Span:
    """Consecutive rows of one incarnation. They are appended by incarnation: older ones first."""

    incarnation: int
    stream: int
    lo: int
    hi: int


def migrated(found: TableSpec, casts: Casts, drop: Collection[str]) -> TableSpec:
    """The schema after casting and dropping columns. Raises: ConfigError for those that cannot be."""
    if unknown := sorted({*casts, *drop} - found.all.keys()):
        raise ConfigError(f"columns {unknown} are not in the table; it has {sorted(found.all)}")
    if fixed := sorted({*casts, *drop} & RESERVED):
        raise ConfigError(f"columns {fixed} belong to every row and stay as they are; leave them out")

    def changed(part: Any) -> dict[str, Any]:
        kept = {name: spec for name, spec in part.items() if name not in drop}
        return {n: replace(s, dtype=str(np.dtype(casts[n]))) if n in casts else s for n, s in kept.items()}

    return TableSpec(columns=changed(found.columns), overlay=changed(found.overlay))


def migrate(
    source: Path, target: Path, casts: Casts, drop: Collection[str] = (), progress: Progress = quiet
) -> Tally:
    """Write the rows of the table at `source` to a new table at `target`, shard by shard.

    Raises: ConfigError for columns that cannot change or when `target` exists; RejectedError for a value the
    new dtype cannot hold; SchemaError, IntegrityError, PreflightError as `layout.read_table`.
    """
    found, _ = layout.read_table(source)
    wanted = migrated(found, casts, drop)
    tally = Tally()
    view = open_settled(source, found)
    try:
        capacities = {shard.index: shard.capacity() for shard in view.views}
        with whole(target) as draft:
            layout.open_table(draft, wanted)
            for index in layout.shard_indices(source):
                streams = sorted(stream for shard, stream in view.index.streams if shard == index)
                rows = sum(hi - lo for s in streams for lo, hi in view.index.streams[index, s].bounds)
                about = capacities.get(index)
                capacity = max(about[0] if about else 0, rows, LEAST_CAPACITY)
                shard = ReplayShard(draft, index, wanted, capacity_rows=capacity)
                try:
                    spans = sorted(span for s in streams for span in _spans(view, index, s, tally))
                    for span in spans:
                        _copy(view, index, span, shard, wanted, tally)
                        progress(tally)
                    shard.flush()
                finally:
                    shard.close()
    finally:
        view.release()
    return tally


def _spans(view: TableView, shard: int, stream: int, tally: Tally) -> Iterator[_Span]:
    """The parts of a stream that can be appended anew, one or more for each incarnation."""
    runs = view.index.streams[shard, stream]
    after_gap: int | None = None  # incarnation of the row before a gap
    for lo, hi in runs.bounds:
        open_at: int | None = None
        incarnation = -1
        position = lo
        for block in blocks(view, runs, lo, hi):
            if isinstance(block, int):
                break
            size = len(block["is_first"])
            for row in range(size):
                now = int(block["incarnation"][row])
                if now != incarnation:
                    if open_at is not None:
                        yield _Span(incarnation=incarnation, stream=stream, lo=open_at, hi=position + row)
                    open_at, incarnation = None, now
                if now == after_gap:
                    tally.skip(GAP, 1)
                elif open_at is None and block["is_first"][row]:
                    open_at = position + row
                elif open_at is None:
                    tally.skip(HEADLESS, 1)
            position += size
        if open_at is not None:
            yield _Span(incarnation=incarnation, stream=stream, lo=open_at, hi=position)
        after_gap = incarnation


def _copy(
    view: TableView, index: int, span: _Span, shard: ReplayShard, wanted: TableSpec, tally: Tally
) -> None:
    runs = view.index.streams[index, span.stream]
    for block in blocks(view, runs, span.lo, span.hi):
        if isinstance(block, int):
            tally.skip(GONE, block)
            return  # what follows would leave a gap
        columns = {name: _cast(name, block[name], spec.dtype) for name, spec in wanted.all.items()}
        shard.append([Chunk(stream=stream_of(span.stream), columns=columns)], APPEND_SECONDS)
        tally.rows += len(columns["reward"])
        tally.nbytes += sum(int(values.nbytes) for values in columns.values())
        tally.episodes += int(columns["is_first"].sum())


def _cast(name: str, values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if values.dtype == dtype:
        return values
    kind = np.dtype(dtype).kind
    if kind in "iu":
        limits = np.iinfo(dtype)
        low, high = values.min(), values.max()
        if not limits.min <= low <= high <= limits.max:
            raise RejectedError(
                "range",
                f"column {name} spans {low}..{high}, {dtype} holds {limits.min}..{limits.max}; "
                "choose another",
            )
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused at the door
        return values.astype(dtype)
