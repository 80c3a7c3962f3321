"""Which shard an actor writes to, and how it moves when shards join, leave or fall silent.

Between the actor, whose ReplayWriter this is, and one `client.GrpcReplayWriter` per home. Rows are stored at
most once over all shards: rows whose fate at a silent shard is unknown are never sent to another one.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

import grpc

from system.errors import ConfigError, DeadlineError
from system.experience import Ack, Chunk, StreamId
from system.interfaces import ReplayWriter
from system.metrics import Metrics
from system.wire import OPEN, Security, open_channel

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 15.0
"""Silence of a home after which its actors move: longer than a shard takes to restart."""
PROBE_SECONDS = 5.0
"""How often an actor away from its proper home looks whether that one is back."""
ANSWER_SECONDS = 0.5


class HomeWriter(ReplayWriter, Protocol):
    """A ReplayWriter to one shard that knows when the shard was last heard of."""

    @property
    def heard(self) -> float:
        """time.monotonic() of its last word, of this writer's making before the first."""
        ...


def ranked(actor: int, shards: Collection[int]) -> list[int]:
    """Shards by this actor's preference: rendezvous hashing, so that each shard's loss spreads evenly.

    Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates".
    """
    return sorted(shards, key=lambda shard: (_weight(actor, shard), shard), reverse=True)


def assign(actors: int, shards: Collection[int]) -> list[int]:
    """The home of each actor 0 .. actors - 1: as `ranked`, but no shard gets more than its even share.

    Every process works out the same. When a shard joins or leaves, few others than its own actors move.
    Raises: ConfigError without shards.
    """
    if not shards:
        raise ConfigError("actors need at least one replay shard (replay.shards must be >= 1)")
    most = -(-actors // len(shards))
    load = dict.fromkeys(shards, 0)
    homes: list[int] = []
    for actor in range(actors):
        home = next(shard for shard in ranked(actor, shards) if load[shard] < most)
        load[home] += 1
        homes.append(home)
    return homes


def _weight(actor: int, shard: int) -> bytes:
    return hashlib.blake2b(f"actor {actor} shard {shard}".encode(), digest_size=8).digest()


def answers(address: str, security: Security = OPEN, timeout: float = ANSWER_SECONDS) -> bool:
    """Whether somebody accepts calls at host:port within `timeout` seconds."""
    with open_channel(address, security) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout)
        except grpc.FutureTimeoutError:
            return False
    return True


class HomedWriter:
    """ReplayWriter of one actor over all shards. Not for several threads at once, save `set_shards`.

    It moves between appends only, and takes with it no row that its old home may have: an append without an
    answer is repeated there until it has one, or the home has been silent for `patience_seconds` and
    another shard answers. Then these rows, at most one append, are dropped and counted as lost: the
    Ack leaves them out. At a new home streams go on behind a gap (`Chunk.continues`).
    """

    def __init__(
        self,
        actor: int,
        actors: int,
        shards: Mapping[int, str],
        connect: Callable[[str], HomeWriter],
        *,
        answers: Callable[[str], bool] = answers,
        patience_seconds: float = PATIENCE_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`shards`: addresses by number. `actors` share them evenly; `clock` is that of HomeWriter.heard.

        Raises: ConfigError without shards.
        """
        self._actor, self._actors = actor, max(actors, actor + 1)
        self._connect, self._answers = connect, answers
        self._patience, self._probe_seconds = patience_seconds, probe_seconds
        self._metrics, self._clock = metrics, clock
        self._shards = dict(shards)
        self._lock = threading.Lock()
        self._asked: dict[int, str] | None = None
        self._next_probe = 0.0
        self._pending: list[tuple[StreamId, int, int, int]] = []
        self._here: set[StreamId] | None = None  # streams acknowledged at this home; None: it is the first
        self._closed = False
        self.home = self._proper()
        self._writer = connect(self._shards[self.home])
        self.lost_rows = 0

    def append(self, chunks: list[Chunk], timeout: float) -> Ack:
        """As GrpcReplayWriter.append; the Ack leaves out rows that were lost with their home."""
        names = [_name(chunk) for chunk in chunks]
        if names != self._pending:
            self._pending = []
            self._settle()
        here = self._here
        if here is not None:
            chunks = [chunk if chunk.stream in here else replace(chunk, continues=True) for chunk in chunks]
        try:
            ack = self._writer.append(chunks, timeout)
        except DeadlineError as error:
            self._pending = names
            if self._closed or self._clock() - self._writer.heard < self._patience:
                raise
            refuge = self._refuge()
            if refuge is None:
                raise
            self._move(refuge, str(error))
            self._lose(sum(map(len, chunks)))
            return Ack(committed=0, duplicates=0)
        self._pending = []
        if here is not None:
            here |= {chunk.stream for chunk in chunks}
        return ack

    def set_shards(self, shards: Mapping[int, str]) -> None:
        """These shards are there from now on; the actor moves before its next append. For any thread."""
        with self._lock:
            self._asked = dict(shards)

    def close(self) -> None:
        """Close the writer to the present home."""
        self._closed = True
        self._writer.close()

    def _proper(self) -> int:
        """The home that the even assignment gives this actor."""
        return assign(self._actors, self._shards)[self._actor]

    def _settle(self) -> None:
        """Between appends: follow a change of shards, and go to the proper home when it is there."""
        with self._lock:
            asked, self._asked = self._asked, None
        if asked:
            address = self._shards[self.home]
            self._shards = asked
            self._next_probe = 0.0
            if self.home in asked and asked[self.home] != address:
                self._reconnect()
        proper = self._proper()
        now = self._clock()
        if proper == self.home or now < self._next_probe:
            return
        self._next_probe = now + self._probe_seconds
        if self._answers(self._shards[proper]):
            self._move(proper, "it is the actor's own")
        elif self.home not in self._shards:
            refuge = self._refuge()
            if refuge is not None:
                self._move(refuge, "the former home left")

    def _refuge(self) -> int | None:
        """The preferred one of the other shards that answer."""
        others = [shard for shard in ranked(self._actor, self._shards) if shard != self.home]
        return next((shard for shard in others if self._answers(self._shards[shard])), None)

    def _move(self, shard: int, why: str) -> None:
        log.warning(
            "actor moves to another replay shard",
            extra={"actor": self._actor, "from_shard": self.home, "to_shard": shard, "why": why},
        )
        self.home = shard
        self._next_probe = self._clock() + self._probe_seconds
        self._pending = []
        self._here = set()
        self._reconnect()
        if self._metrics is not None:
            self._metrics["actor_home_moves_total"].inc()

    def _reconnect(self) -> None:
        self._writer.close()
        self._writer = self._connect(self._shards[self.home])

    def _lose(self, rows: int) -> None:
        self.lost_rows += rows
        log.warning("rows lost with their shard", extra={"actor": self._actor, "rows": rows})
        if self._metrics is not None:
            self._metrics.labels("actor_rows_lost_total", reason="home").inc(rows)


def _name(chunk: Chunk) -> tuple[StreamId, int, int, int]:
    """What tells a chunk from all others: stream, episode and step of its first row, length."""
    return chunk.stream, int(chunk.columns["episode"][0]), int(chunk.columns["step"][0]), len(chunk)
