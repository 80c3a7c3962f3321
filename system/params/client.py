"""Both ends' clients of the parameter server: actors pull with GrpcWeightSource, the learner publishes
with GrpcWeightSink.

Every call ends within its timeout: a server that is away is tried again until then. What arrives is
checked against its digest before anyone sees it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from system.errors import DeadlineError, IntegrityError, RejectedError
from system.params.frames import DEFAULT_LIMIT_BYTES, from_frames, to_frames
from system.params.weights_pb2 import FetchRequest, NewestRequest, Version, VersionInfo
from system.params.weights_pb2_grpc import WeightStoreStub
from system.weights import NO_VERSION, PolicyVersion, Weights
from system.wire import OPEN, RETRIABLE, Security, call_metadata, error_of, open_channel

Answer = TypeVar("Answer")

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


class _Client:
    """A channel to one parameter server, and the loop that outlives its restarts."""

    def __init__(self, address: str, role: str, security: Security) -> None:
        self._peer = f"parameter server {address}"
        self._channel = open_channel(address, security)
        self._metadata = call_metadata(role, security)
        self._stub = WeightStoreStub(self._channel)
        self._closed = threading.Event()

    def newest(self, timeout: float) -> PolicyVersion:
        """The newest version the server holds, without its bytes. Raises: DeadlineError, RejectedError."""
        return self._until(
            timeout,
            lambda left, _attempt: _version(
                self._stub.Newest(NewestRequest(), timeout=left, metadata=self._metadata)
            ),
        )

    def _until(self, timeout: float, call: Callable[[float, int], Answer]) -> Answer:
        """Run call(seconds left, attempt), again while the server is away or busy, for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        pause, attempt = FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                return call(max(deadline - time.monotonic(), 0.001), attempt)
            except grpc.RpcError as error:
                left = deadline - time.monotonic()
                if error.code() not in RETRIABLE or left <= pause:  # type: ignore[attr-defined]
                    raise error_of(error, self._peer) from error
            if self._closed.wait(pause):
                raise DeadlineError(f"{self._peer}: this client was closed while waiting; make a new one")
            pause, attempt = min(2 * pause, LONGEST_PAUSE_SECONDS), attempt + 1

    def close(self) -> None:
        self._closed.set()
        self._channel.close()


class GrpcWeightSource(_Client):
    """WeightSource over gRPC, for any role."""

    def __init__(
        self,
        address: str,
        *,
        role: str = "actor",
        security: Security = OPEN,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        super().__init__(address, role, security)
        self._limit_bytes = limit_bytes

    def latest(self, newer_than: PolicyVersion, timeout: float) -> Weights | None:
        """The newest weights, or None when `newer_than` is still the newest.

        Raises: DeadlineError when the server did not answer in `timeout` seconds, IntegrityError when
        what it sent is not what its header says, RejectedError when it refused.
        """
        request = FetchRequest(newer_than=_message(newer_than))
        return self._until(timeout, lambda left, _attempt: self._pull(request, newer_than, left))

    def exactly(self, version: PolicyVersion, timeout: float) -> Weights:
        """One version by name. Raises: as latest, and RejectedError (unknown) for a version not held."""
        request = FetchRequest(exactly=_message(version))
        weights = self._until(timeout, lambda left, _attempt: self._pull(request, NO_VERSION, left))
        if weights is None or weights.version != version:
            raise IntegrityError(
                f"{self._peer} answered {version} with another version; check who listens there"
            )
        return weights

    def _pull(self, request: FetchRequest, newer_than: PolicyVersion, timeout: float) -> Weights | None:
        stream = self._stub.Fetch(request, timeout=timeout, metadata=self._metadata)
        try:
            return from_frames(stream, limit_bytes=self._limit_bytes, newer_than=newer_than)
        except RejectedError as error:
            raise IntegrityError(f"{self._peer} sent weights that cannot be used: {error}") from error
        finally:
            stream.cancel()


class GrpcWeightSink(_Client):
    """WeightSink over gRPC, for the learner. `timeout` bounds each publish in seconds."""

    def __init__(
        self, address: str, *, role: str = "learner", security: Security = OPEN, timeout: float = 30.0
    ) -> None:
        super().__init__(address, role, security)
        self._timeout = timeout

    def publish(self, weights: Weights) -> None:
        """Send a newer version.

        Raises: RejectedError when the server refused it, DeadlineError when it was away for `timeout`.
        """
        self._until(self._timeout, lambda left, attempt: self._push(weights, left, attempt))

    def _push(self, weights: Weights, timeout: float, attempt: int) -> None:
        try:
            self._stub.Publish(to_frames(weights), timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            refusal = error_of(error, self._peer)
            stale = isinstance(refusal, RejectedError) and refusal.reason == "version"
            if not (attempt > 0 and stale and self._holds(weights, timeout)):
                raise

    def _holds(self, weights: Weights, timeout: float) -> bool:
        """True when an earlier try arrived and only its answer was lost."""
        info = self._stub.Newest(NewestRequest(), timeout=timeout, metadata=self._metadata)
        return _version(info) == weights.version and info.digest == weights.digest


def _version(info: VersionInfo) -> PolicyVersion:
    return PolicyVersion(info.version.epoch, info.version.counter)


def _message(version: PolicyVersion) -> Version:
    return Version(epoch=version.epoch, counter=version.counter)
