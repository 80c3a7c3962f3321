"""How learner ranks find each other: rank 0 listens, the others call, both prove that they belong together.

Before `learner.rank_link`, whose connections these become.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from learner.rank_link import RankLink, rank_lost
from system.errors import InfrastructureError, RankLostError

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
HANDSHAKE_BYTES = 4096
RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where one rank stands. Made by whoever launches the ranks, taken by RankHub and RankWorker."""

    rank: int
    ranks: int
    host: str  # of rank 0
    port: int  # where rank 0 listens
    secret: str  # the same for all ranks of one life of the group, known to nobody else
    silence: float = 5.0  # seconds without a sign of life after which a rank is lost
    join_seconds: float = 120.0  # how long ranks wait for each other to start


def listen(host: str, port: int) -> socket.socket:
    """Rank 0's listening socket. Raises: InfrastructureError when the port is taken meanwhile."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise InfrastructureError(
            f"learner rank 0 cannot listen on {host}:{port} ({error.strerror}); another process took the "
            "port: start the ranks again"
        ) from error


def accept_ranks(
    listener: socket.socket,
    ranks: int,
    secret: str,
    *,
    seconds: float,
    make: Callable[[socket.socket, int], RankLink],
) -> dict[int, RankLink]:
    """Links, made by make(connection, rank), to ranks 1 ... ranks - 1. Strangers are turned away.

    Raises: RankLostError naming the ranks that did not come within `seconds`.
    """
    deadline = time.monotonic() + seconds
    links: dict[int, RankLink] = {}
    try:
        while missing := {rank: "" for rank in range(1, ranks) if rank not in links}:
            left = deadline - time.monotonic()
            if lost := {rank: link.lost for rank, link in links.items() if link.lost}:
                raise rank_lost(lost)
            if left <= 0:
                raise rank_lost(dict.fromkeys(missing, f"it did not join within {seconds:g} s"))
            listener.settimeout(min(left, 1.0))
            with contextlib.suppress(TimeoutError):
                connection = listener.accept()[0]
                rank = _greet(connection, secret)
                if rank in missing:
                    links[rank] = make(connection, rank)
                else:
                    connection.close()
    except RankLostError:
        for link in links.values():
            link.close()
        raise
    return links


def join_rank_zero(
    host: str,
    port: int,
    rank: int,
    secret: str,
    *,
    seconds: float,
    make: Callable[[socket.socket, int], RankLink],
) -> RankLink:
    """The link to rank 0, made by make(connection, 0).

    Raises: RankLostError when it does not answer within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), HANDSHAKE_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                why = f"it does not answer at {host}:{port} within {seconds:g} s ({error})"
                raise rank_lost({0: why}) from error
            time.sleep(RETRY_SECONDS)
            continue
        try:
            _present(connection, rank, secret)
        except (OSError, ValueError) as error:
            connection.close()
            raise rank_lost({0: f"it refused rank {rank} at {host}:{port} ({error})"}) from error
        return make(connection, 0)


def _mac(secret: str, *parts: object) -> str:
    return hmac.new(secret.encode(), ":".join(map(str, parts)).encode(), "sha256").hexdigest()


def _greet(connection: socket.socket, secret: str) -> int:
    """Both sides prove that they know the secret; the rank that called, or -1 for a stranger."""
    try:
        connection.settimeout(HANDSHAKE_SECONDS)
        nonce = secrets.token_hex(16)
        _say(connection, nonce=nonce)
        answer = _hear(connection)
        rank, theirs = int(answer["rank"]), str(answer["nonce"])
        if not hmac.compare_digest(str(answer["proof"]), _mac(secret, "rank", rank, nonce)):
            raise ValueError("wrong secret")
        _say(connection, proof=_mac(secret, "zero", rank, theirs))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        log.warning("connection refused", extra={"why": repr(error)})
        connection.close()
        return -1
    return rank


def _present(connection: socket.socket, rank: int, secret: str) -> None:
    """The other side of _greet. Raises: OSError, ValueError."""
    connection.settimeout(HANDSHAKE_SECONDS)
    nonce = secrets.token_hex(16)
    theirs = str(_hear(connection).get("nonce"))
    _say(connection, rank=rank, nonce=nonce, proof=_mac(secret, "rank", rank, theirs))
    proof = str(_hear(connection).get("proof"))
    if not hmac.compare_digest(proof, _mac(secret, "zero", rank, nonce)):
        raise ValueError("it does not know the secret of this group")


def _say(connection: socket.socket, **values: Any) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def _hear(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON, byte by byte: what follows it belongs to the link. Raises: OSError, ValueError."""
    line, deadline = bytearray(), time.monotonic() + HANDSHAKE_SECONDS
    while not line.endswith(b"\n"):
        if (left := deadline - time.monotonic()) <= 0.0:  # a byte now and then must not hold up the ranks
            raise TimeoutError("no greeting in time")
        connection.settimeout(left)
        byte = connection.recv(1)
        if not byte or len(line) > HANDSHAKE_BYTES:
            raise ValueError("no greeting")
        line += byte
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("no greeting")
    return values
