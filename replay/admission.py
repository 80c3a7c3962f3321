"""What may enter a stream: checks of a chunk against the schema and against the rows already stored.

Pure functions and one carrier, shared by the shard and the in-memory replay. Every refusal is a
RejectedError whose `reason` is the label of the rejection counter:

    columns  dtype  shape  nonfinite  range  flags   the rows themselves are wrong
    identity                                         rows of one chunk do not follow each other
    gap                                              rows before these are missing
    zombie                                           an older incarnation than already seen
    incarnation                                      a new incarnation that does not begin an episode
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import RejectedError
from system.experience import Chunk, Columns, StreamId
from system.specs import ArraySpec, TableSpec

MAX_ENV = 1 << 16
MAX_ACTOR = 1 << 15


def stream_key(stream: StreamId) -> int:
    """The int32 that stands for a stream in SequenceIds.stream: the same in every process and life."""
    return stream.actor << 16 | stream.env


def stream_of(key: int) -> StreamId:
    return StreamId(actor=key >> 16, env=key & (MAX_ENV - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The newest stored row of a stream; `position` is where the next row goes. Positions only grow.

    A torn cursor stands before acknowledged rows that were lost: what comes next may begin later.
    """

    position: int
    incarnation: int
    episode: int
    step: int
    is_last: bool
    torn: bool = False

    @classmethod
    def unknown(cls, position: int) -> Cursor:
        """Of a stream that had rows before `position`, all lost: it may go on anywhere."""
        return cls(position=position, incarnation=-1, episode=0, step=-1, is_last=False, torn=True)

    @classmethod
    def after(cls, columns: Columns, row: int, position: int) -> Cursor:
        """Cursor behind `row` of `columns` [T, ...], stored at position - 1."""
        return cls(
            position=position,
            incarnation=int(columns["incarnation"][row]),
            episode=int(columns["episode"][row]),
            step=int(columns["step"][row]),
            is_last=bool(columns["is_last"][row]),
        )


def check_chunk(table: TableSpec, chunk: Chunk) -> None:
    """Check everything that can be known without the stream's past. Raises: RejectedError."""
    stream, columns = chunk.stream, chunk.columns
    if not (0 <= stream.actor < MAX_ACTOR and 0 <= stream.env < MAX_ENV):
        raise RejectedError(
            "range", f"stream {stream} must have actor < {MAX_ACTOR} and env < {MAX_ENV}; renumber the actors"
        )
    specs = table.all
    if columns.keys() != specs.keys():
        missing, extra = sorted(specs.keys() - columns.keys()), sorted(columns.keys() - specs.keys())
        raise RejectedError(
            "columns",
            f"chunk of {stream} lacks columns {missing} and has unknown {extra}; send exactly the "
            "table's columns",
        )
    first = columns["reward"]
    length = first.shape[0] if first.ndim else 0
    if length == 0:
        raise RejectedError("shape", f"chunk of {stream} has no rows; send at least one")
    for name, spec in specs.items():
        _check_column(stream, name, spec, columns[name], length)
    _check_flags(stream, columns)


def all_sound(
    table: TableSpec, chunks: list[Chunk], columns: Mapping[str, NDArray[Any]], ends: list[int]
) -> bool:
    """Whether `check_chunk` accepts every chunk, found at once; it says what is wrong when this does not.

    `columns` are the table's, each [R, ...] in its dtype and shape: chunk k, then chunk k + 1 from row
    ends[k] on.
    """
    if not chunks:
        return True
    if not all(0 <= c.stream.actor < MAX_ACTOR and 0 <= c.stream.env < MAX_ENV for c in chunks):
        return False
    for name, spec in table.all.items():
        low, high, top = _span(name, spec, columns[name])
        if low < 0 or high > top or not _finite(columns[name]):
            return False
    incarnation, episode, step, is_last = (columns[k] for k in ("incarnation", "episode", "step", "is_last"))
    if (columns["is_terminal"] > is_last).any() or (columns["is_first"] != (step == 0)).any():
        return False
    grows = (episode[1:] - episode[:-1] == is_last[:-1]) & (incarnation[1:] == incarnation[:-1])
    follows = grows & (step[1:] == np.where(is_last[:-1], 0, step[:-1] + 1))
    follows[np.asarray(ends[:-1], np.int64) - 1] = True  # the next row is another chunk's
    return bool(follows.all())


def _check_column(
    stream: StreamId, name: str, spec: ArraySpec, values: NDArray[np.generic], length: int
) -> None:
    if values.dtype != spec.dtype:
        raise RejectedError(
            "dtype",
            f"column {name} of {stream} is {values.dtype}, must be {spec.dtype}; nothing is cast silently",
        )
    if values.shape != (length, *spec.shape):
        raise RejectedError(
            "shape",
            f"column {name} of {stream} has shape {list(values.shape)}, must be "
            f"{[length, *spec.shape]}; fix the sender",
        )
    if not _finite(values):
        raise RejectedError(
            "nonfinite", f"column {name} of {stream} holds NaN or infinity; fix the environment"
        )
    low, high, top = _span(name, spec, values)
    if low < 0 or high > top:
        raise RejectedError(
            "range",
            f"column {name} of {stream} spans {low}..{high}, must stay within 0..{top if top else ''}; "
            "fix the sender",
        )


