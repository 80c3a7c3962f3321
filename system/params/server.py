"""The parameter server: immutable policy versions, streamed to whoever pulls, published by the learner alone.

Stateless on purpose: after a restart it holds nothing until the learner publishes again. A version is
encoded once, when it arrives, and every fetch streams those same bytes, so no reader can see a mix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import grpc

from system.errors import RejectedError
from system.metrics import Metrics
from system.params.frames import DEFAULT_LIMIT_BYTES, check_content, from_frames, to_frames
from system.params.memory import Versions
from system.params.weights_pb2 import (
    DESCRIPTOR,
    FetchRequest,
    Frame,
    NewestRequest,
    Version,
    VersionInfo,
)
from system.weights import PolicyVersion, Weights
from system.wire import OPEN, Security, abort_call, bind_server, require_deadline, role_of

log = logging.getLogger(__name__)

LONGEST_SECONDS = 600.0
"""No stream may hold a worker thread longer; gRPC ends it at the deadline its caller had to give."""
PUBLISHER_ROLE = "learner"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """One version as it goes over the wire. Made by a publish, read by every fetch of it."""

    digest: str
    frames: tuple[bytes, ...]  # serialised Frame messages


class ParameterServer:
    """Serves weights on host:port until stop(). Port 0 picks one; see `port`.

    Also a WeightSink for a learner, or a relay, in the same process.
    Raises: ConfigError for a non-loopback address without TLS and tokens, PreflightError when the
    port is taken.
    """

    def __init__(
        self,
        address: str,
        *,
        security: Security = OPEN,
        keep: int = 2,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        workers: int = 16,
        metrics: Metrics | None = None,
    ) -> None:
        self._versions: Versions[_Encoded] = Versions(keep)
        self._limit_bytes = limit_bytes
        self._metrics = metrics if metrics is not None else Metrics("", "params")
        self._server, self.port = bind_server(
            self._register, address, security, workers=workers, on_denied=lambda: self._count_refusal("token")
        )
        self.address = f"{address.rsplit(':', 1)[0]}:{self.port}"
        log.info("parameter server listens", extra={"address": self.address})

    def publish(self, weights: Weights) -> None:
        """Take a newer version from this process.

        Raises: RejectedError (version, digest, nonfinite, header).
        """
        check_content(weights)
        self._commit(weights, tuple(frame.SerializeToString() for frame in to_frames(weights)))

    def newest(self, timeout: float = 0.0) -> PolicyVersion:
        return self._versions.newest()[0]

    def stop(self, grace: float = 0.5) -> None:
        """Stop listening; streams under way get `grace` seconds."""
        self._server.stop(grace).wait(grace + 5.0)

    def _register(self, server: grpc.Server) -> None:
        # Not the generated add_..._to_server: Fetch answers are serialised once per version, not per call.
        service = DESCRIPTOR.services_by_name["WeightStore"].full_name
        handlers = {
            "Newest": grpc.unary_unary_rpc_method_handler(
                self._newest, NewestRequest.FromString, VersionInfo.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(self._fetch, FetchRequest.FromString),
            "Publish": grpc.stream_unary_rpc_method_handler(
                self._publish, Frame.FromString, VersionInfo.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def _newest(self, _request: NewestRequest, _context: grpc.ServicerContext) -> VersionInfo:
        version, held = self._versions.newest()
        return _info(version, held.digest if held else "")

    def _fetch(self, request: FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        begun = time.monotonic()
        try:
            require_deadline(context, LONGEST_SECONDS)
            held = self._wanted(request)
        except RejectedError as error:
            self._refuse(context, error)
        if held is None:
            self._metrics.labels("params_fetches_total", outcome="unchanged").inc()
            return
        outcome = "cut"
        try:
            for frame in held.frames:
                yield frame
                self._metrics["params_bytes_sent_total"].inc(len(frame))
            outcome = "sent"
        finally:
            self._metrics.labels("params_fetches_total", outcome=outcome).inc()
            self._metrics["params_fetch_seconds"].observe(time.monotonic() - begun)

    def _wanted(self, request: FetchRequest) -> _Encoded | None:
        if request.WhichOneof("want") == "exactly":
            return self._versions.exactly(_version(request.exactly))
        version, held = self._versions.newest()
        return held if version > _version(request.newer_than) else None

    def _publish(self, frames: Iterator[Frame], context: grpc.ServicerContext) -> VersionInfo:
        try:
            require_deadline(context, LONGEST_SECONDS)
            if role_of(context) != PUBLISHER_ROLE:
                raise RejectedError(
                    "role",
                    f"role {role_of(context)!r:.70} may not publish; only {PUBLISHER_ROLE!r} may",
                )
            encoded: list[bytes] = []
            weights = from_frames(
                _recorded(frames, encoded), limit_bytes=self._limit_bytes, newer_than=self.newest()
            )
            if weights is None:
                raise RejectedError("truncated", "stream ended before its header; send it again")
            self._commit(weights, tuple(encoded))
        except RejectedError as error:
            self._refuse(context, error)
        return _info(weights.version, weights.digest)

    def _commit(self, weights: Weights, frames: tuple[bytes, ...]) -> None:
        self._versions.commit(weights.version, _Encoded(digest=weights.digest, frames=frames))
        self._metrics["params_publishes_total"].inc()
        self._metrics["params_version"].set(weights.version.counter)
        log.info("weights taken", extra={"version": tuple(weights.version), "bytes": weights.nbytes})

    def _refuse(self, context: grpc.ServicerContext, error: RejectedError) -> NoReturn:
        self._count_refusal(error.reason)
        log.warning("call refused", extra={"reason": error.reason, "peer": context.peer(), "why": str(error)})
        abort_call(context, error)

    def _count_refusal(self, reason: str) -> None:
        self._metrics.labels("params_refused_total", reason=reason).inc()


def _recorded(frames: Iterator[Frame], into: list[bytes]) -> Iterator[Frame]:
    for frame in frames:
        into.append(frame.SerializeToString())
        yield frame


def _version(message: Version) -> PolicyVersion:
    return PolicyVersion(message.epoch, message.counter)


def _info(version: PolicyVersion, digest: str) -> VersionInfo:
    return VersionInfo(version=Version(epoch=version.epoch, counter=version.counter), digest=digest)
