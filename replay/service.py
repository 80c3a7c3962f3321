"""A replay shard on the wire: the gRPC service of `experience.proto` around a plain ReplayShard.

A waiting append holds a worker thread, so only some of the workers take appends: grants, which end
the waiting, always find a free one. What arrives is judged by the shard; here only its bytes are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
import numpy as np
from numpy.typing import NDArray

from replay.admission import all_sound
from replay.experience_pb2 import (
    AppendReply,
    AppendRequest,
    BoundsReply,
    BoundsRequest,
    FlagsReply,
    FlagsRequest,
    GrantReply,
    GrantRequest,
    ReadReply,
    ReadRequest,
    StatsReply,
    StatsRequest,
    WriteBackReply,
    WriteBackRequest,
)
from replay.experience_pb2_grpc import ReplayServiceServicer, add_ReplayServiceServicer_to_server
from replay.messages import HEARD, RowCodec, rows_claimed
from replay.served import ServedRows, Span
from replay.shard import ReplayShard
from system.errors import DeadlineError, PreflightError, RejectedError
from system.wire import OPEN, Security, abort_call, bind_server, require_deadline, role_of

log = logging.getLogger(__name__)

APPEND_ROLES = frozenset(("actor",))
CONTROL_ROLES = frozenset(("learner", "driver"))
LEARNER_ROLES = frozenset(("learner",))
LONGEST_SECONDS = 600.0
READ_SLOTS = 16
"""Threads beside the others for learners on other nodes, so that neither side keeps grants waiting."""
PAGE_FRAGMENTS = 32768
MARGIN_SECONDS = 0.2
"""An append gives up this long before its caller does, so that the caller learns why."""


class ReplayServicer(ReplayServiceServicer):
    """Answers calls for one shard; `append_slots` appends at a time, the rest are told to come again."""

    def __init__(self, shard: ReplayShard, append_slots: int) -> None:
        self._shard = shard
        self._codec = RowCodec(shard.table)
        self._served = ServedRows(shard.directory, shard.index, self._codec)
        self._reads = threading.BoundedSemaphore(READ_SLOTS)
        self._slots = threading.BoundedSemaphore(append_slots)

    def Append(self, request_iterator: Iterator[AppendRequest], context: grpc.ServicerContext) -> AppendReply:
        try:
            require_deadline(context, LONGEST_SECONDS)
            self._require(context, APPEND_ROLES, "append rows")
        except RejectedError as error:
            self._refuse(context, error)
        if not self._slots.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all append slots are taken; try again shortly")
        try:
            return self._append(request_iterator, context)
        except RejectedError as error:
            self._refuse(context, error)
        except DeadlineError as error:
            context.set_trailing_metadata(((HEARD, "1"),))
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error)[:2000])
        except PreflightError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)[:2000])
        finally:
            self._slots.release()
        raise AssertionError("abort returns by raising")

    def Grant(self, request: GrantRequest, context: grpc.ServicerContext) -> GrantReply:
        try:
            self._require(context, CONTROL_ROLES, "grant credit")
        except RejectedError as error:
            self._refuse(context, error)
        self._shard.grant(request.max_inserted)
        return GrantReply()

    def Stats(self, request: StatsRequest, context: grpc.ServicerContext) -> StatsReply:
        try:
            self._require(context, CONTROL_ROLES, "read statistics")
        except RejectedError as error:
            self._refuse(context, error)
        stats = self._shard.stats()
        values: dict[str, Any] = {name: getattr(stats, name) for name in StatsReply.DESCRIPTOR.fields_by_name}
        return StatsReply(**values)

    def Bounds(self, request: BoundsRequest, context: grpc.ServicerContext) -> Iterator[BoundsReply]:
        try:
            self._require(context, CONTROL_ROLES, "read bounds")
            self._require_same(request.shard, request.schema)
        except RejectedError as error:
            self._refuse(context, error)
        stats, (capacity, segment) = self._shard.stats(), self._served.capacity()
        version, fragments = self._served.fragments(request.life, request.version)
        pages = [b""] if fragments is None else _pages(fragments)
        for page in pages:
            yield BoundsReply(
                life=self._served.life,
                version=version,
                unchanged=fragments is None,
                fragments=page,
                inserted=stats.inserted,
                waiting=stats.waiting,
                capacity_rows=capacity,
                segment_rows=segment,
            )

    def Read(self, request: ReadRequest, context: grpc.ServicerContext) -> ReadReply:
        try:
            self._require(context, CONTROL_ROLES, "read rows")
            self._require_life(request.life)
            spans = _spans(request)
        except RejectedError as error:
            self._refuse(context, error)
        if not self._reads.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all read slots are taken; try again shortly")
        try:
            rows, payload = self._served.read(spans)
        except RejectedError as error:
            self._refuse(context, error)
        finally:
            self._reads.release()
        return ReadReply(rows=rows, payload=payload)

    def Flags(self, request: FlagsRequest, context: grpc.ServicerContext) -> FlagsReply:
        try:
            self._require(context, CONTROL_ROLES, "read flags")
            self._require_life(request.life)
            span = Span(request.origin, request.stream, request.start, request.count)
            flags = self._served.first_flags(span)
        except RejectedError as error:
            self._refuse(context, error)
        if flags is None:
            return FlagsReply(found=False)
        return FlagsReply(found=True, is_first=np.packbits(flags).tobytes())

    def WriteBack(self, request: WriteBackRequest, context: grpc.ServicerContext) -> WriteBackReply:
        try:
            self._require(context, LEARNER_ROLES, "write overlay columns")
            self._require_life(request.life)
            written = sum(
                self._served.write(p.origin, p.stream, p.start, p.column, p.data) for p in request.patches
            )
        except RejectedError as error:
            self._refuse(context, error)
        return WriteBackReply(written=written)

    def close(self) -> None:
        """Let go of the shard's files."""
        self._served.close()

    def _append(self, requests: Iterator[AppendRequest], context: grpc.ServicerContext) -> AppendReply:
        deadline = time.monotonic() + (context.time_remaining() or 0.0) - MARGIN_SECONDS
        committed = duplicates = 0
        for request in requests:
            try:
                batch = self._codec.decode(request)
            except RejectedError as error:
                self._shard.count_rejected(rows_claimed(request), error)
                raise
            sound = all_sound(self._codec.table, batch.chunks, batch.columns, batch.ends)
            ack = self._shard.append(batch.chunks, deadline - time.monotonic(), sound=sound)
            committed += ack.committed
            duplicates += ack.duplicates
        return AppendReply(committed=committed, duplicates=duplicates)

    def _require_same(self, shard: int, schema: str) -> None:
        if schema != self._codec.digest:
            raise RejectedError(
                "schema", f"reader's schema is {schema[:12]!r}, the replay's {self._codec.digest[:12]!r}"
            )
        if shard != self._shard.index:
            raise RejectedError(
                "shard", f"this is shard {self._shard.index}, not {shard}; look up its address"
            )

    def _require_life(self, life: int) -> None:
        if life != self._served.life:
            raise RejectedError("life", "the shard restarted; ask for its bounds again")

    def _require(self, context: grpc.ServicerContext, allowed: frozenset[str], what: str) -> None:
        role = role_of(context)
        if role not in allowed:
            raise RejectedError("role", f"role {role!r:.70} may not {what}; only {sorted(allowed)} may")

    def _refuse(self, context: grpc.ServicerContext, error: RejectedError) -> NoReturn:
        log.warning("call refused", extra={"reason": error.reason, "peer": context.peer()})
        abort_call(context, error)


