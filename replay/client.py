"""Both ends' clients of a replay shard: actors append with GrpcReplayWriter, the learner's side grants with
GrpcShardControl.

An append that fails half-way is repeated whole; the shard drops what it already has.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc

from replay.experience_pb2 import AppendReply, GrantRequest, StatsRequest
from replay.experience_pb2_grpc import ReplayServiceStub
from replay.messages import HEARD, RowCodec
from replay.shard import ShardStats
from system.errors import DeadlineError, DreamfleetError
from system.experience import Ack, Chunk
from system.specs import TableSpec
from system.wire import OPEN, REASON_TRAILER, RETRIABLE, Security, call_metadata, error_of, open_channel

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
GRACE_SECONDS = 0.2
"""How much later than its rows' patience a call ends: the shard then says why it held them."""
CONTROL_SECONDS = 1.0
APPEND = "/dreamfleet.replay.v1.ReplayService/Append"


class GrpcReplayWriter:
    """ReplayWriter over gRPC to one shard. Not for several threads at once."""

    def __init__(
        self, address: str, table: TableSpec, *, role: str = "actor", security: Security = OPEN
    ) -> None:
        self._peer = f"replay shard {address}"
        self._codec = RowCodec(table)
        self._channel = open_channel(address, security)
        self._metadata = call_metadata(role, security)
        # Messages are encoded already. A stream of one message may be sent as a plain call, which costs half.
        self._send_one = self._channel.unary_unary(APPEND, None, AppendReply.FromString)
        self._send_many = self._channel.stream_unary(APPEND, None, AppendReply.FromString)
        self._closed = threading.Event()
        self.heard = time.monotonic()
        """When the shard was last heard of; when this was made, before its first word."""

    def append(self, chunks: list[Chunk], timeout: float) -> Ack:
        """Send rows and wait until they are stored, over restarts of the shard, for `timeout` seconds.

        Raises: SchemaError, RejectedError; DeadlineError after which the same rows may be sent again.
        """
        for chunk in chunks:
            self._codec.check_columns(chunk)
        if not chunks:
            return Ack(committed=0, duplicates=0)
        one_message = self._codec.fits_one(chunks)
        deadline = time.monotonic() + timeout
        pause = FIRST_PAUSE_SECONDS
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            try:
                messages, wait = self._codec.encode(chunks), left + GRACE_SECONDS
                if one_message:
                    reply = self._send_one(next(messages), timeout=wait, metadata=self._metadata)
                else:
                    reply = self._send_many(messages, timeout=wait, metadata=self._metadata)
            except grpc.RpcError as error:
                if _from_peer(error):
                    self.heard = time.monotonic()
                if error.code() not in RETRIABLE or deadline - time.monotonic() <= pause:  # type: ignore[attr-defined]
                    raise error_of(error, self._peer) from error
            else:
                self.heard = time.monotonic()
                return Ack(committed=reply.committed, duplicates=reply.duplicates)
            if self._closed.wait(pause):
                raise DeadlineError(f"{self._peer}: this writer was closed while waiting; make a new one")
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        self._closed.set()
        self._channel.close()


def _from_peer(error: Any) -> bool:
    """Whether a failed call was answered by the shard, not given up on this side of the wire."""
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return True
    return bool({HEARD, REASON_TRAILER} & {str(key) for key, _ in error.trailing_metadata() or ()})


class GrpcShardControl:
    """Grants and statistics of one shard from afar. `grant` does not wait for the answer.

    A credits.DistantGrantTaker: it knows what the shard may be acting on.
    """

    def __init__(self, address: str, *, role: str = "learner", security: Security = OPEN) -> None:
        self._peer = f"replay shard {address}"
        self._channel = open_channel(address, security)
        self._metadata = call_metadata(role, security)
        self._stub = ReplayServiceStub(self._channel)
        self._lock = threading.Lock()
        self._busy = self._closed = False
        self._next: int | None = None  # newest grant behind the one on its way
        self._failure: DreamfleetError | None = None
        self._ceiling = 0
        self._settled = True

    def grant(self, max_inserted: int) -> None:
        """Send a grant; when one is still on its way, the newest follows it.

        Raises: DeadlineError, RejectedError, InfrastructureError when an earlier one failed.
        """
        with self._lock:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            self._ceiling = max(self._ceiling, max_inserted)
            self._settled = False
            if self._busy:
                self._next = max_inserted
                return
            self._busy = True
        self._start(max_inserted)

    @property
    def ceiling(self) -> int:
        """The largest grant the shard may be acting on now."""
        return self._ceiling

    @property
    def settled(self) -> bool:
        """The newest grant was acknowledged."""
        return self._settled

    def stats(self) -> ShardStats:
        """Raises: DeadlineError, RejectedError, InfrastructureError within CONTROL_SECONDS."""
        try:
            reply = self._stub.Stats(StatsRequest(), timeout=CONTROL_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._peer) from error
        values: dict[str, Any] = {name: getattr(reply, name) for name in reply.DESCRIPTOR.fields_by_name}
        values["incarnations"] = dict(reply.incarnations)
        return ShardStats(**values)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._next = None
        self._channel.close()

    def _start(self, max_inserted: int) -> None:
        request = GrantRequest(max_inserted=max_inserted)
        call = self._stub.Grant.future(request, timeout=CONTROL_SECONDS, metadata=self._metadata)
        call.add_done_callback(lambda done: self._done(done, max_inserted))

    def _done(self, call: Any, granted: int) -> None:
        """Runs on a gRPC thread when a grant was answered or failed."""
        with self._lock:
            if call.code() != grpc.StatusCode.OK:
                self._failure = None if self._closed else error_of(call, self._peer)
                self._next = None
            following, self._next = self._next, None
            if call.code() == grpc.StatusCode.OK:
                self._ceiling = granted if following is None else max(granted, following)
                self._settled = following is None
            self._busy = following is not None and not self._closed
            if not self._busy or following is None:
                return
        self._start(following)
