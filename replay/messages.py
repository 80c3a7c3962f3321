"""Chunks as messages and back: raw column bytes, checked against the schema, no pickle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.experience_pb2 import AppendRequest, Column, RowChunk
from system.errors import RejectedError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import TableSpec

MESSAGE_BYTES = 2 << 20
"""Payload of one message; larger appends are sent as several. Fits any default gRPC limit of 4 MiB."""


def to_messages(table: TableSpec, chunks: list[Chunk]) -> Iterator[AppendRequest]:
    """Checked chunks in order, as messages of about MESSAGE_BYTES; long chunks are cut between rows."""
    per_message = max(1, MESSAGE_BYTES // table.row_nbytes)  # rows
    message, room = AppendRequest(schema=table.digest), per_message
    for chunk in chunks:
        start, total = 0, len(chunk)
        while start < total:
            stop = min(total, start + room)
            message.chunks.append(_message(chunk, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield message
                message, room = AppendRequest(schema=table.digest), per_message
    if message.chunks:
        yield message


def check_columns(table: TableSpec, chunk: Chunk) -> None:
    """Refuse on the sender's side what bytes alone could not show. Raises: SchemaError."""
    for name, spec in table.all.items():
        values = chunk.columns.get(name)
        if values is None or values.dtype != spec.dtype or values.shape[1:] != spec.shape:
            found = "missing" if values is None else f"{values.dtype}{list(values.shape)}"
            raise SchemaError(
                f"column {name} of a chunk of {chunk.stream} is {found}, must be {spec.dtype}"
                f"{['T', *spec.shape]}; fix what fills it"
            )
    if extra := sorted(chunk.columns.keys() - table.all.keys()):
        raise SchemaError(f"chunk of {chunk.stream} has columns {extra} that the table lacks; drop them")


def _message(chunk: Chunk, start: int, stop: int) -> RowChunk:
    columns = [
        Column(name=name, data=np.ascontiguousarray(values[start:stop]).tobytes())
        for name, values in chunk.columns.items()
    ]
    return RowChunk(actor=chunk.stream.actor, env=chunk.stream.env, rows=stop - start, columns=columns)


def from_message(table: TableSpec, message: AppendRequest) -> list[Chunk]:
    """The chunks of a message as views on its bytes.

    Raises: RejectedError (schema, columns, shape) when names or sizes are not the table's.
    """
    if message.schema != table.digest:
        raise RejectedError(
            "schema",
            f"sender's schema is {message.schema[:12]!r}, the replay's {table.digest[:12]!r}; start it "
            "with the environment and settings of this run",
        )
    return [_chunk(table, rows) for rows in message.chunks]


def _chunk(table: TableSpec, message: RowChunk) -> Chunk:
    specs, count = table.all, message.rows
    stream = StreamId(actor=message.actor, env=message.env)
    columns: dict[str, NDArray[Any]] = {}
    for column in message.columns:
        spec = specs.get(column.name)
        if spec is None or column.name in columns:
            raise RejectedError("columns", f"column {column.name[:64]!r} of {stream} is unknown or repeated")
        if len(column.data) != count * spec.nbytes:
            raise RejectedError(
                "shape",
                f"column {column.name} of {stream} has {len(column.data)} bytes, must have {count} rows of "
                f"{spec.nbytes}; fix the sender",
            )
        columns[column.name] = np.frombuffer(column.data, spec.dtype).reshape(count, *spec.shape)
    if "reward" not in columns:
        raise RejectedError("columns", f"chunk of {stream} lacks column reward; send every column")
    return Chunk(stream=stream, columns=columns)
