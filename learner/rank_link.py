"""Connections between learner ranks: messages, heartbeats, and the word that a rank is gone.

A star of TCP connections around rank 0, beside the process group that carries gradients. Collectives cannot
tell who is missing, and nothing runs in them while a rank waits for a batch; here every rank is heard all
the time and by name. Both ends prove that they know the group's secret. Frames are a JSON tree and raw
arrays, no pickle. Between `learner.ranks`, which speaks, and the sockets; `learner.rank_join` makes them.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import RankLostError

Arrays = Mapping[str, NDArray[np.generic]]

HEAD = struct.Struct(">QQ")  # bytes of JSON, bytes of arrays
PIECE_BYTES = 1 << 20
QUEUED_MESSAGES = 4
"""The protocol is question and answer: more than one message waiting is already unusual."""
BEATS_PER_SILENCE = 10
CLOSE_SECONDS = 5.0
LAST_WORDS = ("end", "lost")
"""After these a closed connection is no loss."""
LONGEST_HEAD = 256 << 20
RING = 3
"""Received batches that stay valid: one in use, one waiting, one arriving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Made by one end of a RankLink, taken by the other. Arrays of `reused` ones are overwritten later."""

    op: str
    tree: Any = None  # JSON
    arrays: Arrays = field(default_factory=dict[str, NDArray[np.generic]])  # each of any shape
    reused: bool = False


class RankLink:
    """One connection to one rank. A thread reads; silence and a closed connection both mean: lost."""

    def __init__(
        self,
        connection: socket.socket,
        rank: int,
        *,
        silence: float,
        entered: Callable[[], int],
        on_lost: Callable[[int, str], None],
    ) -> None:
        """`silence`: seconds without a byte after which the rank is lost; beats are ten times as often.

        entered() is what each beat tells: how many collectives this process has entered.
        """
        self.rank = rank
        self.entered = 0  # collectives the rank had entered when it last said so
        self.lost = ""  # why, once it is
        self._silence, self._tell, self._on_lost = silence, entered, on_lost
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(silence / BEATS_PER_SILENCE)
        self._sending = threading.Lock()
        self._inbox: queue.Queue[Message | None] = queue.Queue(QUEUED_MESSAGES)
        self._buffers = _Buffers()
        self._heard = time.monotonic()
        self._closing = False
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"rank-{rank}-{work.__name__}", daemon=True)
            for work in (self._read, self._beat)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, op: str, tree: Any = None, arrays: Arrays | None = None, *, reused: bool = False) -> None:
        """Raises: RankLostError when the rank is lost, or takes no byte for `silence` seconds."""
        with self._sending:
            for piece in _pieces(op, tree, arrays or {}, reused):
                self._send_all(piece)

    def receive(self, timeout: float) -> Message | None:
        """The next message; None when there is none in time. Raises: RankLostError."""
        try:
            message = self._inbox.get(timeout=0.0 if self.lost else max(0.0, timeout))
        except queue.Empty:
            message = None
        if message is None and self.lost:
            raise self.error()
        return message

    @property
    def over(self) -> bool:
        """Whether nothing more will come: the rank is lost, or has said its last word."""
        return bool(self.lost) or self._closing

    def error(self) -> RankLostError:
        return rank_lost({self.rank: self.lost})

    def lose(self, why: str) -> None:
        """Count the rank as lost from now on; the first reason stays."""
        if self.lost:
            return
        self.lost = why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(None)  # wakes whoever waits
        self._on_lost(self.rank, why)

    def close(self) -> None:
        """End the connection in peace; the other end must expect it."""
        self._closing = True
        self._stop.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
        self._socket.close()

    def expect_end(self) -> None:
        """From now on a closed connection is no loss."""
        self._closing = True

    # ---- inside -----------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say that this rank lives, whatever its main thread does; a message on its way says the same."""
        while not (self.lost or self._stop.wait(self._silence / BEATS_PER_SILENCE)):
            if not self._sending.acquire(blocking=False):
                continue
            try:
                for piece in _pieces("beat", self._tell(), {}, reused=False):
                    self._send_all(piece)
            except RankLostError:
                return  # noted: whoever waits for the rank is told
            finally:
                self._sending.release()

    def _send_all(self, piece: memoryview) -> None:
        deadline = time.monotonic() + self._silence
        while piece:
            try:
                sent = self._socket.send(piece[:PIECE_BYTES])
            except TimeoutError:
                if not self.lost and time.monotonic() > deadline:
                    self.lose(f"it took no data for {self._silence:g} s")
            except OSError as error:
                self.lose(_closed(error))
            else:
                piece, deadline = piece[sent:], time.monotonic() + self._silence
            if self.lost:
                raise self.error()

    def _read(self) -> None:
        try:
            while not self.lost:
                self._take(self._message())
        except _Ended as ended:
            if not self._closing:
                self.lose(str(ended))
        except (ValueError, KeyError, TypeError) as error:
            self.lose(f"it sent what is no message ({error!r:.100})")

    def _take(self, message: Message) -> None:
        if message.op == "beat":
            self.entered = int(message.tree)
            return
        if message.op == "failed":
            self.lose(f"it failed: {message.tree}")
            return
        self._closing |= message.op in LAST_WORDS
        while not (self.lost or self._stop.is_set()):
            with contextlib.suppress(queue.Full):
                self._inbox.put(message, timeout=self._silence)
                break
        for rank, why in message.tree.items() if message.op == "lost" else ():
            self._on_lost(int(rank), str(why))

    def _message(self) -> Message:
        head, body = HEAD.unpack(self._exactly(memoryview(bytearray(HEAD.size))))
        if head > LONGEST_HEAD:
            raise ValueError(f"{head} bytes of JSON")
        values = json.loads(bytes(self._exactly(memoryview(bytearray(head)))))
        reused = bool(values["reused"])
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, dtype, shape in values["arrays"]:
            kind = np.dtype(dtype)
            if kind.kind not in "biuf":
                raise ValueError(f"array {name!r} of {dtype}")
            array = self._buffers.take(name, kind, tuple(shape)) if reused else np.empty(shape, kind)
            if array.size:
                self._exactly(array.reshape(-1).view(np.uint8).data)
            arrays[name] = array
            body -= array.nbytes
        if body:
            raise ValueError(f"arrays differ from the announced size by {body} bytes")
        return Message(op=values["op"], tree=values["tree"], arrays=arrays, reused=reused)

    def _exactly(self, view: memoryview) -> memoryview:
        """Fill `view`. Raises: _Ended when the rank closes or falls silent first."""
        at = 0
        while at < len(view):
            try:
                count = self._socket.recv_into(view[at:])
            except TimeoutError:
                quiet = time.monotonic() - self._heard
                if quiet > self._silence:
                    raise _Ended(f"it has said nothing for {quiet:.1f} s: stopped, or cut off") from None
                if self._closing:
                    raise _Ended("closing") from None
                continue
            except OSError as error:
                raise _Ended(_closed(error)) from None
            if count == 0:
                raise _Ended(_closed(None))
            at += count
            self._heard = time.monotonic()
        return view


