"""Batches, write-backs and states of learner ranks, taken apart and put together. Used by `learner.ranks`."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import numpy as np

from learner.carrier_state import state_of, write_back_of
from system.experience import Columns, Sequence, SequenceIds, WriteBack

PENDING = "pending"
"""Entry of a state: what an agent that reports late has not yet reported."""


def split_sequence(sequence: Sequence, ranks: int) -> list[Sequence]:
    """The batch [B, T] in rank order, views of [B / ranks, T] each."""
    size = sequence.shape[0]
    assert size % ranks == 0, (size, ranks)
    part = size // ranks
    return [_rows(sequence, slice(rank * part, (rank + 1) * part)) for rank in range(ranks)]


def _rows(sequence: Sequence, rows: slice) -> Sequence:
    return replace(
        sequence,
        columns={name: array[rows] for name, array in sequence.columns.items()},
        ids=_ids(sequence.ids, rows),
        weights=None if sequence.weights is None else sequence.weights[rows],
        goal=None if sequence.goal is None else {name: array[rows] for name, array in sequence.goal.items()},
    )


def _rows_back(rows: WriteBack, part: slice) -> WriteBack:
    return replace(
        rows,
        ids=_ids(rows.ids, part),
        columns={name: array[part] for name, array in rows.columns.items()},
        priority=None if rows.priority is None else rows.priority[part],
    )


def _ids(ids: SequenceIds, rows: slice) -> SequenceIds:
    return SequenceIds(
        shard=ids.shard[rows],
        stream=ids.stream[rows],
        start=ids.start[rows],
        source=None if ids.source is None else ids.source[rows],
    )


def join_write_backs(parts: Many[WriteBack | None]) -> WriteBack | None:
    """What all ranks write back [B, ...], in rank order; None when there is nothing."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    first = found[0]
    assert len(found) == len(parts), "some ranks skipped the update and others did not"
    assert all(part.offset == first.offset for part in found), [part.offset for part in found]
    columns: Columns = {
        name: np.concatenate([part.columns[name] for part in found]) for name in first.columns
    }
    source = [part.ids.source for part in found if part.ids.source is not None]
    priority = [part.priority for part in found if part.priority is not None]
    return WriteBack(
        ids=SequenceIds(
            shard=np.concatenate([part.ids.shard for part in found]),
            stream=np.concatenate([part.ids.stream for part in found]),
            start=np.concatenate([part.ids.start for part in found]),
            source=np.concatenate(source) if source else None,
        ),
        offset=first.offset,
        columns=columns,
        priority=np.concatenate(priority) if priority else None,
    )


def state_part(state: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The agent's state for one rank: of rows that wait to be reported it has its own."""
    pending = state.get(PENDING)
    if pending is None or pending["rows"] is None:
        return dict(state)
    rows = write_back_of(pending["rows"])
    size = len(rows.ids.start)
    assert size % ranks == 0, (size, ranks)
    own = slice(rank * size // ranks, (rank + 1) * size // ranks)
    return {**state, PENDING: {**pending, "rows": state_of(_rows_back(rows, own))}}
