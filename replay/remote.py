"""A shard on another node, as a learner's table sees it: what is live there, and its rows through the wire.

RemoteShard is a ShardView beside the mapped ones of `replay.follow`; its homes are RemoteRows. It asks the
shard for its bounds several times a second and fetches rows ahead of need (`replay.fetch`). The other end
is `replay.served`. A shard that does not answer leaves the index at once and comes back by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from replay.back_writer import BackWriter
from replay.experience_pb2 import (
    BoundsReply,
    BoundsRequest,
    FlagsReply,
    FlagsRequest,
    ReadRequest,
    WriteBackRequest,
)
from replay.experience_pb2_grpc import ReplayServiceStub
from replay.fetch import RowFetcher
from replay.index import Run, StartIndex
from replay.messages import RowCodec
from replay.rows import Home, RowsGone, RowViews
from replay.served import MOST_FLAGS
from system.metrics import Metrics
from system.specs import TableSpec
from system.wire import OPEN, Security, call_metadata, error_of, open_channel

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How old what is known of a living shard may be."""
PATIENCE_SECONDS = 2.0
"""Silence after which a shard counts as dead; a refused connection says so at once."""
CALL_SECONDS = 1.0
READ_SECONDS = 10.0
PARALLEL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a shard said of itself. Made by the polling thread, taken by `refresh`."""

    alive: bool = False
    life: int = 0
    version: int = 0
    fragments: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))  # [F, 4]
    inserted: int = 0
    waiting: int = 0
    capacity: tuple[int, int] | None = None


class RemoteRows:
    """The rows of one stream of a remote shard; row r of this home is the stream's position r."""

    __slots__ = ("_shard", "origin", "stream")

    def __init__(self, shard: RemoteShard, origin: int, stream: int) -> None:
        self._shard = shard
        self.origin = origin
        self.stream = stream

    def copy_rows(self, target: RowViews, at: int, first: int, count: int) -> None:
        """As Home; waits for the wire when the rows were not asked for ahead."""
        self._shard.fetcher.take(target, at, self.origin, self.stream, first, count)

    def will_need(self, first: int, count: int) -> None:
        """As Home."""
        self._shard.fetcher.want(self.origin, self.stream, first, count)

    def first_flags(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """As episodes.FlagHome; waits for the wire, where one bit per row travels. Raises: RowsGone."""
        return self._shard.first_flags(self.origin, self.stream, first, count)

    def write_overlay(self, name: str, first: int, values: NDArray[Any]) -> int:
        """As Home; the rows are on their way when this returns, and read here as if they had arrived."""
        return self._shard.write(self.origin, self.stream, first, name, values)


class RemoteShard:
    """ShardView of a shard behind an address. Methods are for one thread, save `set_address`."""

    distant = True

    def __init__(
        self,
        index: int,
        address: str | Callable[[], str],
        table: TableSpec,
        *,
        role: str = "learner",
        security: Security = OPEN,
        poll_seconds: float = POLL_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        read_seconds: float = READ_SECONDS,
        parallel: int = PARALLEL,
        metrics: Metrics | None = None,
    ) -> None:
        """`address` is host:port, empty while unknown, or asked for anew after each failure.

        The shard counts as dead after `patience_seconds` of silence; up to `parallel` reads are on their way.
        """
        self.index = index
        self._codec = RowCodec(table)
        self._find = address if callable(address) else None
        self._address = "" if callable(address) else address
        self._security = security
        self._metadata = call_metadata(role, security)
        self._poll_seconds, self._patience = poll_seconds, patience_seconds
        self._metrics = metrics
        self._lock = threading.Lock()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._link: tuple[str, grpc.Channel, ReplayServiceStub] | None = None
        self._known = self._applied = _Known()
        self._heard = time.monotonic()
        self._homes: dict[tuple[int, int], RemoteRows] = {}
        self._runs: dict[tuple[int, int], list[Run[Home]]] = {}
        self._read_seconds = read_seconds
        self.fetcher = RowFetcher(
            self._codec, self._read, self._call_failed, parallel=parallel, seconds=read_seconds
        )
        self._writer = BackWriter(self.fetcher, self._write, self._call_failed)

    # ---- as a ShardView ---------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """As ShardView."""
        return self._known.alive

    @property
    def inserted(self) -> int:
        """As ShardView; what a dead shard said last."""
        return self._known.inserted

    @property
    def waiting(self) -> int:
        """As ShardView."""
        return self._known.waiting

    @property
    def rows(self) -> int:
        """As ShardView."""
        fragments = self._applied.fragments
        return int((fragments[:, 3] - fragments[:, 2]).sum())

    def capacity(self) -> tuple[int, int] | None:
        """As ShardView."""
        return self._known.capacity

    def refresh(self, index: StartIndex[Home]) -> None:
        """As ShardView; takes up what the polling thread heard, and starts it at the first call."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._poll, name=f"shard-{self.index}", daemon=True)
            self._thread.start()
        known = self._known
        if known is not self._applied:
            self._apply(index, known)
            self._applied = known

    def release(self, index: StartIndex[Home]) -> None:
        """As ShardView; `refresh` takes it up again."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._wake.set()
        thread.join(self._patience + CALL_SECONDS)
        self.fetcher.stop()
        for home in self._homes.values():
            index.drop(home)
        self._homes.clear()
        self._runs.clear()
        with self._lock:
            link, self._link = self._link, None
            self._known = self._applied = replace(self._known, alive=False, fragments=_Known().fragments)
        if link is not None:
            link[1].close()

    def set_address(self, address: str) -> None:
        """The shard is to be found here from now on; for any thread."""
        self._address = address
        self._wake.set()

    def first_flags(self, origin: int, stream: int, start: int, rows: int) -> NDArray[np.bool_] | None:
        """is_first of rows from position `start` on [rows]; None when the shard does not tell.

        Raises: RowsGone.
        """
        parts: list[NDArray[np.bool_]] = []
        for at in range(start, start + rows, MOST_FLAGS):
            count = min(MOST_FLAGS, start + rows - at)
            life = self.fetcher.life
            asked = FlagsRequest(life=life, origin=origin, stream=stream, start=at, count=count)
            call = self._start_call("Flags", asked) if life else None
            if call is None:
                raise RowsGone(f"shard {self.index} is away")
            try:
                reply: FlagsReply = call.result()
            except grpc.FutureCancelledError as error:  # the channel was closed meanwhile
                raise RowsGone(f"shard {self.index} is away") from error
            except grpc.RpcError as error:
                if call.code() == grpc.StatusCode.UNIMPLEMENTED:
                    return None
                self._call_failed(call)
                raise RowsGone(f"shard {self.index} did not answer") from error
            if not reply.found or len(reply.is_first) != -(-count // 8):
                raise RowsGone(f"rows {at}..{at + count - 1} of stream {stream} are gone")
            parts.append(np.unpackbits(np.frombuffer(reply.is_first, np.uint8), count=count).astype(np.bool_))
        return np.concatenate(parts)

    def flush(self, timeout: float) -> bool:
        """Wait until the shard has what was written back; False when it does not within `timeout` seconds."""
        return self._writer.flush(timeout)

    def write(self, origin: int, stream: int, start: int, column: str, values: NDArray[Any]) -> int:
        """Send overlay rows; returns how many will be, 0 while the shard is away or far behind."""
        written = self._writer.add(origin, stream, start, column, values)
        if self._metrics is not None and written < len(values):
            lost = len(values) - written
            self._metrics.labels("learner_write_back_rows_total", outcome="lost").inc(lost)
        return written

    # ---- the index --------------------------------------------------------------------------------

    def _apply(self, index: StartIndex[Home], known: _Known) -> None:
        before, now = self._applied.fragments, known.fragments
        if before is now:
            return
        if before.shape == now.shape and (before[:, :2] == now[:, :2]).all():
            changed = (before[:, 2:] != now[:, 2:]).any(axis=1)  # [F]
        else:
            changed = np.ones(len(now), np.bool_)
            for key in self._runs.keys() - {(origin, stream) for origin, stream in now[:, :2].tolist()}:
                del self._runs[key]
                index.drop(self._homes.pop(key))
        if not len(now):
            return
        new_stream = np.r_[True, (now[1:, :2] != now[:-1, :2]).any(axis=1)]  # [F]
        firsts = np.flatnonzero(new_stream)  # a stream's fragments follow each other
        ends = [*firsts[1:].tolist(), len(now)]
        for which in np.flatnonzero(np.logical_or.reduceat(changed, firsts)).tolist():
            part = now[firsts[which] : ends[which]].tolist()
            self._set_bounds(index, part[0][0], part[0][1], [row[2:] for row in part])

    def _set_bounds(self, index: StartIndex[Home], origin: int, stream: int, bounds: list[list[int]]) -> None:
        """Make the index say that a stream's live rows are `bounds`, pairs (first, end)."""
        key = (origin, stream)
        home = self._homes.get(key)
        if home is None:
            home = self._homes[key] = RemoteRows(self, origin, stream)
        runs = self._runs.setdefault(key, [])
        if len(runs) == len(bounds) and all(r.start <= lo for r, (lo, _) in zip(runs, bounds, strict=True)):
            for run, (lo, hi) in zip(runs, bounds, strict=True):
                index.trim(run, lo)
                index.grow(run, hi)
            return
        index.drop(home)
        runs[:] = [index.add(origin, stream, lo, home, lo, hi - lo) for lo, hi in bounds]

    # ---- asking -----------------------------------------------------------------------------------

    def _poll(self) -> None:
        """The polling thread: keeps `_known` true, at most `patience_seconds` behind."""
        while not self._stop.is_set():
            begun = time.monotonic()
            link = self._dial()
            if link is not None:
                try:
                    self._ask_bounds(link[2])
                except grpc.RpcError as error:
                    self._call_failed(error)
            self._wake.wait(max(0.0, self._poll_seconds - (time.monotonic() - begun)))
            self._wake.clear()

    def _dial(self) -> tuple[str, grpc.Channel, ReplayServiceStub] | None:
        """The channel to the shard's address, a new one when that has changed; None while it is unknown."""
        if self._find is not None and not self._known.alive:
            self._address = self._find()
        address = self._address
        with self._lock:
            old = self._link
            if old is not None and old[0] == address:
                return old
            self._link = None
            if address:
                channel = open_channel(address, self._security)
                self._link = (address, channel, ReplayServiceStub(channel))
            new = self._link
        if old is not None:
            self._lose("it has another address now")
            old[1].close()
        return new

    def _ask_bounds(self, stub: ReplayServiceStub) -> None:
        known = self._known
        request = BoundsRequest(
            schema=self._codec.digest,
            shard=self.index,
            life=known.life if known.alive else 0,
            version=known.version,
        )
        pages: list[BoundsReply] = list(
            stub.Bounds(request, timeout=min(CALL_SECONDS, self._patience), metadata=self._metadata)
        )
        head = pages[0]
        fragments = known.fragments
        if not head.unchanged:
            data = b"".join(page.fragments for page in pages)
            fragments = np.frombuffer(data, "<i8").astype(np.int64, copy=False).reshape(-1, 4)
        if not known.alive or head.life != known.life:
            log.info("replay shard is there", extra={"shard": self.index, "rows": int(head.inserted)})
            self.fetcher.start(head.life)
        with self._lock:
            self._heard = time.monotonic()
            self._known = _Known(
                alive=True,
                life=head.life,
                version=head.version,
                fragments=fragments,
                inserted=head.inserted,
                waiting=head.waiting,
                capacity=(head.capacity_rows, head.segment_rows) if head.capacity_rows else None,
            )

    def _call_failed(self, call: Any) -> None:
        """A call had no answer: the shard is gone when it says so, or after a while of silence."""
        silent = time.monotonic() - self._heard
        slow = call.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        if not slow or silent > self._patience:
            self._lose(str(error_of(call, f"replay shard {self.index} at {self._address}")))

    def _lose(self, why: str) -> None:
        with self._lock:
            if not self._known.alive:
                return
            self._known = replace(self._known, alive=False, waiting=0, fragments=_Known().fragments)
        self.fetcher.stop()
        self._writer.forget()
        log.warning("replay shard lost", extra={"shard": self.index, "why": why})

    def _read(self, request: ReadRequest) -> Any:
        return self._start_call("Read", request)

    def _write(self, request: WriteBackRequest) -> Any:
        return self._start_call("WriteBack", request)

    def _start_call(self, name: str, request: Message) -> Any:
        """A call on its way as a grpc.Future; None when there is nobody to call."""
        with self._lock:
            link = self._link
        if link is None:
            return None
        call = getattr(link[2], name)
        try:
            return call.future(request, timeout=self._read_seconds, metadata=self._metadata)
        except ValueError:  # the channel was closed meanwhile: the shard has another address
            return None
