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
from typing import Any

import grpc

from system.errors import ConfigError, PreflightError

FRAME_BYTES = 1 << 20
"""Payload of one streamed frame: 1 MiB moved weights fastest of 256 KiB .. 16 MiB."""
MAX_MESSAGE_BYTES = 32 << 20
"""Largest single message either side accepts; anything longer must be streamed in frames."""
ROLE_HEADER = "x-dreamfleet-role"

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
    """Credentials of one process. `tokens` maps role (learner, actor, driver) to bearer token;
    a server holds them all, a client only its own. The three paths are PEM files for mutual TLS."""

    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    certificate: Path | None = None
    private_key: Path | None = None
    authority: Path | None = None

    @property
    def tls(self) -> bool:
        return all((self.certificate, self.private_key, self.authority))


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

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)

        def deny(_request: Any, context: grpc.ServicerContext) -> Any:
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
) -> tuple[grpc.Server, int]:
    """Start a server on host:port (port 0 picks one) and return it with its port.

    Raises: ConfigError for a non-loopback address without TLS and tokens;
    PreflightError when the port is taken.
    """
    if not is_loopback(address) and not (security.tls and security.tokens):
        raise ConfigError(
            f"address {address!r} is reachable from other machines, so mutual TLS and role tokens must be "
            "configured (security.certificate, private_key, authority, tokens); set them or bind 127.0.0.1"
        )
    interceptors = [_RoleGuard(security.tokens)] if security.tokens else []
    server = grpc.server(
        ThreadPoolExecutor(max_workers=workers, thread_name_prefix="grpc"),
        interceptors=interceptors,
        options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=4 * workers,
    )
    register(server)
    try:
        if security.tls:
            assert security.certificate and security.private_key and security.authority
            credentials = grpc.ssl_server_credentials(
                [(security.private_key.read_bytes(), security.certificate.read_bytes())],
                root_certificates=security.authority.read_bytes(),
                require_client_auth=True,
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
        assert security.certificate and security.private_key and security.authority
        credentials = grpc.ssl_channel_credentials(
            root_certificates=security.authority.read_bytes(),
            private_key=security.private_key.read_bytes(),
            certificate_chain=security.certificate.read_bytes(),
        )
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def call_metadata(role: str, security: Security = OPEN) -> tuple[tuple[str, str], ...]:
    """Metadata every call carries: who calls, and the token that proves it."""
    token = security.tokens.get(role)
    return ((ROLE_HEADER, role), *((("authorization", f"Bearer {token}"),) if token else ()))