def _pages(fragments: NDArray[np.int64]) -> list[bytes]:
    """Fragments [F, 4] as pieces that fit a message; one at least."""
    count = max(1, -(-len(fragments) // PAGE_FRAGMENTS))
    return [part.astype("<i8").tobytes() for part in np.array_split(fragments, count)]


def _spans(request: ReadRequest) -> list[Span]:
    """Raises: RejectedError (shape) when the lists are not of one length or a count is 0."""
    lists = (request.origin, request.stream, request.start, request.count)
    if len({len(values) for values in lists}) != 1 or 0 in request.count:
        raise RejectedError(
            "shape",
            f"lists of {[len(v) for v in lists]} entries must be of one length, counts >= 1; mend them",
        )
    return [Span(*values) for values in zip(*lists, strict=True)]


class ShardServer:
    """A shard being served. Stopping it leaves the shard open: its owner closes it."""

    def __init__(
        self, shard: ReplayShard, address: str, *, security: Security = OPEN, workers: int = 32
    ) -> None:
        """Listen on host:port (port 0 picks one). Raises: ConfigError, PreflightError (port taken)."""
        self._servicer = servicer = ReplayServicer(shard, append_slots=max(1, workers - 4))
        self._server, self.port = bind_server(
            lambda server: add_ReplayServiceServicer_to_server(servicer, server),
            address,
            security,
            workers=workers + READ_SLOTS,
        )
        self.address = f"{address.rsplit(':', 1)[0]}:{self.port}"
        log.info("replay shard listens", extra={"shard": shard.index, "address": self.address})

    def stop(self, grace: float = 0.5) -> None:
        """Stop listening; calls under way get `grace` seconds."""
        self._server.stop(grace).wait(grace + 5.0)
        self._servicer.close()


def serve_shard(shard: ReplayShard, address: str, *, security: Security = OPEN) -> ShardServer:
    """Serve `shard` on host:port until `ShardServer.stop`."""
    return ShardServer(shard, address, security=security)
