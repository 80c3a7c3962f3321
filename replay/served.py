"""What a shard shows to learners on other nodes: which of its rows are live, and the rows, packed.

Reads its own directory as any reader on the node would (`replay.follow`), whatever tier a segment is in.
Between `service` (the wire) and the homes that copy; `replay.remote` is the other end.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from replay import layout
from replay.episodes import FlagHome
from replay.evolve import evolving
from replay.follow import OPENERS, MappedShard
from replay.index import StartIndex
from replay.messages import RowCodec
from replay.rows import Home, RowsGone, RowViews
from replay.vetting import Vetting
from system.errors import RejectedError
from system.wire import MAX_MESSAGE_BYTES

LONGEST_READ_BYTES = MAX_MESSAGE_BYTES // 2
MOST_FLAGS = 1 << 20
"""Rows whose flags travel in one message, as experience.proto says."""


class Span(NamedTuple):
    """Rows of one stream: positions start .. start + rows - 1."""

    origin: int  # shard that the rows were first stored in
    stream: int
    start: int
    rows: int


class ServedRows:
    """The rows of one shard directory by position. Safe for many threads; one reads at a time."""

    def __init__(self, directory: Path, index: int, codec: RowCodec) -> None:
        """Raises: FileNotFoundError when the shard has not been made; as `layout.read_table`."""
        _, replay_id = layout.read_table(directory.parent)
        openers = evolving(OPENERS, directory.parent, foreign=False)
        self.life = secrets.randbits(63) | 1
        self._codec = codec
        self._lock = threading.Lock()
        self._index: StartIndex[Home] = StartIndex(1)
        self._vetting = Vetting()
        self._shard = MappedShard(
            directory, index, codec.table, self._vetting, replay_id=replay_id, openers=openers
        )

    def fragments(self, life: int, version: int) -> tuple[int, NDArray[np.int64] | None]:
        """The version of what is live, and the fragments [F, 4] unless `version` of `life` is still true."""
        with self._lock:
            self._shard.refresh(self._index)
            now = self._index.version
            if (life, version) == (self.life, now):
                return now, None
            return now, np.stack(self._index.fragments(), axis=1)

    def capacity(self) -> tuple[int, int]:
        """(capacity, segment) rows."""
        return self._shard.capacity() or (0, 0)

    def read(self, spans: list[Span]) -> tuple[list[int], bytes]:
        """Rows found of every span, all or none, and the found ones packed in order.

        Raises: RejectedError (size) when they do not fit one message.
        """
        nbytes = sum(span.rows for span in spans) * self._codec.row_nbytes
        if nbytes > LONGEST_READ_BYTES:
            raise RejectedError("size", f"a read of {nbytes} bytes must be <= {LONGEST_READ_BYTES}; split it")
        with self._lock:
            self._shard.refresh(self._index)
            gone: set[int] = set()
            while True:
                gone |= {at for at, span in enumerate(spans) if not self._live(span)}
                rows = [0 if at in gone else span.rows for at, span in enumerate(spans)]
                payload, lost = self._pack(spans, rows)
                if lost is None:
                    return rows, payload
                gone.add(lost)

    def first_flags(self, span: Span) -> NDArray[np.bool_] | None:
        """is_first of a span [rows]; None when it is not live.

        Raises: RejectedError (size).
        """
        if not 0 < span.rows <= MOST_FLAGS:
            raise RejectedError("size", f"flags of {span.rows} rows must be of 1 .. {MOST_FLAGS}; split it")
        parts: list[NDArray[np.bool_]] = []
        with self._lock:
            self._shard.refresh(self._index)
            if not self._live(span):
                return None
            runs = self._index.streams[span.origin, span.stream]
            for home, first, count in runs.pieces(span.start, span.rows):
                found = home.first_flags(first, count) if isinstance(home, FlagHome) else None
                if found is None:  # no tier does this: it is a narrow column
                    return None
                parts.append(found)
            return np.concatenate(parts)

    def write(self, origin: int, stream: int, start: int, column: str, data: bytes) -> int:
        """Overwrite live rows of an overlay column from position `start` on; returns how many.

        Raises: RejectedError (columns, shape).
        """
        spec = self._codec.table.overlay.get(column)
        if spec is None:
            raise RejectedError("columns", f"write-back of {column[:64]!r} must name an overlay column")
        count, rest = divmod(len(data), spec.nbytes)
        if rest:
            raise RejectedError(
                "shape", f"write-back of {column} has {len(data)} bytes, rows have {spec.nbytes}"
            )
        values = np.frombuffer(data, spec.dtype).reshape(count, *spec.shape)
        written = 0
        with self._lock:
            self._shard.refresh(self._index)
            runs = self._index.streams.get((origin, stream))
            if runs is None:
                return 0
            for lo, hi in runs.overlap(start, start + count):
                at = lo - start
                for home, first, rows in runs.pieces(lo, hi - lo):
                    with contextlib.suppress(RowsGone):
                        written += home.write_overlay(column, first, values[at : at + rows])
                    at += rows
        return written

    def close(self) -> None:
        """Let go of the maps."""
        self._vetting.stop()
        with self._lock:
            self._shard.release(self._index)

    def _live(self, span: Span) -> bool:
        runs = self._index.streams.get((span.origin, span.stream))
        end = span.start + span.rows
        return runs is not None and any(part == (span.start, end) for part in runs.overlap(span.start, end))

    def _pack(self, spans: list[Span], rows: list[int]) -> tuple[bytes, int | None]:
        """The spans with rows, packed; or which of them went away meanwhile."""
        total = sum(rows)
        memory = np.empty(total * self._codec.row_nbytes, np.uint8)
        views = RowViews(self._codec.views(memory, total))
        at = 0
        for number, (span, count) in enumerate(zip(spans, rows, strict=True)):
            if not count:
                continue
            runs = self._index.streams[span.origin, span.stream]
            for home, first, part in runs.pieces(span.start, count):
                try:
                    home.copy_rows(views, at, first, part)
                except RowsGone:
                    return b"", number
                at += part
        return memory.tobytes(), None
