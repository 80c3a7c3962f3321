"""Overlay rows on their way back to the shard that holds them, in order, one call at a time.

Beside `replay.fetch`, which reads them as if they had arrived already.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from numpy.typing import NDArray

from replay.experience_pb2 import OverlayRows, WriteBackRequest
from replay.fetch import Patch, RowFetcher
from replay.messages import MESSAGE_BYTES

MOST_PATCHES = 8192
"""Write-backs waiting for the wire; what comes on top is dropped and counted."""


class BackWriter:
    """Sends write-backs of one shard. What a shard that dies has not answered is lost."""

    def __init__(
        self, fetcher: RowFetcher, ask: Callable[[WriteBackRequest], Any], failed: Callable[[Any], None]
    ) -> None:
        """`ask` starts a call (None when nobody is there), `failed` hears of one without an answer."""
        self._fetcher = fetcher
        self._ask = ask
        self._failed = failed
        self._changed = threading.Condition()
        self._waiting: deque[Patch] = deque()
        self._busy = False

    def add(self, origin: int, stream: int, start: int, column: str, values: NDArray[Any]) -> int:
        """Rows accepted: all, or 0 while the shard is away or far behind."""
        with self._changed:
            if len(self._waiting) >= MOST_PATCHES:
                return 0
            patch = self._fetcher.patch(origin, stream, start, column, values)
            if patch is None:
                return 0
            self._waiting.append(patch)
        self._send()
        return len(values)

    def forget(self) -> None:
        """The shard is gone, and what was meant for it."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until nothing is on its way; False when `timeout` seconds are too short."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def _send(self) -> None:
        with self._changed:
            if self._busy or not self._waiting:
                return
            group, nbytes = [self._waiting.popleft()], 0
            nbytes += group[0].values.nbytes
            while self._waiting and nbytes + self._waiting[0].values.nbytes <= MESSAGE_BYTES:
                group.append(self._waiting.popleft())
                nbytes += group[-1].values.nbytes
            self._busy = True
        patches = [
            OverlayRows(
                origin=p.origin, stream=p.stream, start=p.start, column=p.column, data=p.values.tobytes()
            )
            for p in group
        ]
        call = self._ask(WriteBackRequest(life=self._fetcher.life, patches=patches))
        if call is None:
            self._done(group)
        else:
            call.add_done_callback(lambda done: self._answered(group, done))

    def _answered(self, group: list[Patch], call: Any) -> None:
        """Runs on a gRPC thread."""
        self._done(group)
        if call.code() != grpc.StatusCode.OK:
            self._failed(call)
        self._send()

    def _done(self, group: list[Patch]) -> None:
        self._fetcher.patched(group)
        with self._changed:
            self._busy = False
            self._changed.notify_all()
