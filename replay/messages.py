"""Chunks as messages and back: raw column bytes, checked against the schema, no pickle.

A message carries the rows of many chunks as one block of bytes, column after column so that the receiver
makes one view per column whatever the number of chunks. Its length follows from schema and rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.experience_pb2 import AppendRequest
from system.errors import RejectedError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import TableSpec

MESSAGE_BYTES = 2 << 20
"""Payload of one message; larger appends are sent as several. Fits any default gRPC limit of 4 MiB."""
HEARD = "x-dreamfleet-heard"
"""Trailer of a missed deadline that the shard itself declared: it is there, and holds the rows back."""
PAYLOAD_TAG = bytes([AppendRequest.PAYLOAD_FIELD_NUMBER << 3 | 2])
"""Field number and wire type "length-delimited" of the payload, as protobuf encodes them."""

Part = tuple[Chunk, int, int]  # rows start .. stop - 1 of a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Made by RowCodec, taken by the shard. The chunks' columns are slices of `columns`, in order."""

    chunks: list[Chunk]
    columns: dict[str, NDArray[Any]]  # each [R, ...], the rows of all chunks
    ends: list[int]  # row behind each chunk


class RowCodec:
    """Chunks of one table to AppendRequests and back. What follows from the schema is worked out once."""

    def __init__(self, table: TableSpec) -> None:
        self.table = table
        self.digest = table.digest
        self.row_nbytes = table.row_nbytes
        self._per_message = max(1, MESSAGE_BYTES // self.row_nbytes)  # rows
        self._specs = table.all
        # Wide items first, so that all columns of a payload are aligned; then by name: alike everywhere.
        self._order = sorted(self._specs, key=lambda n: (-np.dtype(self._specs[n].dtype).itemsize, n))

    def encode(self, chunks: list[Chunk]) -> Iterator[bytes]:
        """Checked chunks in order, as encoded AppendRequests of about MESSAGE_BYTES; long chunks are cut."""
        parts: list[Part] = []
        room = self._per_message
        for chunk in chunks:
            start, total = 0, len(chunk)
            while start < total:
                stop = min(total, start + room)
                parts.append((chunk, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield self._encode(parts)
                    parts, room = [], self._per_message
        if parts:
            yield self._encode(parts)

    def fits_one(self, chunks: list[Chunk]) -> bool:
        """Whether `encode` makes one message of these rows."""
        return sum(map(len, chunks)) <= self._per_message

    def _encode(self, parts: list[Part]) -> bytes:
        """Protobuf by hand around the payload: the library would copy it twice more."""
        head = AppendRequest(
            schema=self.digest,
            actor=[chunk.stream.actor for chunk, _, _ in parts],
            env=[chunk.stream.env for chunk, _, _ in parts],
            rows=[stop - start for _, start, stop in parts],
        )
        if any(chunk.continues for chunk, _, _ in parts):
            head.continues.extend(chunk.continues and start == 0 for chunk, start, _ in parts)
        pieces: list[Any] = [
            np.ascontiguousarray(chunk.columns[name][start:stop])
            for name in self._order
            for chunk, start, stop in parts
        ]
        size = sum(stop - start for _, start, stop in parts) * self.row_nbytes
        return b"".join((head.SerializeToString(), PAYLOAD_TAG, _varint(size), *pieces))

    def check_columns(self, chunk: Chunk) -> None:
        """Refuse on the sender's side what bytes alone could not show. Raises: SchemaError."""
        length = len(chunk)
        for name, spec in self._specs.items():
            values = chunk.columns.get(name)
            if values is None or values.dtype != spec.dtype or values.shape != (length, *spec.shape):
                found = "missing" if values is None else f"{values.dtype}{list(values.shape)}"
                raise SchemaError(
                    f"column {name} of a chunk of {chunk.stream} is {found}, must be {spec.dtype}"
                    f"{[length, *spec.shape]}; fix what fills it"
                )
        if extra := sorted(chunk.columns.keys() - self._specs.keys()):
            raise SchemaError(f"chunk of {chunk.stream} has columns {extra} that the table lacks; drop them")

    def decode(self, message: AppendRequest) -> RowBatch:
        """The chunks of a message as views on its bytes.

        Raises: RejectedError (schema, shape) when its schema or its size is not the table's.
        """
        if message.schema != self.digest:
            raise RejectedError(
                "schema",
                f"sender's schema is {message.schema[:12]!r}, the replay's {self.digest[:12]!r}; start it "
                "with the environment and settings of this run",
            )
        counts, payload = list(message.rows), message.payload
        total = sum(counts)
        continues = list(message.continues) or [False] * len(counts)
        if not len(message.actor) == len(message.env) == len(continues) == len(counts) or 0 in counts:
            raise RejectedError(
                "shape",
                f"message names {len(message.actor)} actors, {len(message.env)} envs and {len(counts)} "
                "counts of rows; every chunk must have one of each and at least one row: fix the sender",
            )
        if len(payload) != total * self.row_nbytes:
            raise RejectedError(
                "shape",
                f"message of {len(counts)} chunks has {len(payload)} bytes, must have {total} rows of "
                f"{self.row_nbytes}; send every column in the documented order",
            )
        ends = [0, *accumulate(counts)]
        columns = self.views(payload, total)
        chunks = [
            Chunk(
                stream=StreamId(actor=actor, env=env),
                columns={name: values[first:stop] for name, values in columns.items()},
                continues=goes_on,
            )
            for actor, env, goes_on, first, stop in zip(
                message.actor, message.env, continues, ends[:-1], ends[1:], strict=True
            )
        ]
        return RowBatch(chunks=chunks, columns=columns, ends=ends[1:])

    def views(self, payload: bytes | NDArray[np.uint8], total: int) -> dict[str, NDArray[Any]]:
        """Every column [R, ...] of a payload, in the table's order."""
        found: dict[str, NDArray[Any]] = {}
        at = 0
        for name in self._order:
            spec = self._specs[name]
            entries = total * math.prod(spec.shape)
            found[name] = np.frombuffer(payload, spec.dtype, entries, at).reshape(total, *spec.shape)
            at += found[name].nbytes
        return {name: found[name] for name in self._specs}


def rows_claimed(message: AppendRequest) -> int:
    """Rows a refused message may have held, for the counter: what it says, but no more than it has bytes."""
    return min(sum(message.rows), len(message.payload))


def _varint(value: int) -> bytes:
    """Protobuf's base-128 number, low groups first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
