"""How our gRPC services listen and how their clients dial: one door for credentials and limits.

Loopback may be plaintext. Any other address needs mutual TLS and a bearer token per role, and
refuses to start without them. Used by `system.params` and `replay.service`.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from system.errors import (
    ConfigError,
    DeadlineError,
    DreamfleetError,
    InfrastructureError,
    PreflightError,
    RejectedError,
)

FRAME_BYTES = 1 << 20
"""Payload of one streamed frame: 1 MiB moved weights fastest of 256 KiB .. 16 MiB."""
MAX_MESSAGE_BYTES = 32 << 20
"""Largest single message either side accepts; anything longer must be streamed in frames."""
ROLE_HEADER = "x-dreamfleet-role"
REASON_TRAILER = "x-dreamfleet-reason"
RETRIABLE = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED))
"""A peer that restarts, or sheds load: the same call may succeed later."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Credentials of one process. `tokens` maps role (learner, actor, driver) to bearer token.

    A server holds all tokens, a client only its own. The three paths are PEM files for mutual TLS.
    """

    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    certificate: Path | None = None
    private_key: Path | None = None
    authority: Path | None = None

    @property
    def tls(self) -> bool:
        return self.authority is not None

    def __post_init__(self) -> None:
        given = [path is not None for path in (self.certificate, self.private_key, self.authority)]
        if any(given) and not all(given):
            raise ConfigError(
                "mutual TLS needs security.certificate, private_key and authority together; "
                f"{given.count(False)} of them are not set; set all three or none"
            )

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, private key and authority. Raises: ConfigError naming a file that cannot be read."""
        parts: list[bytes] = []
        for path in (self.certificate, self.private_key, self.authority):
            assert path is not None, "pem() is only asked for when tls is on"
            try:
                parts.append(path.read_bytes())
            except OSError as error:
                raise ConfigError(
                    f"TLS file {path} must be readable ({error.strerror}); mend security.certificate, "
                    "private_key or authority"
                ) from error
        return parts[0], parts[1], parts[2]


OPEN = Security()


def is_loopback(address: str) -> bool:
    """True for host:port addresses that no other machine can reach."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost" or address.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _RoleGuard(grpc.ServerInterceptor):
    """Refuses calls without the role's token; leaves the role readable to servicers."""

    def __init__(self, tokens: Mapping[str, str], on_denied: Callable[[], None]) -> None:
        self._tokens = dict(tokens)

        def deny(_request: Any, context: grpc.ServicerContext) -> Any:
            on_denied()
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong bearer token for this role")

        self._deny = grpc.unary_unary_rpc_method_handler(deny)

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        metadata = dict(handler_call_details.invocation_metadata or ())
        expected = self._tokens.get(str(metadata.get(ROLE_HEADER, "")), "")
        offered = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if not expected or not hmac.compare_digest(expected.encode(), offered.encode()):
            return self._deny
        return continuation(handler_call_details)


def role_of(context: grpc.ServicerContext) -> str:
    """The role a call claims; trustworthy when the server was given tokens."""
    return str(dict(context.invocation_metadata() or ()).get(ROLE_HEADER, ""))


def bind_server(
    register: Callable[[grpc.Server], None],
    address: str,
    security: Security = OPEN,
    *,
    workers: int = 16,
    on_denied: Callable[[], None] = lambda: None,
) -> tuple[grpc.Server, int]:
    """Start a server on host:port (port 0 picks one) and return it with its port.

    `on_denied` is called for every call that did not prove its role; use it to count them.

    Raises: ConfigError for a non-loopback address without TLS and tokens;
    PreflightError when the port is taken.
    """
    if not is_loopback(address) and not (security.tls and security.tokens):
        raise ConfigError(
            f"address {address!r} is reachable from other machines, so mutual TLS and role tokens must be "
            "configured (security.certificate, private_key, authority, tokens); set them or bind 127.0.0.1"
        )
    interceptors: list[grpc.ServerInterceptor] = (
        [_RoleGuard(security.tokens, on_denied)] if security.tokens else []
    )
    server = grpc.server(
        ThreadPoolExecutor(max_workers=workers, thread_name_prefix="grpc"),
        interceptors=interceptors,
        options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=4 * workers,
    )
    register(server)
    try:
        if security.tls:
            certificate, key, authority = security.pem()
            credentials = grpc.ssl_server_credentials(
                [(key, certificate)], root_certificates=authority, require_client_auth=True
            )
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        port = 0
        cause: Exception | None = error
    else:
        cause = None
    if port == 0:
        raise PreflightError(
            f"cannot listen on {address!r}: the port must be free; choose another port or 0 for any"
        ) from cause
    server.start()
    return server, port


def open_channel(address: str, security: Security = OPEN) -> grpc.Channel:
    """A channel to host:port; connects lazily, reconnects within a second."""
    if security.tls:
        certificate, key, authority = security.pem()
        credentials = grpc.ssl_channel_credentials(
            root_certificates=authority, private_key=key, certificate_chain=certificate
        )
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def call_metadata(role: str, security: Security = OPEN) -> tuple[tuple[str, str], ...]:
    """Metadata every call carries: who calls, and the token that proves it."""
    token = security.tokens.get(role)
    return ((ROLE_HEADER, role), *((("authorization", f"Bearer {token}"),) if token else ()))


def require_deadline(context: grpc.ServicerContext, longest: float) -> None:
    """Refuse a streaming call that could hold a worker thread for more than `longest` seconds."""
    remaining = context.time_remaining()
    if remaining is None or remaining > longest:
        abort_call(
            context,
            RejectedError("deadline", f"every stream must carry a deadline <= {longest:g} s; set a timeout"),
        )


def abort_call(context: grpc.ServicerContext, error: RejectedError) -> NoReturn:
    """End a call with `error`, so that `error_of` rebuilds it on the other side."""
    denied = error.reason == "role"
    code = grpc.StatusCode.PERMISSION_DENIED if denied else grpc.StatusCode.FAILED_PRECONDITION
    context.set_trailing_metadata(((REASON_TRAILER, error.reason),))
    context.abort(code, str(error)[:2000])
    raise AssertionError("abort returns by raising")


def error_of(call: grpc.RpcError, peer: str) -> DreamfleetError:
    """The error of ours that a failed call means; `peer` names whom we called, for the message.

    Refusals become RejectedError, missed deadlines and unreachable or busy peers DeadlineError,
    anything else InfrastructureError.
    """
    code, details = call.code(), call.details() or ""  # type: ignore[attr-defined]
    trailers = {str(key): value for key, value in call.trailing_metadata() or ()}  # type: ignore[attr-defined]
    if REASON_TRAILER in trailers:
        return RejectedError(str(trailers[REASON_TRAILER]), f"{peer} refused: {details}")
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return RejectedError("token", f"{peer} refused: {details}; give this process its role's token")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED or code in RETRIABLE:
        return DeadlineError(
            f"{peer} did not answer in time ({code.name}: {details:.300}); "
            "check that it runs, its address, and that both sides use the same TLS setting"
        )
    return InfrastructureError(f"{peer} failed with {code.name}: {details:.500}; see its log for the cause")