class _Ended(Exception):
    """The connection gives nothing more."""


def _closed(error: OSError | None) -> str:
    how = f" ({error.strerror})" if error is not None and error.strerror else ""
    return f"its connection closed{how}: its process ended"


def rank_lost(why: Mapping[int, str], *, intact: bool = False) -> RankLostError:
    """The error that names every lost rank with its reason."""
    named = "; ".join(f"learner rank {rank} is lost: {reason}" for rank, reason in sorted(why.items()))
    return RankLostError(
        f"{named}. All ranks have to start again from the newest checkpoint (a run does so by itself); "
        f"the log of that rank tells more",
        ranks=tuple(sorted(why)),
        intact=intact,
    )


def _pieces(op: str, tree: Any, arrays: Arrays, reused: bool) -> Iterator[memoryview]:
    named = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({"op": op, "tree": tree, "arrays": named, "reused": reused}).encode()
    size = sum(array.nbytes for array in arrays.values())
    yield memoryview(HEAD.pack(len(text), size) + text)
    for array in arrays.values():
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class _Buffers:
    """Memory of received batches, used in turn: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._rings: dict[tuple[str, str, tuple[int, ...]], list[NDArray[np.generic]]] = {}
        self._turn: dict[tuple[str, str, tuple[int, ...]], int] = {}

    def take(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[np.generic]:
        key = (name, dtype.name, shape)
        ring = self._rings.setdefault(key, [])
        turn = self._turn.get(key, 0)
        self._turn[key] = (turn + 1) % RING
        if turn == len(ring):
            ring.append(np.empty(shape, dtype))
        return ring[turn]
