"""Draws batches ahead of the learner. Between a ReplayReader, which it alone touches, and `learner.loop`.

Readers belong to one thread. With depth > 0 that is the thread here: it draws, it writes overlay rows back
between draws, and it keeps the reader's grants flowing while the learner is busy. With depth 0 all of
it happens in the caller, in program order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from learner.carrier_state import sequence_of, state_of, write_back_of
from system.errors import DeadlineError
from system.experience import Sequence, WriteBack
from system.interfaces import ReplayReader

Taken = TypeVar("Taken")
POLL_SECONDS = 0.2
"""Longest single wait of the drawing thread: write-backs and stop() wait no longer."""
IDLE_SECONDS = 0.02
STOP_SECONDS = 30.0


class Batches:
    """Up to `depth` batches drawn ahead; next() waits at most `timeout` seconds.

    `ring` is how many batches the reader keeps valid at a time. Below depth + 2 (queued, being drawn, in
    use) they are copied into buffers of our own. With `buffer`, which makes an array like a given one, the
    thread always copies: `learner.transfer` makes page-locked ones. The thread starts at the first next(),
    so a state must be loaded before.

    With `exact` the outcome does not depend on who is faster: rows that came back from a batch are written
    right before the draw depth + 1 later, and a state holds the batches drawn ahead.
    """

    def __init__(
        self,
        reader: ReplayReader,
        depth: int,
        timeout: float,
        *,
        ring: int = 1,
        exact: bool = False,
        buffer: Callable[[NDArray[np.generic]], NDArray[np.generic]] | None = None,
    ) -> None:
        assert depth >= 0, depth
        assert timeout > 0, timeout
        self._reader, self._depth, self._timeout = reader, depth, timeout
        self._exact = exact and depth > 0
        copied = depth > 0 and (buffer is not None or ring < depth + 2)
        self._copies = _Ring(depth + 2, buffer or np.empty_like) if copied else None
        self._pump: Callable[[], None] | None = getattr(
            reader, "pump", None
        )  # only governing readers have one
        self._changed = threading.Condition()
        self._drawn: deque[tuple[Sequence, dict[str, Any] | None]] = deque()
        self._write_backs: deque[tuple[int, WriteBack]] = deque()  # number of the batch, what came back
        self._taken = 0  # batches next() returned
        self._draws = 0
        self._asked: Callable[[], Any] | None = None  # what to do between two draws
        self._answer: _Answer | None = None
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
            return self._reader.sample(self._timeout)
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
            self._taken += 1
            self._changed.notify_all()
        return sequence

    def write_back(self, rows: WriteBack) -> None:
        """Hand overlay rows to the reader; with depth > 0 they are written before a later draw.

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
            self._write_backs.append((self._taken, rows))
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        """What must be loaded for the batches after the last one that next() returned to follow again.

        They are drawn again, or, with `exact`, part of the state. Raises: DeadlineError.
        """
        return self.snapshot(_nothing)[0]

    def snapshot(self, take: Callable[[], Taken]) -> tuple[dict[str, Any], Taken]:
        """The state, and what take() returns while nobody draws or writes back (only then with `exact`).

        Raises: what take() or the reader raised; DeadlineError.
        """
        if self._depth == 0:
            return self._reader.state(), take()
        if not self._exact:
            with self._changed:
                if self._state is None:
                    self._state = self._reader.state()
                state = self._state
            return state, take()
        if self._thread is None:
            return self._whole_state(), take()
        with self._changed:
            self._asked = lambda: (self._whole_state(), take())
            self._answer = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._answer or self._error or self._stopping, STOP_SECONDS)
            self._asked, answer = None, self._answer
            if answer is None:
                self._raise_if_failed()
                raise DeadlineError(f"the batch thread did not pause within {STOP_SECONDS:g} s; see its log")
        return answer.result()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned, before the first next()."""
        assert self._thread is None, "the batch thread runs already"
        self._reader.load(state)
        if (ahead := state.get("ahead")) is not None and self._depth > 0:
            self._drawn.extend((sequence_of(value), None) for value in ahead["drawn"])
            self._write_backs.extend((int(n), write_back_of(value)) for n, value in ahead["written"])
            self._draws = len(self._drawn)

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

    # ---- inside -----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None and not self._stopping:
            if not self._exact:
                self.state()  # before anything is drawn
            self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
            self._thread.start()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopping:
            raise DeadlineError("no batch comes after stop(); make new Batches")

    def _whole_state(self) -> dict[str, Any]:
        """The reader's state and everything between it and the learner."""
        drawn = [state_of(sequence) for sequence, _ in self._drawn]
        written = [[number - self._taken, state_of(rows)] for number, rows in self._write_backs]
        return {**self._reader.state(), "ahead": {"drawn": drawn, "written": written}}

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._answer_if_asked()
                with self._changed:
                    full = len(self._drawn) >= self._depth
                    due = bool(self._write_backs) and not self._exact
                    if full and not due and self._asked is None:
                        self._changed.wait(IDLE_SECONDS)
                if not full:
                    self._write_pending(self._draws - self._depth if self._exact else None)
                    self._draw()
                elif due:
                    self._write_pending(None)
                elif self._pump is not None:
                    self._pump()
            self._write_pending(None)
        except Exception as error:  # surfaces in the consumer, where it can be named and handled
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _answer_if_asked(self) -> None:
        with self._changed:
            if self._asked is not None and self._answer is None:
                self._answer = _Answer(self._asked)
                self._changed.notify_all()

    def _draw(self) -> None:
        try:
            sequence = self._reader.sample(min(POLL_SECONDS, self._timeout))
        except DeadlineError as error:
            self._why = str(error)  # next() keeps the deadline that counts
            return
        if self._copies is not None:
            sequence = self._copies.copy(sequence)
        state = None if self._exact else self._reader.state()
        with self._changed:
            self._drawn.append((sequence, state))
            self._draws += 1
            self._changed.notify_all()

    def _write_pending(self, through: int | None) -> None:
        """Write back what came from batches up to number `through`; all when None."""
        while True:
            with self._changed:
                if not self._write_backs or (through is not None and self._write_backs[0][0] > through):
                    return
                _, rows = self._write_backs.popleft()
                self._changed.notify_all()
            self._reader.write_back(rows)


class _Answer:
    """What a call returned or raised in another thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        try:
            self._value = call()
        except Exception as error:  # raised where it was asked for
            self._error = error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def _nothing() -> None:
    return None


class _Ring:
    """Buffers used in turn, made from the first batch that comes by."""

    def __init__(self, size: int, buffer: Callable[[NDArray[np.generic]], NDArray[np.generic]]) -> None:
        self._size, self._buffer = size, buffer
        self._buffers: list[dict[str, NDArray[np.generic]]] = []
        self._next = 0

    def copy(self, sequence: Sequence) -> Sequence:
        columns: Mapping[str, NDArray[np.generic]] = sequence.columns  # each [B, T, ...]
        if not self._buffers:
            self._buffers = [{k: self._buffer(v) for k, v in columns.items()} for _ in range(self._size)]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % self._size
        for name, values in columns.items():
            np.copyto(buffer[name], values, casting="no")
        return replace(sequence, columns=dict(buffer))