def _finite(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _span(name: str, spec: ArraySpec, values: NDArray[Any]) -> tuple[int, int, int]:
    """(lowest, highest, highest allowed) value, as far as values are limited; none may be below 0."""
    if values.dtype.kind == "b":
        return 0, int(np.max(values.view(np.uint8))), 1  # a wire byte of 2 is no bool
    if spec.kind == "discrete":
        return int(np.min(values)), int(np.max(values)), spec.classes - 1
    if values.dtype.kind == "i" and (name == "action" or not spec.shape):
        return int(np.min(values)), 0, 0
    return 0, 0, 0


def _check_flags(stream: StreamId, columns: Mapping[str, NDArray[Any]]) -> None:
    incarnation, episode, step = (columns[k] for k in ("incarnation", "episode", "step"))
    is_first, is_last, is_terminal = (columns[k] for k in ("is_first", "is_last", "is_terminal"))
    if (is_terminal & ~is_last).any():
        raise RejectedError("flags", f"a row of {stream} is_terminal without is_last; set both")
    if (is_first != (step == 0)).any():
        raise RejectedError("flags", f"a row of {stream} must be is_first exactly where step is 0")
    same = (episode[1:] == episode[:-1]) & (step[1:] == step[:-1] + 1) & ~is_last[:-1]
    following = (episode[1:] == episode[:-1] + 1) & (step[1:] == 0) & is_last[:-1]
    if not ((same | following) & (incarnation[1:] == incarnation[:-1])).all():
        raise RejectedError(
            "identity",
            f"rows of one chunk of {stream} must follow each other: step + 1, or after is_last the next "
            "episode at step 0, all of one incarnation",
        )


def rows_known(cursor: Cursor | None, newest_incarnation: int, chunk: Chunk) -> int:
    """How many leading rows of a checked chunk are already stored; the rest follows the cursor directly.

    `newest_incarnation` is the highest seen from the chunk's actor, -1 when none was.
    Raises: RejectedError (gap, zombie, incarnation).
    """
    stream, columns = chunk.stream, chunk.columns
    incarnation, episode, step = (int(columns[k][0]) for k in ("incarnation", "episode", "step"))
    if incarnation < newest_incarnation:
        raise RejectedError(
            "zombie",
            f"chunk of {stream} is from incarnation {incarnation}, actor {stream.actor} is now at "
            f"{newest_incarnation}; stop the old process",
        )
    if cursor is None or incarnation > cursor.incarnation:
        if step != 0 and not chunk.continues and not (cursor is not None and cursor.torn):
            raise RejectedError(
                "incarnation",
                f"incarnation {incarnation} of {stream} begins at episode {episode} step {step}, must begin "
                "with an is_first row; restart the actor's environments",
            )
        return 0
    stored = (cursor.episode, cursor.step)
    wanted = (cursor.episode + 1, 0) if cursor.is_last else (cursor.episode, cursor.step + 1)
    if (episode, step) > wanted:
        if cursor.torn or chunk.continues:
            return 0
        raise RejectedError(
            "gap",
            f"chunk of {stream} begins at episode {episode} step {step}, must continue at episode "
            f"{wanted[0]} step {wanted[1]}; send the missing rows or start a new incarnation",
        )
    if (episode, step) == wanted:
        return 0
    keys = columns["episode"].astype(np.int64) << 32 | columns["step"].astype(np.int64)  # [T], ascending
    known = int(np.searchsorted(keys, stored[0] << 32 | stored[1], side="right"))
    if known == 0 or (known < len(chunk) and _identity(columns, known) != wanted):
        raise RejectedError(
            "gap",
            f"chunk of {stream} begins at episode {episode} step {step} but does not lead to the next row "
            f"wanted (episode {wanted[0]} step {wanted[1]}): its episodes ended elsewhere; "
            "start a new incarnation",
        )
    return known


def leaves_gap(cursor: Cursor | None, chunk: Chunk) -> bool:
    """Whether a chunk that `continues`, none of whose rows are known, lies behind rows that are not here.

    The store must then skip a position, so that no sequence spans the gap.
    """
    if cursor is None or cursor.torn:  # nothing before it; or positions were skipped already
        return False
    begins = (int(chunk.columns["incarnation"][0]), *_identity(chunk.columns, 0))
    wanted = (cursor.episode + 1, 0) if cursor.is_last else (cursor.episode, cursor.step + 1)
    return begins != (cursor.incarnation, *wanted)


def _identity(columns: Columns, row: int) -> tuple[int, int]:
    return int(columns["episode"][row]), int(columns["step"][row])
