"""Endless rows for the replay benches, and how to fill a shard with them."""

from __future__ import annotations

from bench.load import timed
from replay import synthetic
from replay.shard import ReplayShard
from system.experience import Chunk, StreamId
from system.specs import ROW_COLUMNS, TableSpec

STREAMS = 8
CHUNK_ROWS = 64
TIMEOUT = 120.0


def fill_shard(shard: ReplayShard, table: TableSpec, count: int) -> float:
    """Append about `count` rows to STREAMS streams; return the seconds spent in append."""
    feeds = [Feed(table, StreamId(actor=0, env=env)) for env in range(STREAMS)]
    spent = 0.0
    for _ in range(-(-count // (STREAMS * CHUNK_ROWS))):
        chunks = [feed.next() for feed in feeds]
        spent += timed(lambda chunks=chunks: shard.append(chunks, TIMEOUT))
    return spent


class Feed:
    """Endless chunks of one stream: the noise repeats every few chunks, the identity goes on."""

    def __init__(
        self, table: TableSpec, stream: StreamId, *, incarnation: int = 0, chunk: int = CHUNK_ROWS
    ) -> None:
        self._noise = [
            synthetic.rows(table, stream, n * chunk, chunk, incarnation=incarnation).columns for n in range(4)
        ]
        self._table = TableSpec(
            columns={k: v for k, v in table.columns.items() if k in ROW_COLUMNS}, overlay={}
        )
        self._stream, self._incarnation, self._chunk = stream, incarnation, chunk
        self._sent = 0

    def next(self) -> Chunk:
        identity = synthetic.rows(
            self._table, self._stream, self._sent, self._chunk, incarnation=self._incarnation
        ).columns
        noise = self._noise[self._sent // self._chunk % len(self._noise)]
        self._sent += self._chunk
        return Chunk(stream=self._stream, columns={**noise, **identity})
