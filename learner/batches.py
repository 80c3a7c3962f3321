"""Draws batches ahead of the learner. Between a ReplayReader, which it alone touches, and `learner.loop`.

Readers belong to one thread. With depth > 0 that is the thread here: it draws, it writes overlay rows back
between draws, and it keeps the reader's grants flowing while the learner is busy. With depth 0 all of
it happens in the caller, in program order: what exact mode needs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import DeadlineError
from system.experience import Sequence, WriteBack
from system.interfaces import ReplayReader

POLL_SECONDS = 0.2
"""Longest single wait of the drawing thread: write-backs and stop() wait no longer."""
IDLE_SECONDS = 0.02
STOP_SECONDS = 30.0


class Batches:
    """Up to `depth` batches drawn ahead; next() waits at most `timeout` seconds.

    `ring` is how many batches the reader keeps valid at a time. Below depth + 2 (queued, being drawn, in
    use) they are copied into buffers of our own. The thread starts at the first next(), so a reader's
    state must be loaded before.
    """

    def __init__(self, reader: ReplayReader, depth: int, timeout: float, *, ring: int = 1) -> None:
        assert depth >= 0, depth
        assert timeout > 0, timeout
        self._reader, self._depth, self._timeout = reader, depth, timeout
        self._copies = _Ring(depth + 2) if depth and ring < depth + 2 else None
        self._pump: Callable[[], None] | None = getattr(
            reader, "pump", None
        )  # only governing readers have one
        self._changed = threading.Condition()
        self._drawn: deque[tuple[Sequence, dict[str, Any]]] = deque()
        self._write_backs: deque[WriteBack] = deque()
        self._state: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._why = ""
        self._stopping = False
        self._thread: threading.Thread | None = None

    def next(self) -> Sequence:
        """The next batch, valid until the one after it is asked for.

        Raises: DeadlineError when none came in time (ask again if you wish), or what the reader raised.
        """
        if self._depth == 0:
            sequence = self._reader.sample(self._timeout)
            self._state = self._reader.state()
            return sequence
        self._start()
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while not self._drawn:
                self._raise_if_failed()
                if not self._changed.wait(deadline - time.monotonic()) and not self._drawn:
                    raise DeadlineError(
                        f"no batch within {self._timeout:g} s: {self._why or 'the reader is still drawing'}"
                    )
            sequence, self._state = self._drawn.popleft()
            self._changed.notify_all()
        return sequence

    def write_back(self, rows: WriteBack) -> None:
        """Hand overlay rows to the reader; with depth > 0 they are written before the next draw.

        Raises: what the reader raised, also for earlier rows; DeadlineError when it takes none in time.
        """
        if self._depth == 0:
            self._reader.write_back(rows)
            return
        with self._changed:
            bounded = self._changed.wait_for(lambda: len(self._write_backs) <= self._depth, self._timeout)
            self._raise_if_failed()
            if not bounded:
                raise DeadlineError(
                    f"{len(self._write_backs)} write-backs wait for the replay reader; see its log"
                )
            self._write_backs.append(rows)
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        """The reader's state as of the last batch next() returned; later ones will be drawn again."""
        with self._changed:
            if self._state is None:
                self._state = self._reader.state()
            return self._state

    def stop(self) -> None:
        """Write back what is pending and end the thread; the reader stays open. Raises: DeadlineError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                raise DeadlineError(
                    f"the batch thread still runs {STOP_SECONDS:g} s after stop(); sample() of the reader "
                    "must keep its timeout: check the replay's disk"
                )

    def _start(self) -> None:
        if self._thread is None and not self._stopping:
            self.state()  # before anything is drawn
            self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
            self._thread.start()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopping:
            raise DeadlineError("no batch comes after stop(); make new Batches")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._write_pending()
                with self._changed:
                    full = len(self._drawn) >= self._depth
                    if full and not self._write_backs:
                        self._changed.wait(IDLE_SECONDS)
                if not full:
                    self._draw()
                elif self._pump is not None:
                    self._pump()
            self._write_pending()
        except Exception as error:  # surfaces in the consumer, where it can be named and handled
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _draw(self) -> None:
        try:
            sequence = self._reader.sample(min(POLL_SECONDS, self._timeout))
        except DeadlineError as error:
            self._why = str(error)  # next() keeps the deadline that counts
            return
        if self._copies is not None:
            sequence = self._copies.copy(sequence)
        state = self._reader.state()
        with self._changed:
            self._drawn.append((sequence, state))
            self._changed.notify_all()

    def _write_pending(self) -> None:
        while True:
            with self._changed:
                if not self._write_backs:
                    return
                rows = self._write_backs.popleft()
                self._changed.notify_all()
            self._reader.write_back(rows)


class _Ring:
    """Buffers used in turn, made from the first batch that comes by."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffers: list[dict[str, NDArray[np.generic]]] = []
        self._next = 0

    def copy(self, sequence: Sequence) -> Sequence:
        columns: Mapping[str, NDArray[np.generic]] = sequence.columns  # each [B, T, ...]
        if not self._buffers:
            self._buffers = [{k: np.empty_like(v) for k, v in columns.items()} for _ in range(self._size)]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % self._size
        for name, values in columns.items():
            np.copyto(buffer[name], values, casting="no")
        return replace(sequence, columns=dict(buffer))
